"""Manage the trajectory of a run: configured trajectory, validation at the start, and updates after table drift."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from acpo_dist.config.schema import Config
from acpo_dist.core.ports import RolloutPool, Tracker
from acpo_dist.diffusion.trajectory import Trajectory
from acpo_dist.tracking.console import Console
from acpo_dist.training.run_folder import RunFolder
from acpo_dist.training.trajectory.artefact import (
    artefact_of,
    configured_trajectory,
    table_from_mapping,
    table_to_mapping,
    trajectory_from_mapping,
    trajectory_to_mapping,
    write_artefact,
)
from acpo_dist.training.trajectory.measure import measure, table_drift
from acpo_dist.training.trajectory.validate import Update, consider, describe, set_trajectory
from acpo_dist.vrg.levels import FloatArray

logger = logging.getLogger(__name__)


class TrajectoryManager:
    """Changes the trajectory of a run before the first iteration and between iterations."""

    def __init__(
        self, config: Config, pool: RolloutPool, folder: RunFolder, tracker: Tracker, prompts: Sequence[str],
        console: Console,
    ) -> None:  # fmt: skip
        """Store the components of the run. Call `start` or `restore` before `after`.

        Args:
            config: the run's configuration.
            pool: the rollout workers.
            folder: the run folder.
            tracker: receives plots and tags.
            prompts: the run's prompts.
            console: receives messages.
        """
        self._config, self._pool, self._folder, self._tracker = config, pool, folder, tracker
        self._prompts, self._console = prompts, console
        self._alpha_bars = pool.alpha_bars().numpy()
        self._base = pool.trajectory()
        self._table = None

    def start(self) -> dict[str, float]:
        """Set the configured trajectory; with `vrg.enabled`, measure, optimise and validate a better one.

        Returns:
            Metrics of the first iteration, empty if `vrg.enabled` is false.
        """
        self._base = self._configured()
        set_trajectory(self._pool, self._base)
        if (note := few_late_states(self._base, self._config, self._alpha_bars)) is not None:
            self._console.message(f"warning: {note}")
        return self._update(0) if self._config.vrg.enabled else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the trajectory of a checkpoint. The file of `sampler.trajectory` is not read.

        Args:
            state: result of `to_mapping`.
        """
        base = state.get("base_trajectory")
        # Older checkpoints lack the key: read the configured file.
        self._base = trajectory_from_mapping(base) if base else self._configured()
        self._table = table_from_mapping(state["table"]) if state["table"] else None
        set_trajectory(self._pool, trajectory_from_mapping(state["trajectory"]))

    def to_mapping(self) -> dict[str, Any]:
        """Convert the state to JSON values for a checkpoint, without loss of precision."""
        return {
            "trajectory": trajectory_to_mapping(self._pool.trajectory(), self._alpha_bars),
            "base_trajectory": trajectory_to_mapping(self._base, self._alpha_bars),
            "table": table_to_mapping(self._table) if self._table else None,
        }

    def after(self, iteration: int) -> dict[str, float]:
        """Every `vrg.probe_every` iterations, measure the drift of the table; update the trajectory if it is too large.

        Args:
            iteration: number of completed iterations.

        Returns:
            Metrics, empty if nothing was measured.
        """
        vrg = self._config.vrg
        if not vrg.enabled or self._table is None or iteration % vrg.probe_every:
            return {}
        probe = measure(
            self._pool,
            self._config,
            self._prompts,
            self._alpha_bars,
            images=vrg.probe_images,
            label=f"probe{iteration}",
        )
        drift = table_drift(self._table, probe)
        if drift <= vrg.max_drift:
            return {"vrg/table_drift": drift}
        self._console.message(f"error table has drifted by {drift:.2f} in log v: measured again")
        return {"vrg/table_drift": drift, **self._update(iteration)}

    def _update(self, iteration: int) -> dict[str, float]:
        with self._console.phase("vrg: measure and validate", None):
            sums = measure(
                self._pool, self._config, self._prompts, self._alpha_bars, images=self._config.vrg.images,
                label=f"full{iteration}",
            )  # fmt: skip
            before = self._pool.trajectory()
            update = consider(
                self._pool, self._config, self._prompts, sums, self._base, self._alpha_bars,
                provenance={
                    "run": self._config.run.name, "seed": self._config.run.seed, "iteration": iteration,
                    "alpha_bars": self._alpha_bars.tolist(),
                },
            )  # fmt: skip
        self._table = update.table
        self._record(iteration, update, before)
        self._console.message(describe(update))
        return update.metrics()

    def _record(self, iteration: int, update: Update, before: Trajectory) -> None:
        path = self._folder.root / "vrg" / f"{iteration:06d}.json"
        plot = write_artefact(
            path, artefact_of(update, before, self._alpha_bars), update.table,
            {"before": before, "in use": update.trajectory},
        )  # fmt: skip
        self._tracker.log_image("vrg", iteration, plot)
        self._tracker.set_tags({"schedule_id": update.trajectory.schedule_id})

    def _configured(self) -> Trajectory:
        sampler = self._config.sampler
        return configured_trajectory(sampler.trajectory, sampler.num_steps, self._alpha_bars) or self._base


def few_late_states(trajectory: Trajectory, config: Config, alpha_bars: FloatArray) -> str | None:
    """Warning for a trajectory with a single state that the learner trains on; None otherwise.

    Args:
        trajectory: the trajectory of the rollouts.
        config: the run's configuration.
        alpha_bars: the model's alpha_bar by timestep, shape (T,).
    """
    sampler, num_train_timesteps = config.sampler, len(alpha_bars)
    latest = sampler.latest_share(alpha_bars.tolist())
    late = [timestep for timestep in trajectory.timesteps if timestep <= latest * num_train_timesteps]
    if len(late) != 1 or sampler.late_per_sample == 1 or trajectory.num_steps == 1:
        return None
    # Rounded up, so that the second last step is included.
    share = math.ceil(100 * trajectory.timesteps[-2] / num_train_timesteps) / 100
    return (
        f"only 1 of {trajectory.num_steps} denoise steps is at or below sampler.t_max={latest:g}, so the "
        f"learner trains at timestep {late[0]:.0f} alone. sampler.t_max={share:g} adds the step before it."
    )
