"""Real pictures: from parquet into memory for training, and one by one from anywhere for scoring.

N pictures of H x W pixels, RGB.
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

PICTURE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})
_ROWS_AT_ONCE = 256
_ORIENTATION = 0x0112
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises on damaged files of its various formats."""


@dataclass(frozen=True, kw_only=True)
class PictureSet:
    """Pictures of one size, held in memory."""

    tensor: Tensor = field(repr=False)
    """uint8 RGB of shape (N, 3, H, W)."""

    def __len__(self) -> int:
        """Number of pictures."""
        return self.tensor.shape[0]

    def batch(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The pictures at `indices`: float32 RGB in [0, 1], shape (len(indices), 3, H, W)."""
        return self.tensor[torch.as_tensor(indices, dtype=torch.long)].float() / 255


def load_pictures(path: Path, column: str, max_images: int | None = None, size: int | None = None) -> PictureSet:
    """Decode the pictures of a parquet file.

    Args:
        column: column with the encoded file, as bytes or as a struct with the field `bytes`.
        max_images: use only the first so many rows.
        size: side in pixels; a picture of another size is cropped to its central square and resized.

    Raises:
        DataError: the file is missing or no parquet file; the column is absent, of the wrong type or empty; a row
            cannot be decoded; or, without `size`, the pictures differ in size.
    """
    pixels: np.ndarray | None = None
    bad: list[int] = []
    with _open_parquet(path, column) as file:
        count = min(file.metadata.num_rows, max_images or file.metadata.num_rows)
        for row, encoded in enumerate(itertools.islice(_encoded_rows(file, path, column), count)):
            try:
                image = _decode(encoded)
            except _UNDECODABLE:
                bad.append(row)
                continue
            picture = _fit(image, size)
            if pixels is None:
                pixels = np.empty((count, *picture.shape), np.uint8)
            if picture.shape != pixels.shape[1:]:
                raise DataError(
                    f"{path}: row {row} is {_size_text(picture)} pixels, earlier rows are {_size_text(pixels[0])}: "
                    "pictures of different sizes need one `size` to be brought to."
                )
            pixels[row] = picture
    if bad:
        raise DataError(
            f"{path}: column `{column}` holds {len(bad)} rows that are no readable 8-bit picture, the first is row "
            f"{bad[0]} (counted from 0). Repair or remove them."
        )
    if pixels is None:
        raise DataError(f"{path}: column `{column}` holds no picture.")
    return PictureSet(tensor=torch.from_numpy(pixels))


def read_images(
    paths: Sequence[Path], *, column: str = "image", skip: Callable[[str], None] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Pictures as viewers show them, decoded one at a time; nothing is resized or cropped.

    All paths are checked before the first picture is decoded. A file that is reached twice is read once.

    Args:
        paths: picture files, folders (searched for picture files at every depth, through links too, in sorted order)
            and parquet files.
        column: picture column of parquet files.
        skip: called with the reason for every picture that cannot be decoded, which is then passed over; None raises.

    Returns:
        Iterator over (name, uint8 RGB of shape (3, H, W)). The name is the file's path; for a row of a parquet file,
        the path, `#` and the row number. Transparency is dropped.

    Raises:
        DataError: a path is missing, a folder holds no picture or cannot be listed, or a file cannot be decoded; it
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
        # A pattern such as `*` also meets files that are no pictures; a file that is named is always tried.
        matches = [each for each in matches if each.suffix.lower() in PICTURE_SUFFIXES | PARQUET_SUFFIXES]
        if not matches:
            raise DataError(f"the pattern {path} matches no picture and no parquet file.")
        found += matches
    return found


def count_images(paths: Sequence[Path], *, column: str = "image") -> int:
    """How many pictures `read_images` will try to decode.

    Raises:
        DataError: as `read_images`.
    """
    files = {os.path.abspath(file): file for path in paths for file in _expand(Path(path), column)}.values()
    return sum(pq.read_metadata(file).num_rows if _is_parquet(file) else 1 for file in files)


def real_pictures(
    path: Path, *, column: str = "image", size: int | None = None, most: int | None = None
) -> list[Tensor]:
    """Pictures of a file, a folder or a parquet file, in memory.

    Args:
        column: picture column of a parquet file.
        size: side in pixels, as in `load_pictures`; None leaves every picture as it is.
        most: use so many: evenly spread over a folder's files in their order, the first rows of a parquet file.

    Returns:
        uint8 RGB, each (3, H, W).

    Raises:
        DataError: the path is missing, it holds no picture, or one cannot be decoded.
    """
    paths = _expand(path, column)
    if most is not None and len(paths) > most:
        paths = [paths[index * len(paths) // most] for index in range(most)]
    found = [picture for _, picture in itertools.islice(read_images(paths, column=column), most)]
    if not found:
        raise DataError(f"{path} holds no picture.")
    if size is None:
        return found
    return [
        torch.from_numpy(np.ascontiguousarray(_fit(Image.fromarray(picture.permute(1, 2, 0).numpy()), size)))
        for picture in found
    ]


def decode_square(encoded: bytes | None, size: int) -> Tensor:
    """One encoded picture, its central square resized to `size`: float32 RGB in [0, 1], (3, size, size).

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        picture = _fit(_decode(encoded), size)
    except _UNDECODABLE as error:
        raise DataError(f"not a readable picture: {error}") from error
    return torch.from_numpy(np.ascontiguousarray(picture)).float() / 255


def upright(image: Image.Image) -> Image.Image:
    """The picture as viewers show it: turned or mirrored as its EXIF orientation says, where it has one."""
    try:
        return image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
    except _UNDECODABLE:
        return image  # damaged remarks are no damage to the picture


def _expand(path: Path, column: str) -> list[Path]:
    if path.is_dir():
        return _pictures_below(path)
    if not path.is_file():
        raise DataError(f"no such file or folder: {path}")
    if _is_parquet(path):
        _open_parquet(path, column).close()
    return [path]


def _pictures_below(folder: Path) -> list[Path]:
    files = files_below(folder)
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    if not pictures:
        raise DataError(
            f"{folder} holds no picture: {len(files)} files, none ending in {', '.join(sorted(PICTURE_SUFFIXES))}."
        )
    if len(pictures) < len(files):
        logger.info("%s: %d files skipped that are no pictures", folder, len(files) - len(pictures))
    return pictures


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
    # A generator that raises is over: whoever went on after the error would miss the rows behind it.
    try:
        picture = _decode_named(source, where)
    except DataError as error:
        if skip is None:
            raise
        skip(str(error))
        return
    yield name, picture


def _decode_named(source: Path | bytes | None, name: str) -> Tensor:
    try:
        pixels = np.asarray(_decode(source))
    except _UNDECODABLE as error:
        raise DataError(f"{name} cannot be read as a picture: {error}") from error
    # Always a copy: Pillow's own memory is not to be written to.
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def _decode(source: Path | bytes | None) -> Image.Image:
    """RGB picture of an encoded file.

    Raises:
        one of `_UNDECODABLE`.
    """
    if source is None:
        raise ValueError("the row is empty")
    with Image.open(source if isinstance(source, Path) else BytesIO(source)) as image:
        if image.mode.startswith(("I", "F")):
            # Pillow's conversion would saturate such pixels to white.
            raise ValueError(f"only 8-bit pictures are supported, found mode {image.mode}")
        image.load()
        image = upright(image)
        return image if image.mode == "RGB" else image.convert("RGB")


def _fit(image: Image.Image, size: int | None) -> np.ndarray:
    """Picture as uint8 (3, H, W), brought to `size` if that is given and different."""
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if side != size:
            image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def _size_text(picture: np.ndarray) -> str:
    return f"{picture.shape[2]}x{picture.shape[1]}"


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in PARQUET_SUFFIXES


def _open_parquet(path: Path, column: str) -> pq.ParquetFile:
    """The file, once its column is known to hold pictures."""
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
            f"{path}: column `{column}` is of type {kind}; expected encoded pictures as binary, or a struct with a "
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
