"""Decode one encoded image to 8-bit RGB."""

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from acpo_dist.core.errors import DataError

_ORIENTATION = 0x0112
UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""Exceptions that Pillow raises on damaged files of its various formats."""

MAX_PIXELS = 2**27
"""Largest image that is decoded: 134 megapixels, above the largest cameras."""
MAX_FILE_BYTES = 2**28
"""Largest encoded image that is unpacked from an archive."""


def require_small(count: int) -> None:
    """Check the size in bytes of an encoded image before it is unpacked.

    Raises:
        ValueError: it is too large.
    """
    if count > MAX_FILE_BYTES:
        raise ValueError(f"it has {count / 2**20:.0f} MiB unpacked, at most {MAX_FILE_BYTES >> 20} are read")


def require_few_pixels(image: Image.Image) -> None:
    """Check the size of an image that is open, before its pixels are decoded.

    Raises:
        ValueError: it is too large.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it has {image.width}x{image.height} pixels, at most {MAX_PIXELS} are decoded")


def decode(source: Path | bytes | None) -> Image.Image:
    """Decode an image to RGB; grey images of 16 bits per pixel are scaled to 8.

    Args:
        source: path or bytes of an encoded image; None is undecodable.

    Returns:
        8-bit RGB image.

    Raises:
        One of `UNDECODABLE`.
    """
    if source is None:
        raise ValueError("the row is empty")
    with Image.open(source if isinstance(source, Path) else BytesIO(source)) as image:
        require_few_pixels(image)
        image.load()
        image = upright(image)
        if image.mode.startswith(("I", "F")):
            image = _eight_bit(image)
        return image if image.mode == "RGB" else image.convert("RGB")


def fit(image: Image.Image, size: int | None) -> np.ndarray:
    """Convert an image to uint8 (3, H, W); with `size`, its central square is cropped and resized."""
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if side != size:
            image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def decode_square(encoded: bytes | None, size: int) -> Tensor:
    """Decode one image, crop its central square and resize it.

    Args:
        encoded: encoded bytes.
        size: side in pixels.

    Returns:
        RGB (3, size, size), float32 in [0, 1].

    Raises:
        DataError: the image cannot be decoded.
    """
    try:
        image = fit(decode(encoded), size)
    except UNDECODABLE as error:
        raise DataError(f"not a readable image: {error}") from error
    return torch.from_numpy(np.ascontiguousarray(image)).float() / 255


def upright(image: Image.Image) -> Image.Image:
    """Rotate or mirror an image according to its EXIF orientation, if present."""
    try:
        return image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
    except UNDECODABLE:
        return image  # damaged metadata does not affect the pixels


def _eight_bit(image: Image.Image) -> Image.Image:
    """Convert to 8 bits by scaling; Pillow's own conversion clips such values to 255."""
    values = np.asarray(image)
    if image.mode.startswith("F") or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ValueError(f"values of mode {image.mode} have no known range; expected 8 or 16 bits per channel")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))
