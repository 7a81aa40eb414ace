"""Image sizes as (width, height) in pixels, and SDXL's list of them."""

from collections.abc import Sequence

Size = tuple[int, int]
"""(width, height) in pixels."""
_STEP = 64
_LEAST = 8
BUCKET_SIDE = 1024
"""Side of the square whose area the published buckets have."""
SDXL_BUCKETS: tuple[Size, ...] = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896),
    (1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640),
    (1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
)  # fmt: skip
"""Sizes that SDXL was trained on (Podell et al. 2023, appendix I)."""


def buckets_of(side: int) -> tuple[Size, ...]:
    """Return SDXL's aspect ratios at an area of about `side` x `side` pixels, in multiples of at least 8.

    Args:
        side: 1024 gives the published sizes.
    """
    step = max(_LEAST, _STEP * side // BUCKET_SIDE // _LEAST * _LEAST)

    def scaled(length: int) -> int:
        return max(step, round(length * side / BUCKET_SIDE / step) * step)

    return tuple(dict.fromkeys((scaled(width), scaled(height)) for width, height in SDXL_BUCKETS))


def size_text(size: Size) -> str:
    """Format a size as `WIDTHxHEIGHT`."""
    return f"{size[0]}x{size[1]}"


def parse_size(text: str) -> Size:
    """Parse `WIDTHxHEIGHT`, or one number for a square.

    Raises:
        ValueError: the text is neither.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"expected WIDTHxHEIGHT in pixels (such as 832x1216) or one number, found {text!r}")
    return int(parts[0]), int(parts[-1])


def main_size(shares: Sequence[tuple[Size, float]]) -> Size | None:
    """Return the size with the largest share, the first of several; None without sizes."""
    return max(shares, key=lambda entry: entry[1])[0] if shares else None


def nearest_size(sizes: Sequence[Size], width: int, height: int) -> Size:
    """Return the size whose aspect ratio is closest to that of an image, by the ratio of the ratios.

    Args:
        sizes: candidates; of two equally close ones the larger wins.
        width: width of the image in pixels.
        height: height of the image in pixels.
    """

    def distance(size: Size) -> tuple[float, int]:
        ratio = size[0] * height / (size[1] * width)
        return max(ratio, 1 / ratio), -size[0] * size[1]

    return min(sizes, key=distance)
