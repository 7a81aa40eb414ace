"""Damaged windows of images at native resolution, for training the quality network of a run."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from acpo_dist.data.images import load_images, read_images
from acpo_dist.data.toy.damage import Damage, spoil
from acpo_dist.rewards.training.iqa import LabelledBatch
from acpo_dist.rewards.two_stream import PATCH

logger = logging.getLogger(__name__)

_MARGIN = 8
"""Pixels around a window that are damaged with it and then cropped, because damage differs at borders."""
_MOST_BYTES = 2 * 2**30
"""Memory limit of decoded images, in bytes; further images of a larger set are not used."""


def native_images(path: Path, column: str, most: int | None = None) -> Sequence[Tensor]:
    """Load images of at least one window's size without resizing or cropping them.

    If the first image is smaller than a window, the whole set is resized to the window's size; otherwise smaller images
    are skipped.

    Args:
        path: folder, parquet file or archive.
        column: image column of parquet files.
        most: maximum number of images; None uses all.

    Returns:
        uint8 RGB, each (3, H, W) with H and W of at least 32.
    """
    first = next(iter(read_images([path], column=column)))[1]
    if min(first.shape[1:]) < PATCH or tuple(first.shape[1:]) == (PATCH, PATCH):
        return list(load_images(path, column, most, PATCH).tensor)
    images: list[Tensor] = []
    small = used = 0
    for number, (_, image) in enumerate(read_images([path], column=column)):
        if used > _MOST_BYTES or (most is not None and number >= most):
            logger.info("%s: training on the first %d images", path, len(images))
            break
        if min(image.shape[1:]) < PATCH:
            small += 1
            continue
        images.append(image)
        used += image.numel()
    if small:
        logger.warning("%s: %d images below %d x %d pixels left out", path, small, PATCH, PATCH)
    return images


def damaged_windows(images: Sequence[Tensor], family: dict[str, Damage], low: int, high: int) -> LabelledBatch:
    """Return a source of damaged random 32 x 32 windows with their severities.

    Args:
        images: uint8 RGB, each (3, H, W).
        family: kinds of damage by name.
        low: first row to draw from.
        high: row after the last one.
    """
    smallest = min(min(images[row].shape[1:]) for row in range(low, high))
    whole = all(tuple(images[row].shape[1:]) == (PATCH, PATCH) for row in range(low, high))
    margin = _MARGIN if smallest >= PATCH + 2 * _MARGIN else 0

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(low, high, (count,), generator=generator).tolist()
        if whole:
            return spoil(torch.stack([images[row] for row in rows]).float() / 255, family, generator)
        places = torch.rand(count, 2, generator=generator).tolist()
        side = PATCH + 2 * margin
        windows = [_window(images[row], side, *place) for row, place in zip(rows, places, strict=True)]
        spoiled, severity = spoil(torch.stack(windows).float() / 255, family, generator)
        return spoiled[..., margin : margin + PATCH, margin : margin + PATCH], severity

    return draw


def _window(image: Tensor, side: int, down: float, right: float) -> Tensor:
    top, left = (
        int(place * (length - side + 1)) for place, length in ((down, image.shape[1]), (right, image.shape[2]))
    )
    return image[:, top : top + side, left : left + side]
