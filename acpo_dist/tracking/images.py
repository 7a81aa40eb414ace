"""Image files: grids of samples and curves over iterations."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from acpo_dist.core.by_size import Mixed

GAP = 2
"""Pixels between images."""
MIN_SIDE = 64
"""Smaller images are enlarged until their shorter side has this many pixels."""
_MARGIN = 6
_INK = (32, 32, 32)
_PAPER = (255, 255, 255)


def save_grid(
    images: Mixed,
    path: Path,
    columns: int,
    *,
    scale: int | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
) -> None:
    """Write images as one PNG, row by row.

    Args:
        images: uint8, B images of C = 1 or 3 channels; images of several sizes are centred in equal cells.
        path: the PNG; its folder is created.
        columns: images per row; at most B are used.
        scale: integer factor, at least 1, of nearest-neighbour enlargement; None enlarges images below `MIN_SIDE`.
        labels: one text per row, written at its left.
        title: text above the grid.

    Raises:
        ValueError: wrong shape or dtype, no image, or labels that do not match the rows.
        OSError: the file cannot be written.
    """
    shown = _checked(images, columns)
    count, columns = len(shown), min(columns, len(shown))
    height, width = (max(image.shape[side] for image in shown) for side in (0, 1))
    rows = math.ceil(count / columns)
    if labels is not None and len(labels) != rows:
        raise ValueError(f"{count} images in {columns} columns make {rows} rows, but there are {len(labels)} labels")
    shortest = min(min(image.shape[:2]) for image in shown)
    factor = max(1, math.ceil(MIN_SIDE / shortest) if scale is None else scale)
    height, width = height * factor, width * factor

    font = ImageFont.load_default(size=14)
    left = max((_text_width(font, label) for label in labels), default=0) + 2 * _MARGIN if labels else 0
    top = _line_height(font) + 2 * _MARGIN if title else 0
    grid_width, grid_height = columns * (width + GAP) - GAP, rows * (height + GAP) - GAP
    title_width = _text_width(font, title) + 2 * _MARGIN if title else 0
    canvas = Image.new("RGB", (max(left + grid_width, title_width), top + grid_height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=font)
    for row, label in enumerate(labels or ()):
        middle = top + row * (height + GAP) + height // 2
        draw.text((_MARGIN, middle), label, fill=_INK, font=font, anchor="lm")
    for index, image_HWC in enumerate(shown):
        row, column = divmod(index, columns)
        size = image_HWC.shape[1] * factor, image_HWC.shape[0] * factor
        image = Image.fromarray(image_HWC.numpy()).resize(size, Image.Resampling.NEAREST)
        corner = left + column * (width + GAP), top + row * (height + GAP)
        canvas.paste(image, (corner[0] + (width - size[0]) // 2, corner[1] + (height - size[1]) // 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, format="PNG")


def save_curves(rows: Sequence[Mapping[str, Any]], keys_by_panel: Mapping[str, Sequence[str]], path: Path) -> None:
    """Draw metrics over iterations, one panel per entry, two panels per row.

    Args:
        rows: result of `read_metrics`; a null value leaves a gap in its curve, a missing one does not.
        keys_by_panel: metric names by the title of their panel; names without values are omitted.
        path: the PNG; its folder is created.

    Raises:
        ValueError: no panel.
        OSError: the file cannot be written.
    """
    # Imported here: matplotlib takes a second to load. pyplot is avoided: its figures and backend are process-wide.
    from matplotlib.figure import Figure

    if not keys_by_panel:
        raise ValueError("curves need at least one panel")
    across = min(2, len(keys_by_panel))
    down = math.ceil(len(keys_by_panel) / across)
    figure = Figure(figsize=(6.4 * across, 3.6 * down), dpi=120)
    # Inches; the constrained layout of matplotlib would draw every figure twice.
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=0.7 / width, right=1 - 0.2 / width, bottom=0.55 / height, top=1 - 0.4 / height, wspace=0.18, hspace=0.38
    )
    axes = figure.subplots(down, across, squeeze=False, sharex=True).flatten()
    for axis, (title, keys) in zip(axes, keys_by_panel.items(), strict=False):
        _draw_panel(axis, title, rows, keys)
    for axis in axes[len(keys_by_panel) :]:
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without pyplot, savefig uses the Agg canvas. A low compression level takes less time.
    figure.savefig(path, format="png", pil_kwargs={"compress_level": 1})


def _draw_panel(axis: Any, title: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    drawn = 0
    for key in keys:
        measured = [row for row in rows if key in row]
        values = [math.nan if row[key] is None else float(row[key]) for row in measured]
        known = sum(math.isfinite(value) for value in values)
        if known:
            # A curve of one point, or of few between gaps, would be invisible without markers.
            marker = "." if known < 50 else None
            axis.plot([row["iteration"] for row in measured], values, label=key, marker=marker, linewidth=1.6)
            drawn += 1
    # At a fixed height: to place it above the ticks, matplotlib would lay out every text twice.
    axis.set_title(title, fontsize=12, y=1.0)
    axis.set_xlabel("iteration", fontsize=10)
    # Few ticks, at whole iterations; each one costs milliseconds.
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.tick_params(labelsize=9, labelbottom=True)
    axis.grid(alpha=0.3)
    if drawn:
        axis.legend(fontsize=9)
    else:
        axis.text(0.5, 0.5, "no values", ha="center", va="center", transform=axis.transAxes)


def _checked(images: Mixed, columns: int) -> list[Tensor]:
    """Convert images to (H, W, 3) on the CPU."""
    shown: list[Tensor] = []
    for image in images:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel():
            found = f"{image.dtype} {tuple(image.shape)}"
            raise ValueError(f"a grid needs uint8 images of shape (1 or 3, H, W), found {found}")
        shown.append(image.detach().cpu().expand(3, -1, -1).permute(1, 2, 0).contiguous())
    if not shown or columns < 1:
        raise ValueError(f"a grid needs at least one image and one column, found {len(shown)} in {columns} columns")
    return shown


def _text_width(font: Any, text: str) -> int:
    return math.ceil(font.getlength(text))


def _line_height(font: Any) -> int:
    left_top_right_bottom = font.getbbox("Ag")
    return math.ceil(left_top_right_bottom[3])
