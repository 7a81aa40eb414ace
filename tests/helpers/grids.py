"""Comparison of the image grids of two runs."""

from pathlib import Path

import numpy as np
from PIL import Image


def require_same_grids(*roots: Path) -> None:
    """Compare the grids of two runs of one iteration."""
    first, second = (np.asarray(Image.open(root / "samples/000001.png"), dtype=int) for root in roots)
    # They come after one update, whose float32 sums run in another order: at most a grey level or two apart.
    assert abs(first - second).max() <= 2
