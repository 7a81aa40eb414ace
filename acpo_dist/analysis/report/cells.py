"""Figures as the cells of tables, the same on a terminal and in HTML."""

from acpo_dist.analysis.report.compare import SeedGroup, Spread
from acpo_dist.analysis.report.html import duration, short, signed
from acpo_dist.analysis.report.metrics import RunMetrics
from acpo_dist.analysis.report.record import ROLES

COLUMNS = ("run", "seed", "state", "iterations", "quality", "rewards", "judges", "drift", "diversity", "guard", "time")
LIST_COLUMNS = ("run", "seed", "state", "done", "reward", "judge", "drift", "guard", "time", "path")
SEED_COLUMNS = ("runs", "seeds", "left out", "quality", "drift", "gains", "time")


def run_cells(metrics: RunMetrics) -> list[str]:
    """One row of a table of runs, by `COLUMNS`."""
    total = f"/{metrics.total}" if metrics.total is not None else ""
    by_role = {
        role: ", ".join(
            f"{name} {signed(value)}"
            for name, value in metrics.gains.items()
            if metrics.roles.get(name, "judge") == role
        )
        for role in ROLES
    }
    budget = f" of {short(metrics.budget)}" if metrics.budget is not None else ""
    diversity = "-" if metrics.diversity is None else f"{metrics.diversity:.0%}"
    return [
        metrics.name, str(metrics.seed), metrics.state, f"{metrics.iterations}{total}", signed(metrics.quality),
        by_role["reward"] or "-", by_role["judge"] or "-", short(metrics.drift) + budget, diversity,
        metrics.guard.state, duration(metrics.seconds),
    ]  # fmt: skip


def list_cells(metrics: RunMetrics) -> list[str]:
    """One row of the narrower list of runs, by `LIST_COLUMNS`."""
    total = f"/{metrics.total}" if metrics.total is not None else ""
    return [
        metrics.name, str(metrics.seed), metrics.state, f"{metrics.iterations}{total}",
        signed(metrics.mean_gain("reward")), signed(metrics.mean_gain("judge")), short(metrics.drift),
        metrics.guard.state, duration(metrics.seconds), metrics.path or f"mlflow:{metrics.mlflow_run_id}",
    ]  # fmt: skip


def seed_cells(group: SeedGroup) -> list[str]:
    """One row of `seed_table`."""
    gains = ", ".join(f"{name} {_spread(spread)}" for name, spread in group.gains.items())
    seconds = "-" if group.seconds is None else duration(group.seconds.mean)
    seeds = ", ".join(map(str, group.seeds)) or "-"
    quality, drift = _spread(group.quality), _spread(group.drift, plus=False)
    return [group.label, seeds, group.left_out or "-", quality, drift, gains or "-", seconds]


def _spread(spread: Spread | None, *, plus: bool = True) -> str:
    if spread is None:
        return "-"
    mean = signed(spread.mean) if plus else short(spread.mean)
    return mean if spread.std is None else f"{mean} ± {spread.std:.2g}"
