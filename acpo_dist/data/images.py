"""Real images: from parquet into memory for training, and one by one from anywhere for scoring.

N images of H x W pixels, RGB.
"""

import glob
import itertools
import logging
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch import Tensor

from acpo_dist.core.errors import DataError
from acpo_dist.data.folders import files_below

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})
_ROWS_AT_ONCE = 256
_ORIENTATION = 0x0112
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises on damaged files of its various formats."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images of one size, held in memory."""

    tensor: Tensor = field(repr=False)
    """uint8 RGB of shape (N, 3, H, W)."""

    def __len__(self) -> int:
        """Number of images."""
        return self.tensor.shape[0]

    def batch(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The images at `indices`: float32 RGB in [0, 1], shape (len(indices), 3, H, W)."""
        return self.tensor[torch.as_tensor(indices, dtype=torch.long)].float() / 255


def load_images(path: Path, column: str, max_images: int | None = None, size: int | None = None) -> ImageSet:
    """Decode the images of a parquet file.

    Args:
        column: column with the encoded file, as bytes or as a struct with the field `bytes`.
        max_images: use only the first so many rows.
        size: side in pixels; an image of another size is cropped to its central square and resized.

    Raises:
        DataError: the file is missing or no parquet file; the column is absent, of the wrong type or empty; a row
            cannot be decoded; or, without `size`, the images differ in size.
    """
    pixels: np.ndarray | None = None
    bad: list[int] = []
    with _open_parquet(path, column) as file:
        count = min(file.metadata.num_rows, max_images or file.metadata.num_rows)
        for row, encoded in enumerate(itertools.islice(_encoded_rows(file, path, column), count)):
            try:
                image_CHW = _decode(encoded)
            except _UNDECODABLE:
                bad.append(row)
                continue
            image = _fit(image_CHW, size)
            if pixels is None:
                pixels = np.empty((count, *image.shape), np.uint8)
            if image.shape != pixels.shape[1:]:
                raise DataError(
                    f"{path}: row {row} is {_size_text(image)} pixels, earlier rows are {_size_text(pixels[0])}: "
                    "images of different sizes need one `size` to be brought to."
                )
            pixels[row] = image
    if bad:
        raise DataError(
            f"{path}: column `{column}` holds {len(bad)} rows that are no readable 8-bit image, the first is row "
            f"{bad[0]} (counted from 0). Repair or remove them."
        )
    if pixels is None:
        raise DataError(f"{path}: column `{column}` holds no image.")
    return ImageSet(tensor=torch.from_numpy(pixels))


def read_images(
    paths: Sequence[Path], *, column: str = "image", skip: Callable[[str], None] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Images as viewers show them, decoded one at a time; nothing is resized or cropped.

    All paths are checked before the first image is decoded. A file that is reached twice is read once.

    Args:
        paths: image files, folders (searched for image files at every depth, through links too, in sorted order)
            and parquet files.
        column: image column of parquet files.
        skip: called with the reason for every image that cannot be decoded, which is then passed over; None raises.

    Returns:
        Iterator over (name, uint8 RGB of shape (3, H, W)). The name is the file's path; for a row of a parquet file,
        the path, `#` and the row number. Transparency is dropped.

    Raises:
        DataError: a path is missing, a folder holds no image or cannot be listed, or a file cannot be decoded; it
            is named.
    """
    files: dict[str, Path] = {}
    for path in paths:
        for file in _expand(Path(path), column):
            files.setdefault(os.path.abspath(file), file)
    return itertools.chain.from_iterable(_read_one(file, column, skip) for file in files.values())


def expand_globs(paths: Sequence[Path]) -> list[Path]:
    """The paths, with patterns (`*`, `?`, `[...]`, `**`) that name no file of their own replaced by what they match.

    Raises:
        DataError: a pattern matches nothing.
    """
    found: list[Path] = []
    for path in paths:
        if path.exists() or not glob.has_magic(str(path)):
            found.append(path)
            continue
        matches = [Path(match) for match in sorted(glob.glob(os.path.expanduser(path), recursive=True))]
        # A pattern such as `*` also meets files that are no images; a file that is named is always tried.
        matches = [each for each in matches if each.suffix.lower() in IMAGE_SUFFIXES | PARQUET_SUFFIXES]
        if not matches:
            raise DataError(f"the pattern {path} matches no image and no parquet file.")
        found += matches
    return found


def count_images(paths: Sequence[Path], *, column: str = "image") -> int:
    """How many images `read_images` will try to decode.

    Raises:
        DataError: as `read_images`.
    """
    files = {os.path.abspath(file): file for path in paths for file in _expand(Path(path), column)}.values()
    return sum(pq.read_metadata(file).num_rows if _is_parquet(file) else 1 for file in files)


def real_images(path: Path, *, column: str = "image", size: int | None = None, most: int | None = None) -> list[Tensor]:
    """Images of a file, a folder or a parquet file, in memory.

    Args:
        column: image column of a parquet file.
        size: side in pixels, as in `load_images`; None leaves every image as it is.
        most: use so many: evenly spread over a folder's files in their order, the first rows of a parquet file.

    Returns:
        uint8 RGB, each (3, H, W).

    Raises:
        DataError: the path is missing, it holds no image, or one cannot be decoded.
    """
    paths = _expand(path, column)
    if most is not None and len(paths) > most:
        paths = [paths[index * len(paths) // most] for index in range(most)]
    found = [image for _, image in itertools.islice(read_images(paths, column=column), most)]
    if not found:
        raise DataError(f"{path} holds no image.")
    if size is None:
        return found
    return [
        torch.from_numpy(np.ascontiguousarray(_fit(Image.fromarray(image.permute(1, 2, 0).numpy()), size)))
        for image in found
    ]


def decode_square(encoded: bytes | None, size: int) -> Tensor:
    """One encoded image, its central square resized to `size`: float32 RGB in [0, 1], (3, size, size).

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        image = _fit(_decode(encoded), size)
    except _UNDECODABLE as error:
        raise DataError(f"not a readable image: {error}") from error
    return torch.from_numpy(np.ascontiguousarray(image)).float() / 255


def upright(image: Image.Image) -> Image.Image:
    """The image as viewers show it: turned or mirrored as its EXIF orientation says, where it has one."""
    try:
        return image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
    except _UNDECODABLE:
        return image  # damaged metadata does not affect the pixels


def _expand(path: Path, column: str) -> list[Path]:
    if path.is_dir():
        return _images_below(path)
    if not path.is_file():
        raise DataError(f"no such file or folder: {path}")
    if _is_parquet(path):
        _open_parquet(path, column).close()
    return [path]


def _images_below(folder: Path) -> list[Path]:
    files = files_below(folder)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise DataError(
            f"{folder} holds no image: {len(files)} files, none ending in {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    if len(images) < len(files):
        logger.info("%s: %d files skipped that are no images", folder, len(files) - len(images))
    return images


def _read_one(path: Path, column: str, skip: Callable[[str], None] | None) -> Iterator[tuple[str, Tensor]]:
    if not _is_parquet(path):
        yield from _decode_or_skip(path, str(path), str(path), skip)
        return
    with _open_parquet(path, column) as file:
        for row, encoded in enumerate(_encoded_rows(file, path, column)):
            yield from _decode_or_skip(encoded, f"{path}#{row}", f"{path}, row {row} of column `{column}`", skip)


def _decode_or_skip(
    source: Path | bytes | None, name: str, where: str, skip: Callable[[str], None] | None
) -> Iterator[tuple[str, Tensor]]:
    # A generator that raises is finished: continuing after the error would miss the rows behind it.
    try:
        image = _decode_named(source, where)
    except DataError as error:
        if skip is None:
            raise
        skip(str(error))
        return
    yield name, image


def _decode_named(source: Path | bytes | None, name: str) -> Tensor:
    try:
        pixels = np.asarray(_decode(source))
    except _UNDECODABLE as error:
        raise DataError(f"{name} cannot be read as an image: {error}") from error
    # Always a copy: Pillow's own memory is not to be written to.
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def _decode(source: Path | bytes | None) -> Image.Image:
    """RGB image of an encoded file.

    Raises:
        one of `_UNDECODABLE`.
    """
    if source is None:
        raise ValueError("the row is empty")
    with Image.open(source if isinstance(source, Path) else BytesIO(source)) as image:
        if image.mode.startswith(("I", "F")):
            # Pillow's conversion would saturate such pixels to white.
            raise ValueError(f"only 8-bit images are supported, found mode {image.mode}")
        image.load()
        image = upright(image)
        return image if image.mode == "RGB" else image.convert("RGB")


def _fit(image: Image.Image, size: int | None) -> np.ndarray:
    """Image as uint8 (3, H, W), brought to `size` if that is given and different."""
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if side != size:
            image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def _size_text(image: np.ndarray) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in PARQUET_SUFFIXES


def _open_parquet(path: Path, column: str) -> pq.ParquetFile:
    """The file, once its column is known to hold images."""
    if not Path(path).is_file():
        raise DataError(f"no such file: {path}")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error
    schema = file.schema_arrow
    if schema.names.count(column) != 1:
        file.close()
        raise DataError(f"{path} has no column `{column}`. Columns found: {', '.join(schema.names)}.")
    kind = schema.field(column).type
    if not _is_bytes(kind.field("bytes").type if _has_bytes(kind) else kind):
        file.close()
        raise DataError(
            f"{path}: column `{column}` is of type {kind}; expected encoded images as binary, or a struct with a "
            "binary field `bytes`."
        )
    return file


def _has_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _encoded_rows(file: pq.ParquetFile, path: Path, column: str) -> Iterator[bytes | None]:
    try:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield value["bytes"] if isinstance(value, dict) else value
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
