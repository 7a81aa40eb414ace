"""Plots of error tables and trajectories."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from acpo_dist.diffusion.trajectory import Trajectory
from acpo_dist.vrg.levels import to_sigmas
from acpo_dist.vrg.table import ErrorTable


def save_trajectory_plot(path: Path, table: ErrorTable, trajectories: Mapping[str, Trajectory]) -> None:
    """Plot the measured error with its standard errors, and the levels of each trajectory below it, as PNG.

    Raises:
        OSError: the file cannot be written.
    """
    # Matplotlib takes a second to import and is only needed here.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=[3, 1], layout="constrained")
    grid = np.geomspace(table.sigmas[0], table.sigmas[-1], 200)
    above.plot(grid, table.value(grid), color="C0", lw=1)
    above.errorbar(table.sigmas, table.v, yerr=table.standard_errors, fmt="o", ms=3, color="C0", capsize=2)
    above.set(xscale="log", yscale="log", ylabel="v = E e² per element", title="prediction error and trajectory")
    for row, (name, trajectory) in enumerate(trajectories.items()):
        # Pure noise, a flow model's first level, lies at infinity.
        sigmas = to_sigmas([level for level in trajectory.alpha_bars[:-1] if level > 0])
        below.plot(sigmas, np.full(len(sigmas), -row), "|", ms=14, color=f"C{row + 1}", label=name)
    below.set(yticks=[], xlabel="sigma = sqrt(1 / alpha_bar - 1)", ylim=(-len(trajectories) + 0.4, 0.6))
    below.legend(loc="center right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
