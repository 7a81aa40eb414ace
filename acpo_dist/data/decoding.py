"""Decode one encoded image to 8-bit RGB."""

import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from acpo_dist.core.errors import DataError, shorten
from acpo_dist.core.sizes import Size

_ORIENTATION = 0x0112
_PIXELS_AT_ONCE = 16 * 1024 * 1024
"""Maximum number of pixels of stacked images: 200 MB as float32, not counting the activations of a network."""
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
    if source is None or source == b"":
        raise ValueError("it is empty")
    with Image.open(source if isinstance(source, Path) else BytesIO(source)) as image:
        require_few_pixels(image)
        image.load()
        image = upright(image)
        if image.mode.startswith(("I", "F")):
            image = _eight_bit(image)
        return image if image.mode == "RGB" else image.convert("RGB")


def decode_named(source: Path | bytes | Callable[[], Path | bytes | None] | None, name: str) -> Tensor:
    """Decode an image as in `decode`.

    Args:
        source: as in `decode`, or a function that returns it and raises one of `UNDECODABLE`.
        name: name of the image in the message.

    Returns:
        uint8 RGB (3, H, W).

    Raises:
        DataError: the image cannot be decoded.
    """
    try:
        pixels = np.asarray(decode(source() if callable(source) else source))
    except UNDECODABLE as error:
        raise DataError(f"{name} cannot be read as an image: {shorten(str(error), 300)}") from error
    # The copy is required because Pillow's buffer is read-only.
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def require_image(path: Path) -> None:
    """Check by its header that a file is an image, without decoding its pixels.

    Raises:
        DataError: it is none, or has too many pixels.
    """
    try:
        with Image.open(path) as image:
            require_few_pixels(image)
    except UNDECODABLE as error:
        raise DataError(f"{path} cannot be read as an image: {shorten(str(error), 300)}") from error


def encode_png(image: Tensor) -> bytes:
    """Encode a uint8 RGB image (3, H, W) as PNG; equal images give equal bytes."""
    buffer = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def at_once(image: Tensor, most: int) -> int:
    """Return the number of images of this size, (3, H, W), to stack: `most`, or fewer if memory is short."""
    return max(1, min(most, _PIXELS_AT_ONCE // (image.shape[1] * image.shape[2])))


def fit(image: Image.Image, size: int | Size | None) -> np.ndarray:
    """Convert an image to uint8 (3, H, W).

    Args:
        image: the image.
        size: (width, height), or the side of a square: the largest central part of this aspect ratio is cropped and
            resized to it. None keeps the image.
    """
    wanted = (size, size) if isinstance(size, int) else size
    if wanted is not None and image.size != wanted:
        image = image.crop(central_box(image.size, wanted))
        if image.size != wanted:
            image = image.resize(wanted, Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def central_box(size: Size, wanted: Size) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the largest central part of an image with the aspect ratio of `wanted`.

    Args:
        size: (width, height) of the image.
        wanted: (width, height) of which the ratio counts.
    """
    width = min(size[0], max(1, round(size[1] * wanted[0] / wanted[1])))
    height = min(size[1], max(1, round(size[0] * wanted[1] / wanted[0])))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def decode_fitted(encoded: bytes | None, size: int | Size) -> Tensor:
    """Decode one image, crop and resize it as in `fit`.

    Args:
        encoded: encoded bytes.
        size: (width, height), or the side of a square.

    Returns:
        RGB (3, height, width), float32 in [0, 1].

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
