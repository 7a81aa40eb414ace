"""Files of a measurement: a JSON artefact (table, trajectory, validation), a plot, and the published text formats."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from acpo_dist.core.errors import ConfigError, VrgError
from acpo_dist.core.files import replace_file
from acpo_dist.core.json_text import read_object
from acpo_dist.diffusion.trajectory import Trajectory
from acpo_dist.tracking.plots import save_trajectory_plot
from acpo_dist.training.trajectory.validate import Update
from acpo_dist.vrg.formats import read_error_table, read_result, read_trajectory
from acpo_dist.vrg.levels import to_sigmas
from acpo_dist.vrg.optimize import optimize
from acpo_dist.vrg.table import ErrorTable
from acpo_dist.vrg.timesteps import to_integer_timesteps, to_timesteps

LINEAR_DDPM = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
"""alpha_bar by timestep of the noise schedule of the published tables and trajectories."""
TIMESTEP_TOLERANCE = 0.5
"""Maximum difference between a file's timesteps and the timesteps of the model's schedule at the file's levels. The
differences caused by clipping an optimised noisy end and by interpolation are far smaller."""


def artefact_of(update: Update, before: Trajectory, alpha_bars: ArrayLike) -> dict[str, Any]:
    """Convert a measurement to JSON values.

    Args:
        update: the measurement and its outcome.
        before: the trajectory before the measurement.
        alpha_bars: the model's alpha_bar by timestep, shape (T,).
    """
    return {
        "table": table_to_mapping(update.table),
        "before": trajectory_to_mapping(before, alpha_bars),
        "trajectory": trajectory_to_mapping(update.trajectory, alpha_bars),
        "adopted": update.adopted,
        "j0": update.j0,
        "j1": update.j1,
        "saturation": update.saturation,
        "gates": [vars(gate) for gate in update.gates],
        "gate": None if update.gate is None else vars(update.gate),
        "diagnostics": {name: _finite(values) for name, values in update.diagnostics.items()},
    }


def write_artefact(
    path: Path, artefact: Mapping[str, Any], table: ErrorTable, trajectories: Mapping[str, Trajectory]
) -> Path:
    """Write an artefact and a plot of the error table and the trajectories.

    Args:
        path: the JSON file; the plot has the same name with the suffix `.png`.
        artefact: JSON values.
        table: the error table of the plot.
        trajectories: the trajectories of the plot, by label.

    Returns:
        Path of the plot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(artefact, indent=2, allow_nan=False) + "\n").encode())
    plot = path.with_suffix(".png")
    save_trajectory_plot(plot, table, trajectories)
    return plot


def read_artefact(path: Path) -> dict[str, Any]:
    """Read an artefact.

    Raises:
        VrgError: the file is missing, is not JSON, or is not an artefact.
    """
    data = read_object(path, VrgError)
    if "trajectory" not in data:
        raise VrgError(f"{path} is no VRG artefact: it has no `trajectory`. `acpo vrg measure` writes one.")
    return data


def newest_artefact(path: Path) -> Path:
    """Return a file unchanged, or the newest artefact of a run folder.

    Raises:
        VrgError: the run has no artefact.
    """
    if not path.is_dir():
        return path
    found = sorted((path / "vrg").glob("*.json"))
    if not found:
        raise VrgError(
            f"expected a file or a run with VRG artefacts at {path}, found a folder without vrg/*.json: "
            "either no run, or one without vrg.enabled=true."
        )
    return found[-1]


def read_schedule(path: Path, alpha_bars: ArrayLike) -> Trajectory:
    """Read a trajectory from an artefact, a run folder, or a file in the published text format.

    Args:
        path: file or run folder.
        alpha_bars: the model's alpha_bar by timestep, shape (T,).

    Returns:
        The trajectory.

    Raises:
        VrgError: the file cannot be read, a level is outside the model's noise schedule, or the timesteps belong to
            another schedule.
    """
    path = newest_artefact(path)
    if path.suffix == ".json":
        found = trajectory_from_mapping(read_artefact(path)["trajectory"])
        # Raises if a level is outside the model's schedule.
        wanted = to_timesteps(to_sigmas(found.alpha_bars[:-1]), alpha_bars)
        _require_timesteps(path, found, wanted)
        return found
    levels = _text_levels(path)
    timesteps = to_timesteps(to_sigmas(levels), alpha_bars)
    return Trajectory(timesteps=tuple(map(float, timesteps)), alpha_bars=(*map(float, levels), 1.0))


def configured_trajectory(path: Path | None, num_steps: int, alpha_bars: ArrayLike) -> Trajectory | None:
    """Read the trajectory of `sampler.trajectory`.

    Args:
        path: value of `sampler.trajectory`.
        num_steps: value of `sampler.num_steps`.
        alpha_bars: the model's alpha_bar by timestep, shape (T,).

    Returns:
        The trajectory, or None if `path` is None.

    Raises:
        VrgError: see `read_schedule`.
        ConfigError: the number of steps differs from `sampler.num_steps`.
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
    """Read an error table from an artefact, a run folder, or a file in the published text format.

    Raises:
        VrgError: the file cannot be read or holds no table.
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
    """Optimise the trajectory of a file with the error table of a file.

    Timesteps refer to the noise schedule stored in the artefact, or to the linear DDPM schedule for text files.

    Args:
        table_path: file or run folder of the error table.
        trajectory_path: file or run folder of the trajectory.
        options: arguments of `optimize`.

    Returns:
        (report as JSON values, (table, trajectories by label) for `write_artefact`).

    Raises:
        VrgError: a file cannot be read, or table, trajectory and noise schedule do not match.
    """
    table = read_table(table_path)
    schedule = _schedule_of(table, newest_artefact(table_path))
    table.check_against(schedule)
    before = read_schedule(trajectory_path, schedule)
    if options.get("mode") != "paper_box":
        # The published mode has no lower limit of sigma.
        options = {"sigma_min": float(to_sigmas(schedule[0])), "schedule": schedule, **options}
    found = optimize(to_sigmas(before.alpha_bars[:-1]), table, **options)
    inside = np.clip(found.sigmas, to_sigmas(schedule[0]), to_sigmas(schedule[-1]))
    timesteps = to_timesteps(inside, schedule)
    # Only `paper_box` moves the noisy end: keep its exact value instead of converting it to sigma and back.
    levels = list(found.alpha_bars)
    if found.mode != "paper_box":
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
    """Convert an error table to JSON values without loss of precision."""
    errors = table.standard_errors
    return {
        "sigmas": table.sigmas.tolist(), "v": table.v.tolist(), "hash": table.hash,
        "standard_errors": None if errors is None else errors.tolist(), "provenance": dict(table.provenance),
    }  # fmt: skip


def table_from_mapping(data: Mapping[str, Any]) -> ErrorTable:
    """Inverse of `table_to_mapping`.

    Raises:
        VrgError: keys are missing, the values are not a valid table, or the hash does not match.
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
    """Convert a trajectory to JSON values, including integer timesteps for schedulers that require them.

    Args:
        trajectory: the trajectory.
        alpha_bars: the model's alpha_bar by timestep, shape (T,).
    """
    inside = np.clip(to_sigmas(trajectory.alpha_bars[:-1]), *to_sigmas(np.asarray(alpha_bars)[[0, -1]]))
    return {
        "schedule_id": trajectory.schedule_id,
        "timesteps": list(trajectory.timesteps),
        "alpha_bars": list(trajectory.alpha_bars),
        "integer_timesteps": list(to_integer_timesteps(inside, alpha_bars)),
    }


def trajectory_from_mapping(data: Mapping[str, Any]) -> Trajectory:
    """Inverse of `trajectory_to_mapping`.

    Raises:
        VrgError: keys are missing, or the values are not a valid trajectory.
    """
    try:
        return Trajectory(timesteps=tuple(data["timesteps"]), alpha_bars=tuple(data["alpha_bars"]))
    except (KeyError, TypeError, ValueError) as error:
        raise VrgError(f"not a trajectory: {error}") from error


def _text_levels(path: Path) -> tuple[float, ...]:
    """Return the levels of a published trajectory file (t = 0 first) or of an optimised file (more columns)."""
    try:
        optimised = ";" in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VrgError(f"{path} cannot be read: {error}") from error
    return read_result(path) if optimised else read_trajectory(path).alpha_bars


def _schedule_of(table: ErrorTable, path: Path) -> np.ndarray:
    """Return alpha_bar by timestep of a table's schedule: stored in artefacts, `LINEAR_DDPM` for published tables."""
    own = table.provenance.get("alpha_bars")
    if own is not None:
        return np.asarray(own, dtype=np.float64)
    if path.suffix == ".json":
        raise VrgError(
            f"{path} does not contain the noise schedule of its table (table.provenance.alpha_bars), so timesteps "
            "cannot be computed. Measure it again with `acpo vrg measure`."
        )
    return LINEAR_DDPM


def _require_timesteps(path: Path, found: Trajectory, wanted: np.ndarray) -> None:
    distance = np.abs(np.asarray(found.timesteps) - wanted)
    if distance.max() > TIMESTEP_TOLERANCE:
        step = int(distance.argmax())
        raise VrgError(
            f"{path} belongs to another noise schedule: step {step} has timestep {found.timesteps[step]:g} at "
            f"alpha_bar {found.alpha_bars[step]:.6g}, where this model has timestep {wanted[step]:.1f}. Measure a "
            "trajectory for this model with `acpo vrg measure`."
        )


def _finite(values: list[float]) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values]
