"""Files of a measurement: one JSON with table, trajectory and validation, a plot, and the published text formats."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from acpo_dist.core.errors import ConfigError, VrgError
from acpo_dist.diffusion.trajectory import Trajectory
from acpo_dist.tracking.jsonl import replace_file
from acpo_dist.tracking.plots import save_trajectory_plot
from acpo_dist.training.trajectory.validate import Update
from acpo_dist.vrg.formats import read_error_table, read_result, read_trajectory
from acpo_dist.vrg.levels import to_sigmas
from acpo_dist.vrg.optimize import optimize
from acpo_dist.vrg.table import ErrorTable
from acpo_dist.vrg.timesteps import to_integer_timesteps, to_timesteps

LINEAR_DDPM = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
"""The schedule of the published tables and trajectories."""
TIMESTEP_TOLERANCE = 0.5
"""Between a file's timesteps and those that the model's schedule has at the file's levels. An optimised noisy end is
clipped to the schedule, and real timesteps are interpolated: both stay far below it."""


def artefact_of(update: Update, before: Trajectory, alpha_bars: ArrayLike) -> dict[str, Any]:
    """Plain data of one measurement."""
    return {
        "table": table_to_mapping(update.table),
        "before": trajectory_to_mapping(before, alpha_bars),
        "trajectory": trajectory_to_mapping(update.trajectory, alpha_bars),
        "adopted": update.adopted,
        "j0": update.j0,
        "j1": update.j1,
        "saturation": update.saturation,
        "gates": [vars(gate) for gate in update.gates],
        "diagnostics": {name: _finite(values) for name, values in update.diagnostics.items()},
    }


def write_artefact(
    path: Path, artefact: Mapping[str, Any], table: ErrorTable, trajectories: Mapping[str, Trajectory]
) -> Path:
    """Write the JSON and, beside it, the plot; returns the plot's path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(artefact, indent=2, allow_nan=False) + "\n").encode())
    plot = path.with_suffix(".png")
    save_trajectory_plot(plot, table, trajectories)
    return plot


def read_artefact(path: Path) -> dict[str, Any]:
    """An artefact as written.

    Raises:
        VrgError: missing, no JSON, or no artefact.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise VrgError(f"{path} cannot be read as a VRG artefact: {error}") from error
    if not isinstance(data, dict) or "trajectory" not in data:
        raise VrgError(f"{path} is no VRG artefact: it has no `trajectory`. `acpo vrg measure` writes one.")
    return data


def newest_artefact(path: Path) -> Path:
    """The file itself, or the newest artefact of a run folder.

    Raises:
        VrgError: the run has none.
    """
    if not path.is_dir():
        return path
    found = sorted((path / "vrg").glob("*.json"))
    if not found:
        raise VrgError(f"{path} holds no VRG artefact: the run was not started with vrg.enabled=true.")
    return found[-1]


def read_schedule(path: Path, alpha_bars: ArrayLike) -> Trajectory:
    """A trajectory from an artefact, from a run, or from the published text format.

    Raises:
        VrgError: unreadable, levels outside the model's noise schedule, or timesteps of another schedule.
    """
    path = newest_artefact(path)
    if path.suffix == ".json":
        found = trajectory_from_mapping(read_artefact(path)["trajectory"])
        # Refuses levels that this model's schedule does not have.
        wanted = to_timesteps(to_sigmas(found.alpha_bars[:-1]), alpha_bars)
        _require_timesteps(path, found, wanted)
        return found
    levels = _text_levels(path)
    timesteps = to_timesteps(to_sigmas(levels), alpha_bars)
    return Trajectory(timesteps=tuple(map(float, timesteps)), alpha_bars=(*map(float, levels), 1.0))


def configured_trajectory(path: Path | None, num_steps: int, alpha_bars: ArrayLike) -> Trajectory | None:
    """The trajectory of `sampler.trajectory`, or None where that is unset.

    Raises:
        VrgError: see `read_schedule`.
        ConfigError: it has another number of steps than `sampler.num_steps`.
    """
    if path is None:
        return None
    found = read_schedule(path, alpha_bars)
    if found.num_steps != num_steps:
        raise ConfigError(
            f"sampler.trajectory ({path}) has {found.num_steps} steps, but sampler.num_steps is {num_steps}: set "
            f"sampler.num_steps={found.num_steps}."
        )
    return found


def read_table(path: Path) -> ErrorTable:
    """An error table from an artefact, from a run, or from the published text format.

    Raises:
        VrgError: unreadable, or not a table.
    """
    path = newest_artefact(path)
    if path.suffix == ".json":
        artefact = read_artefact(path)
        if "table" not in artefact:
            raise VrgError(f"{path} holds a trajectory, but no error table. `acpo vrg measure` writes one.")
        return table_from_mapping(artefact["table"])
    return read_error_table(path)


def optimise_files(
    table_path: Path, trajectory_path: Path, **options: Any
) -> tuple[dict[str, Any], tuple[ErrorTable, dict[str, Trajectory]]]:
    """Optimise a trajectory file on a table file.

    Timesteps are those of the linear DDPM schedule for text files, and of the artefact's own levels otherwise.

    Returns:
        (report, what `write_artefact` needs besides it).

    Raises:
        VrgError: a file is unreadable, or table, trajectory and noise schedule do not belong together.
    """
    table = read_table(table_path)
    schedule = _schedule_of(table, newest_artefact(table_path))
    table.check_against(schedule)
    before = read_schedule(trajectory_path, schedule)
    if options.get("mode") == "log_trust":
        # The published mode has no such bound; its result is for comparison.
        options = {"sigma_min": float(to_sigmas(schedule[0])), **options}
    found = optimize(to_sigmas(before.alpha_bars[:-1]), table, **options)
    inside = np.clip(found.sigmas, to_sigmas(schedule[0]), to_sigmas(schedule[-1]))
    timesteps = to_timesteps(inside, schedule)
    # The trust region fixes the noisy end: keep its bits instead of a round trip through sigma.
    levels = list(found.alpha_bars)
    if found.mode == "log_trust":
        levels[0] = before.alpha_bars[0]
    after = Trajectory(timesteps=tuple(map(float, timesteps)), alpha_bars=(*levels, before.alpha_bars[-1]))
    report = {
        "mode": found.mode, "settings": dict(found.settings), "j0": found.j0, "j1": found.j1, "gain": found.gain,
        "alpha_bars": levels, "sigmas": list(found.sigmas), "timesteps": list(after.timesteps),
        "integer_timesteps": list(to_integer_timesteps(inside, schedule)), "saturation": found.saturation,
        "cpu_seconds": found.cpu_seconds, "table": table_to_mapping(table),
        "before": trajectory_to_mapping(before, schedule), "trajectory": trajectory_to_mapping(after, schedule),
    }  # fmt: skip
    return report, (table, {"before": before, "optimised": after})


def table_to_mapping(table: ErrorTable) -> dict[str, Any]:
    """Plain data; floats survive JSON exactly."""
    errors = table.standard_errors
    return {
        "sigmas": table.sigmas.tolist(), "v": table.v.tolist(), "hash": table.hash,
        "standard_errors": None if errors is None else errors.tolist(), "provenance": dict(table.provenance),
    }  # fmt: skip


def table_from_mapping(data: Mapping[str, Any]) -> ErrorTable:
    """The inverse.

    Raises:
        VrgError: keys are missing, or the values are no table.
    """
    try:
        errors = data["standard_errors"]
        table = ErrorTable(
            sigmas=np.asarray(data["sigmas"], dtype=np.float64), v=np.asarray(data["v"], dtype=np.float64),
            standard_errors=None if errors is None else np.asarray(errors, dtype=np.float64),
            provenance=data.get("provenance", {}),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise VrgError(f"not an error table: {error}") from error
    if data.get("hash", table.hash) != table.hash:
        raise VrgError(f"the error table was changed after it was written: hash {table.hash}, written {data['hash']}.")
    return table


def trajectory_to_mapping(trajectory: Trajectory, alpha_bars: ArrayLike) -> dict[str, Any]:
    """Plain data: real timesteps and levels, and the integer timesteps for schedulers that take no others."""
    inside = np.clip(to_sigmas(trajectory.alpha_bars[:-1]), *to_sigmas(np.asarray(alpha_bars)[[0, -1]]))
    return {
        "schedule_id": trajectory.schedule_id,
        "timesteps": list(trajectory.timesteps),
        "alpha_bars": list(trajectory.alpha_bars),
        "integer_timesteps": list(to_integer_timesteps(inside, alpha_bars)),
    }


def trajectory_from_mapping(data: Mapping[str, Any]) -> Trajectory:
    """The inverse.

    Raises:
        VrgError: keys are missing, or the levels are no trajectory.
    """
    try:
        return Trajectory(timesteps=tuple(data["timesteps"]), alpha_bars=tuple(data["alpha_bars"]))
    except (KeyError, TypeError, ValueError) as error:
        raise VrgError(f"not a trajectory: {error}") from error


def _text_levels(path: Path) -> tuple[float, ...]:
    """Levels of an original, which lists t = 0 first, or of an optimised file, whose rows have further columns."""
    try:
        optimised = ";" in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VrgError(f"{path} cannot be read: {error}") from error
    return read_result(path) if optimised else read_trajectory(path).alpha_bars


def _schedule_of(table: ErrorTable, path: Path) -> np.ndarray:
    """Levels by timestep that the table was measured on: an artefact says so, the published tables do not."""
    own = table.provenance.get("alpha_bars")
    if own is not None:
        return np.asarray(own, dtype=np.float64)
    if path.suffix == ".json":
        raise VrgError(
            f"{path} does not say on which noise schedule its table was measured (table.provenance.alpha_bars), so "
            "timesteps cannot be worked out. Measure it again with `acpo vrg measure`."
        )
    return LINEAR_DDPM


def _require_timesteps(path: Path, found: Trajectory, wanted: np.ndarray) -> None:
    distance = np.abs(np.asarray(found.timesteps) - wanted)
    if distance.max() > TIMESTEP_TOLERANCE:
        step = int(distance.argmax())
        raise VrgError(
            f"{path} is of another noise schedule: step {step} has timestep {found.timesteps[step]:g} at alpha_bar "
            f"{found.alpha_bars[step]:.6g}, where this model has timestep {wanted[step]:.1f}. Measure a trajectory "
            "for this model with `acpo vrg measure`."
        )


def _finite(values: list[float]) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values]
