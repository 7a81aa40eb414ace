"""Histograms of scores, as text for a terminal and as an image."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

_BARS = " ▏▎▍▌▋▊▉█"
_WIDTH = 40


def text_histogram(values: Sequence[float], *, bins: int = 12) -> list[str]:
    """Return lines `from .. to  bar  count`, lowest values first.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    counts, edges = _histogram(values, bins)
    # Use enough digits to distinguish neighbouring edges.
    step = float(edges[1] - edges[0])
    digits = max(0, 1 - math.floor(math.log10(step)))
    labels = [f"{edge:.{digits}f}" for edge in edges]
    width = max(map(len, labels))
    return [
        f"{labels[row]:>{width}} .. {labels[row + 1]:>{width}}  {_bar(count / max(counts))} {count}"
        for row, count in enumerate(counts)
    ]


def save_histogram(values_by_name: Mapping[str, Sequence[float]], path: Path, *, bins: int = 30) -> None:
    """Draw one panel per name with its mean marked; the suffix of the path selects the format.

    Raises:
        ValueError: no values, a value that is not finite, or an unknown suffix.
        OSError: the file cannot be written.
    """
    # Imported here: matplotlib takes a second to load. pyplot is avoided: its figures and backend are process-wide.
    from matplotlib.figure import Figure

    if not values_by_name:
        raise ValueError("a histogram needs at least one row of values")
    figure = Figure(figsize=(6.4, 2.6 * len(values_by_name)), dpi=120, layout="constrained")
    axes = figure.subplots(len(values_by_name), 1, squeeze=False).flatten()
    for axis, (name, values) in zip(axes, values_by_name.items(), strict=True):
        counts, edges = _histogram(values, bins)
        axis.stairs(counts, edges, fill=True, alpha=0.8)
        mean = sum(values) / len(values)
        axis.axvline(mean, color="black", linewidth=1, linestyle="--", label=f"mean {mean:.4g}")
        axis.set(title=f"{name}, {len(values)} images", xlabel="score", ylabel="images")
        axis.legend(fontsize=9)
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _histogram(values: Sequence[float], bins: int) -> tuple[list[int], np.ndarray]:
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"a histogram needs finite values, found {len(values)} values, not all of them finite")
    counts, edges = np.histogram(values, bins=bins)
    return counts.tolist(), edges


def _bar(share: float) -> str:
    eighths = round(share * _WIDTH * 8)
    if share > 0:
        eighths = max(1, eighths)
    return ("█" * (eighths // 8) + _BARS[eighths % 8].strip()).ljust(_WIDTH)
