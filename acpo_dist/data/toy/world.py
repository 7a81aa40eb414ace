"""The toy world: captioned scenes from a finite, enumerable set of clean templates.

Every scene is one shape in one colour on one background at one of nine places in one of two sizes: 864 templates of
32 x 32 RGB pixels. The caption names shape, colour and background (48 captions of 18 templates each). Place and size
are free, so the oracle detects a model that collapses and loses them.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.90, 0.12, 0.14),
    "green": (0.10, 0.70, 0.22),
    "blue": (0.12, 0.28, 0.92),
    "yellow": (0.98, 0.82, 0.08),
}
BACKGROUNDS = {"white": (0.97, 0.97, 0.97), "gray": (0.50, 0.50, 0.52), "black": (0.04, 0.04, 0.05)}
CENTRES = (9.0, 16.0, 23.0)
RADII = (5.0, 8.0)
_SUPERSAMPLING = 8


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One clean template: its content and its place."""

    shape: str
    colour: str
    background: str
    row: int
    column: int
    size: int

    @property
    def caption(self) -> str:
        """Caption used as prompt; it leaves place and size open."""
        return caption_of(self.shape, self.colour, self.background)


def caption_of(shape: str, colour: str, background: str) -> str:
    """Return the caption for a shape, a colour and a background."""
    return f"a {colour} {shape} on a {background} background"


@functools.cache
def scenes() -> tuple[Scene, ...]:
    """Return all 864 scenes in a fixed order; the index is the template id."""
    grid = itertools.product(SHAPES, COLOURS, BACKGROUNDS, range(3), range(3), range(2))
    return tuple(
        Scene(shape=shape, colour=colour, background=background, row=row, column=column, size=size)
        for shape, colour, background, row, column, size in grid
    )


@functools.cache
def captions() -> tuple[str, ...]:
    """Return the 48 captions in a fixed order."""
    return tuple(caption_of(*words) for words in itertools.product(SHAPES, COLOURS, BACKGROUNDS))


@functools.cache
def caption_index() -> Tensor:
    """Return the caption id of every template, int64 (864,)."""
    position = {caption: index for index, caption in enumerate(captions())}
    return torch.tensor([position[scene.caption] for scene in scenes()])


@functools.cache
def templates() -> Tensor:
    """Return the clean images of all scenes, anti-aliased: float32 RGB in [0, 1], (864, 3, 32, 32)."""
    return torch.stack([_render(scene) for scene in scenes()])


def _coverage(shape: str, down: Tensor, right: Tensor, radius: float) -> Tensor:
    """Return which points (relative to the centre, in pixels) lie inside the shape."""
    if shape == "circle":
        return down.square() + right.square() <= radius**2
    if shape == "square":
        half = 0.88 * radius
        return (down.abs() <= half) & (right.abs() <= half)
    if shape == "triangle":
        # Apex at the top, base at the bottom; the half width grows linearly from the apex.
        return (down <= 0.85 * radius) & (down >= -radius) & (right.abs() <= (down + radius) * 0.56)
    if shape == "cross":
        arm, length = 0.32 * radius, radius
        return ((down.abs() <= arm) & (right.abs() <= length)) | ((right.abs() <= arm) & (down.abs() <= length))
    raise ValueError(f"unknown shape {shape!r}; the world knows {', '.join(SHAPES)}")


def _render(scene: Scene) -> Tensor:
    fine = torch.arange(IMAGE_SIZE * _SUPERSAMPLING, dtype=torch.float32)
    pixel = (fine + 0.5) / _SUPERSAMPLING
    down = (pixel - CENTRES[scene.row])[:, None].expand(-1, pixel.numel())
    right = (pixel - CENTRES[scene.column])[None, :].expand(pixel.numel(), -1)
    inside = _coverage(scene.shape, down, right, RADII[scene.size]).float()
    alpha = torch.nn.functional.avg_pool2d(inside[None, None], _SUPERSAMPLING)[0]
    foreground = torch.tensor(COLOURS[scene.colour])[:, None, None]
    background = torch.tensor(BACKGROUNDS[scene.background])[:, None, None]
    return alpha * foreground + (1 - alpha) * background
