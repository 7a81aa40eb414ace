"""Quality against drift of several runs as one image file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acpo_dist.analysis.report.compare import SeedGroup, pareto_front
from acpo_dist.analysis.report.metrics import RunMetrics

_MARKERS = ("o", "s", "^", "D", "P", "X", "v", "*")
# Colour-blind safe (Okabe and Ito), without its yellow, which white paper swallows.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")


def save_pareto(path: Path, metrics: Sequence[RunMetrics], groups: Sequence[SeedGroup]) -> int:
    """Draw it; runs of one group share colour and marker, their mean carries error bars over seeds.

    Returns:
        How many runs had both figures.

    Raises:
        OSError: the file cannot be written.
    """
    # Imported here: matplotlib takes a second to load, and no pyplot: its figures and backend are process-wide.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), dpi=130, layout="constrained")
    axis = figure.subplots()
    known: dict[int, tuple[float, float]] = {}
    for place, group in enumerate(groups):
        style: dict[str, Any] = {
            "color": _COLOURS[place % len(_COLOURS)],
            "marker": _MARKERS[place % len(_MARKERS)],
            "linestyle": "none",
        }
        label = group.label
        for index in group.members:
            each = metrics[index]
            if each.drift is not None and each.quality is not None:
                known[index] = (each.drift, each.quality)
                axis.plot(*known[index], markersize=5 if len(group.members) > 1 else 9, label=label, **style)
                label = "_nolegend_"
        if len(group.counted) > 1 and group.drift is not None and group.quality is not None:
            errors: dict[str, Any] = {"xerr": group.drift.std, "yerr": group.quality.std}
            name = f"{group.label}, mean ± std of {len(group.counted)} seeds"
            axis.errorbar(
                group.drift.mean, group.quality.mean, capsize=3, markersize=11, alpha=0.7, label=name, **errors, **style
            )
    order = list(known)
    front = sorted(known[order[place]] for place in pareto_front([known[index] for index in order]))
    if len(front) > 1:
        axis.plot(
            [drift for drift, _ in front],
            [quality for _, quality in front],
            color="0.45",
            linewidth=1,
            linestyle="--",
            label="beaten by none",
            zorder=0,
        )
    for budget in sorted({each.budget for each in metrics if each.budget is not None}):
        axis.axvline(budget, color="0.3", linewidth=1, linestyle=":", label=f"budget {budget:.3g}")
    axis.axhline(0, color="0.7", linewidth=1, zorder=0)
    judged = all(each.mean_gain("judge") is not None for each in metrics)
    axis.set(
        xlabel="rms drift from the base model", title="quality against drift",
        ylabel=f"mean gain of the {'judges' if judged else 'rewards'}, base standard deviations",
    )  # fmt: skip
    axis.grid(alpha=0.3)
    if known:
        axis.legend(fontsize=8)
    else:
        axis.text(0.5, 0.5, "no run has both figures", ha="center", va="center", transform=axis.transAxes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return len(known)
