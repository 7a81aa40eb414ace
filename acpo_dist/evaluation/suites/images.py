"""Existing images as encoded bytes with their names, prompts and categories.

H x W pixels, RGB.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from acpo_dist.core.errors import DataError
from acpo_dist.data.decoding import require_few_pixels, upright
from acpo_dist.data.folders import files_below
from acpo_dist.data.images import IMAGE_SUFFIXES, PARQUET_SUFFIXES

_ROWS_AT_ONCE = 64
_PIXELS_AT_ONCE = 16 * 1024 * 1024
"""Maximum number of pixels of stacked images: 200 MB as float32, not counting the activations of a network."""


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """One image file, or one row of a parquet file, not decoded yet."""

    name: str
    """Path relative to the given folder; for a row `FILE#ROW`."""
    key: str
    """Key that pairs the image with an image of another set: the path without its suffix, or the row."""
    prompt: str
    """Empty if unknown."""
    data: bytes | None = field(repr=False)
    """None for an empty row."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the encoded bytes."""
        return digest(self.data or b"")


def digest(data: bytes) -> str:
    """Return the SHA-256 as hexadecimal text."""
    return hashlib.sha256(data).hexdigest()


def holds_images(path: Path) -> bool:
    """Return whether a path is an image, a parquet file or a folder with an image at any depth."""
    if path.is_file():
        return path.suffix.lower() in IMAGE_SUFFIXES | PARQUET_SUFFIXES
    return path.is_dir() and any(_is_image(file) for file in files_below(path))


def count_image_files(path: Path) -> int:
    """Count the images of a file or folder, or the rows of a parquet file."""
    return _open(path).metadata.num_rows if path.suffix.lower() in PARQUET_SUFFIXES else len(_files(path))


def read_image_files(
    path: Path, *, indices: Sequence[int], image_column: str = "image", prompt_column: str = "prompt"
) -> Iterator[EncodedImage]:
    """Read images without decoding them.

    Args:
        path: image, folder or parquet file.
        indices: ascending positions of the images in sorted path order or row order.
        image_column: column of parquet files with the encoded image.
        prompt_column: column of parquet files with the prompt; may be absent.

    Returns:
        Iterator over the images.

    Raises:
        DataError: the path is missing or unreadable, holds no image, or lacks the image column.
    """
    if path.suffix.lower() in PARQUET_SUFFIXES:
        yield from _rows(path, frozenset(indices), image_column, prompt_column)
        return
    files = _files(path)
    root = path if path.is_dir() else path.parent
    names = [file.relative_to(root) for file in files]
    stems = Counter(name.with_suffix("") for name in names)
    for index in indices:
        name = names[index]
        # The suffix is dropped so that PNGs pair with JPEGs, unless two files differ only in it.
        key = name if stems[name.with_suffix("")] > 1 else name.with_suffix("")
        try:
            data = files[index].read_bytes()
        except OSError as error:
            raise DataError(f"{files[index]} cannot be read: {error}") from error
        yield EncodedImage(name=name.as_posix(), key=key.as_posix(), prompt="", data=data)


def decode(data: bytes | None, name: str) -> Tensor:
    """Decode an image with its EXIF orientation applied and its transparency dropped.

    Args:
        data: encoded bytes, or None for an empty row.
        name: name of the image in error messages.

    Returns:
        uint8 RGB (3, H, W).

    Raises:
        DataError: the bytes are no readable 8-bit image.
    """
    try:
        if not data:
            raise ValueError("it is empty")
        with Image.open(BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"only 8-bit images are supported, found mode {image.mode}")
            require_few_pixels(image)
            image.load()
            pixels = np.array(upright(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be read as an image: {error}") from error
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def at_once(image: Tensor, most: int) -> int:
    """Return the number of images of this size, (3, H, W), to stack: `most`, or fewer if memory is short."""
    return max(1, min(most, _PIXELS_AT_ONCE // (image.shape[1] * image.shape[2])))


def encode(image: Tensor) -> bytes:
    """Encode a uint8 RGB image (3, H, W) as PNG; equal images give equal bytes."""
    buffer = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"no such file or folder: {path}")
    found = [file for file in files_below(path) if _is_image(file)]
    if not found:
        raise DataError(f"{path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return found


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error


def _rows(path: Path, wanted: frozenset[int], image_column: str, prompt_column: str) -> Iterator[EncodedImage]:
    with _open(path) as file:
        names = file.schema_arrow.names
        if image_column not in names:
            raise DataError(
                f"{path} has no column `{image_column}` (--image-column). Columns found: {', '.join(names)}."
            )
        columns = [image_column, *([prompt_column] if prompt_column in names else [])]
        index = 0
        try:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    if index in wanted:
                        yield _row(path, index, row, image_column, prompt_column)
                    index += 1
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is damaged: {error}") from error


def _row(path: Path, index: int, row: dict, image_column: str, prompt_column: str) -> EncodedImage:
    value = row[image_column]
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is not None and not isinstance(data, bytes):
        raise DataError(
            f"{path}: column `{image_column}` holds {type(data).__name__}; expected encoded images as binary, or a "
            "struct with a binary field `bytes`."
        )
    prompt = str(row.get(prompt_column) or "")
    return EncodedImage(name=f"{path.name}#{index}", key=f"row {index:06d}", prompt=prompt, data=data)
