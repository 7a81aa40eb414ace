"""Read images from files, folders, zip archives and parquet files, into memory or one at a time.

N images of H x W pixels, RGB.
"""

import glob
import itertools
import logging
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from acpo_dist.core.errors import DataError
from acpo_dist.core.sizes import Size
from acpo_dist.data.decoding import UNDECODABLE, decode, decode_named, fit, require_small
from acpo_dist.data.folders import files_below
from acpo_dist.data.parquet_images import encoded_rows, open_parquet

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm",
    ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
})  # fmt: skip
"""Suffixes of images in a folder or archive; an explicitly named file may have any suffix."""
PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})
ARCHIVE_SUFFIXES = frozenset({".zip"})
_SIDECARS = frozenset({".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".yml"})
"""Suffixes of captions and descriptions beside images, which are not reported as skipped."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images of one size in memory."""

    tensor: Tensor = field(repr=False)
    """uint8 RGB (N, 3, H, W)."""

    def __len__(self) -> int:
        """Return the number of images."""
        return self.tensor.shape[0]

    def batch(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the images at `indices` as RGB (len(indices), 3, H, W), float32 in [0, 1]."""
        return self.tensor[torch.as_tensor(indices, dtype=torch.long)].float() / 255


def load_images(path: Path, column: str, max_images: int | None = None, size: int | Size | None = None) -> ImageSet:
    """Decode the images of a parquet file, a folder (of images or of parquet files), a zip archive or an image file.

    Args:
        path: file or folder.
        column: column of parquet files with the encoded image, as bytes or as a struct with the fields `bytes` and
            `path`.
        max_images: maximum number of images: the first rows of a parquet file, or files spread evenly over a folder.
        size: (width, height), or the side of a square; images of another size are cropped and resized as in `fit`.

    Returns:
        The images.

    Raises:
        DataError: the file is missing or no parquet file; the column is absent, of the wrong type or empty; a row
            cannot be decoded; or, without `size`, the images differ in size.
    """
    if not is_parquet(path):
        images = real_images(path, column=column, size=size, most=max_images)
        sizes = {tuple(image.shape[1:]) for image in images}
        if len(sizes) > 1:
            (a, b), (c, d) = sorted(sizes)[:2]
            raise DataError(
                f"{path} holds images of different sizes, such as {b}x{a} and {d}x{c}: they need one common `size`."
            )
        return ImageSet(tensor=torch.stack(images))
    pixels: np.ndarray | None = None
    bad: list[int] = []
    with open_parquet(path, column) as file:
        count = min(file.metadata.num_rows, max_images or file.metadata.num_rows)
        for row, encoded in enumerate(itertools.islice(encoded_rows(file, path, column), count)):
            try:
                image_CHW = decode(encoded)
            except UNDECODABLE:
                bad.append(row)
                continue
            image = fit(image_CHW, size)
            if pixels is None:
                pixels = np.empty((count, *image.shape), np.uint8)
            if image.shape != pixels.shape[1:]:
                raise DataError(
                    f"{path}: row {row} is {_size_text(image)} pixels, earlier rows are {_size_text(pixels[0])}: "
                    "images of different sizes need one common `size`."
                )
            pixels[row] = image
    if bad:
        raise DataError(
            f"{path}: column `{column}` holds {len(bad)} rows that are no readable image, the first is row "
            f"{bad[0]} (counted from 0). Repair or remove them."
        )
    if pixels is None:
        raise DataError(f"{path}: column `{column}` holds no image.")
    return ImageSet(tensor=torch.from_numpy(pixels))


def read_images(
    paths: Sequence[Path], *, column: str = "image", skip: Callable[[str], None] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Decode images one at a time with their EXIF orientation applied; nothing is resized or cropped.

    All paths are checked before the first image is decoded. A file that is found twice is read once.

    Args:
        paths: image files, parquet files, and folders, which are searched at every depth, including links, in sorted
            order.
        column: image column of parquet files.
        skip: called with the reason for every image that cannot be decoded, which is then skipped; None raises.

    Returns:
        Iterator over (name, uint8 RGB (3, H, W)). The name is the path of the file; for a row of a parquet file, the
        path, `#` and the row number. Transparency is dropped.

    Raises:
        DataError: a path is missing, a folder holds no image or cannot be listed, or an image cannot be decoded.
    """
    files: dict[str, Path] = {}
    for path in paths:
        for file in expand(Path(path), column):
            files.setdefault(os.path.abspath(file), file)
    return itertools.chain.from_iterable(_read_one(file, column, skip) for file in files.values())


def expand_globs(paths: Sequence[Path]) -> list[Path]:
    """Expand patterns (`*`, `?`, `[...]`, `**`); a pattern that is the name of an existing file is kept.

    Raises:
        DataError: a pattern matches nothing.
    """
    found: list[Path] = []
    for path in paths:
        if path.exists() or not glob.has_magic(str(path)):
            found.append(path)
            continue
        matches = [Path(match) for match in sorted(glob.glob(os.path.expanduser(path), recursive=True))]
        # A pattern such as `*` also matches other files than images; an explicitly named file is always decoded.
        known = IMAGE_SUFFIXES | PARQUET_SUFFIXES | ARCHIVE_SUFFIXES
        matches = [each for each in matches if each.suffix.lower() in known]
        if not matches:
            raise DataError(f"the pattern {path} matches no image and no parquet file.")
        found += matches
    return found


def holds_images(path: Path) -> bool:
    """Return whether a path is an image, a parquet file, a zip archive, or a folder with one of them at any depth."""
    known = IMAGE_SUFFIXES | PARQUET_SUFFIXES | ARCHIVE_SUFFIXES
    if path.is_file():
        return path.suffix.lower() in known
    return path.is_dir() and any(file.suffix.lower() in known for file in files_below(path))


def count_images(paths: Sequence[Path], *, column: str = "image") -> int:
    """Count the images that `read_images` will try to decode.

    Raises:
        DataError: as `read_images`.
    """
    files = {os.path.abspath(file): file for path in paths for file in expand(Path(path), column)}.values()
    return sum(
        pq.read_metadata(file).num_rows if is_parquet(file) else len(archived_images(file)) if is_archive(file) else 1
        for file in files
    )


def real_images(
    path: Path, *, column: str = "image", size: int | Size | None = None, most: int | None = None
) -> list[Tensor]:
    """Read the images of a file, a folder or a parquet file into memory.

    Args:
        path: file or folder.
        column: image column of a parquet file.
        size: as in `load_images`; None keeps the size of each image.
        most: maximum number of images: spread evenly over the sorted files of a folder, or the first rows of a parquet
            file.

    Returns:
        uint8 RGB, each (3, H, W).

    Raises:
        DataError: the path is missing or holds no image, or an image cannot be decoded.
    """
    paths = expand(path, column)
    if most is not None and len(paths) > most:
        paths = [paths[index * len(paths) // most] for index in range(most)]
    found = [image for _, image in itertools.islice(read_images(paths, column=column), most)]
    if not found:
        raise DataError(f"{path} holds no image.")
    if size is None:
        return found
    return [
        torch.from_numpy(np.ascontiguousarray(fit(Image.fromarray(image.permute(1, 2, 0).numpy()), size)))
        for image in found
    ]


def expand(path: Path, column: str) -> list[Path]:
    """Return the image files, parquet files or archives of a path, sorted.

    Args:
        path: a file, which is returned, or a folder, searched at every depth.
        column: image column of parquet files.

    Raises:
        DataError: the path is missing, a folder holds no image, or a parquet file lacks the column.
    """
    if path.is_dir():
        return _images_below(path, column)
    if not path.is_file():
        raise DataError(f"no such file or folder: {path}")
    if is_parquet(path):
        open_parquet(path, column).close()
    return [path]


def _images_below(folder: Path, column: str) -> list[Path]:
    """Return image files at every depth or, without any, parquet files and zip archives. Other files are logged."""
    files = files_below(folder)
    for suffixes in (IMAGE_SUFFIXES, PARQUET_SUFFIXES, ARCHIVE_SUFFIXES):
        found = [file for file in files if file.suffix.lower() in suffixes]
        if found:
            break
    else:
        raise DataError(
            f"{folder} holds no image: {len(files)} files, none ending in {', '.join(sorted(IMAGE_SUFFIXES))}, "
            ".parquet or .zip."
        )
    if is_parquet(found[0]):
        open_parquet(found[0], column).close()
    report_skipped(folder, [str(file.relative_to(folder)) for file in set(files) - set(found)])
    return found


def report_skipped(place: Path, names: Sequence[str]) -> None:
    """Log how many files of a folder or archive are not read, by suffix, with the first names.

    Args:
        place: folder or archive.
        names: names of the files; captions and descriptions (.txt, .json, ...) are not reported.
    """
    odd = sorted(name for name in names if Path(name).suffix.lower() not in _SIDECARS)
    if odd:
        kinds = Counter(Path(name).suffix.lower() or "no ending" for name in odd)
        logger.warning(
            "%s: %d files are not images and are skipped (%s), such as %s", place, len(odd),
            ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())), ", ".join(odd[:3]),
        )  # fmt: skip


def archived_images(path: Path) -> list[str]:
    """Return the sorted names of the images in a zip archive.

    Raises:
        DataError: the archive cannot be read, or holds no image.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} is not a readable zip archive: {error}") from error
    visible = [name for name in names if not Path(name).name.startswith(".") and not name.startswith("__MACOSX")]
    images = sorted(name for name in visible if Path(name).suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise DataError(f"{path} holds no image: {len(names)} files, none of a known image format.")
    report_skipped(path, sorted(set(visible) - set(images)))
    return images


def _read_one(path: Path, column: str, skip: Callable[[str], None] | None) -> Iterator[tuple[str, Tensor]]:
    if is_archive(path):
        names = archived_images(path)
        with zipfile.ZipFile(path) as archive:
            for name in names:
                entry = partial(unpack, archive, name)
                yield from _decode_or_skip(entry, f"{path}#{name}", f"{path}, entry {name}", skip)
        return
    if not is_parquet(path):
        yield from _decode_or_skip(lambda: path, str(path), str(path), skip)
        return
    with open_parquet(path, column) as file:
        for row, encoded in enumerate(encoded_rows(file, path, column)):
            yield from _decode_or_skip(
                lambda cell=encoded: cell, f"{path}#{row}", f"{path}, row {row} of column `{column}`", skip
            )


def _decode_or_skip(
    source: Callable[[], Path | bytes | None], name: str, where: str, skip: Callable[[str], None] | None
) -> Iterator[tuple[str, Tensor]]:
    # A generator that raises is finished, so continuing after the error would skip the remaining rows.
    try:
        image = decode_named(source, where)
    except DataError as error:
        if skip is None:
            raise
        skip(str(error))
        return
    yield name, image


def unpack(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read an entry of an archive.

    Raises:
        ValueError: the entry is damaged, encrypted or too large.
    """
    size = archive.getinfo(name).file_size
    require_small(size)
    try:
        with archive.open(name) as entry:
            # Without a length, `zipfile` unpacks up to 2 GiB before it compares the size with the announced one.
            return entry.read(size)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
        raise ValueError(f"damaged or encrypted: {error}") from error


def _size_text(image: np.ndarray) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip archive, by its suffix."""
    return path.suffix.lower() in ARCHIVE_SUFFIXES


def is_parquet(path: Path) -> bool:
    """Return whether a file is a parquet file, by its suffix."""
    return path.suffix.lower() in PARQUET_SUFFIXES
