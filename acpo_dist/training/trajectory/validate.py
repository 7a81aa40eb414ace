"""Optimise a candidate trajectory, validate it against a long reference trajectory, and adopt it if it is better."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import WeightSyncError
from acpo_dist.core.ports import RolloutPool
from acpo_dist.diffusion.trajectory import Trajectory, spaced_trajectory
from acpo_dist.training.trajectory.measure import single_samples
from acpo_dist.vrg.levels import FloatArray, to_alpha_bars, to_sigmas
from acpo_dist.vrg.optimize import OptimisedTrajectory, optimize
from acpo_dist.vrg.responses import SOLVERS
from acpo_dist.vrg.sums import ErrorSums
from acpo_dist.vrg.table import ErrorTable
from acpo_dist.vrg.timesteps import to_timesteps

logger = logging.getLogger(__name__)

CLIPPED = 1e-3
"""A step is clipped if the x_0 rule changes more than this share of x0-hat's elements; J does not model such steps."""


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """Validation of one candidate."""

    search: str
    """Search of the candidate: `vrg` or `hso_grid`."""
    trust: float | None
    """Size of the trust region; None for a search without one."""
    ratio: float
    """Mean squared distance of the candidate's samples from the reference, divided by the distance of the trajectory
    in use."""
    median_ratio: float
    """Median of the ratio per sample; a few samples with changed content can dominate the mean."""
    old_error: float
    """Mean squared distance of the trajectory in use from the reference, in x_0 units."""
    new_error: float
    reference_steps: int
    clipped_elements: float = 0.0
    """Share of x0-hat's elements that the scheduler's x_0 rule changes, averaged over the candidate's steps."""
    clipped_steps: float = 0.0
    """Share of the candidate's steps at which the rule changes more than `CLIPPED` of the elements."""

    @property
    def passed(self) -> bool:
        """Whether neither the mean ratio nor the median ratio exceeds 1."""
        return self.ratio <= 1 and self.median_ratio <= 1


@dataclass(frozen=True, kw_only=True)
class Update:
    """A measurement, the validation of the candidates, and the resulting trajectory."""

    table: ErrorTable
    trajectory: Trajectory
    """The trajectory in use after the update."""
    adopted: bool
    j0: float
    j1: float
    """J of the last optimised candidate with the same table."""
    saturation: float
    gates: tuple[GateResult, ...]
    """All validations."""
    gate: GateResult | None
    """Validation of the adopted candidate, or the last one if none was adopted; None without any."""
    diagnostics: Mapping[str, list[float]]

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the update, by name."""
        known = self.table.standard_errors
        metrics = {
            "vrg/adopted": float(self.adopted), "vrg/j0": self.j0, "vrg/j1": self.j1,
            "vrg/saturation": self.saturation, "vrg/gates": float(len(self.gates)),
            "vrg/bias_ratio": max(self.diagnostics["bias_ratio"]),
            "vrg/excess_kurtosis": max(self.diagnostics["excess_kurtosis"]),
            "vrg/lag1_correlation": float(np.nanmax(self.diagnostics["lag1_correlation"])),
        }  # fmt: skip
        if known is not None:
            metrics["vrg/standard_error"] = float((known / self.table.v).max())
        gate = self.gate
        if gate is not None:
            metrics |= {
                "vrg/gate_ratio": gate.ratio, "vrg/gate_median_ratio": gate.median_ratio,
                "vrg/clipped_elements": gate.clipped_elements, "vrg/clipped_steps": gate.clipped_steps,
            } | ({} if gate.trust is None else {"vrg/trust": gate.trust})  # fmt: skip
        return metrics


def consider(
    pool: RolloutPool, config: Config, prompts: Sequence[str], sums: ErrorSums, base: Trajectory,
    alpha_bars: FloatArray, *, provenance: Mapping[str, Any], prove: bool = True,
) -> Update:  # fmt: skip
    """Search candidates from the base trajectory, validate them, and adopt the best one that is better.

    `vrg.search` selects the searches. If the candidate of `vrg` fails validation, or has no step late enough for
    training, the trust region is halved, up to `vrg.halvings` times; `hso_grid` has one candidate, whatever J predicts
    for it. Of the candidates that pass, the one with the lowest ratio is adopted. If none passes, the trajectory in use
    is kept.

    Args:
        pool: the rollout workers.
        config: the run's configuration.
        prompts: the run's prompts.
        sums: the measured error sums.
        base: centre of the trust region; can differ from the trajectory in use.
        alpha_bars: the model's alpha_bar by timestep, shape (T,).
        provenance: JSON values stored with the error table.
        prove: whether to validate the candidate; training always validates. Without, the first one is adopted.

    Returns:
        The update.

    Raises:
        WeightSyncError: a worker reports another trajectory than the adopted one.
    """
    table = sums.table(provenance)
    table.check_against(alpha_bars)
    current = pool.trajectory()
    # Solvers without a known response are treated as first order; validation uses the configured solver.
    solver = config.sampler.solver if config.sampler.solver in SOLVERS else "first_order"
    latest = config.sampler.latest_share(alpha_bars.tolist()) * len(alpha_bars)
    gates: list[GateResult] = []
    validation: Validation | None = None
    best: tuple[GateResult | None, OptimisedTrajectory, Trajectory] | None = None
    found: OptimisedTrajectory | None = None
    for search in searches_of(config, alpha_bars):
        for trust in trusts_of(config, search):
            found = optimize(
                to_sigmas(base.alpha_bars[:-1]), table, mode="log_trust" if trust else "hso_grid",
                trust=trust or config.vrg.trust, sigma_min=float(to_sigmas(alpha_bars)[0]), solver=solver,
                schedule=alpha_bars,
            )  # fmt: skip
            if trust and found.j1 > found.j0 * (1 - config.vrg.min_gain):
                logger.info("the optimum predicts a gain of %.2f %%: below min_gain", 100 * (1 - found.j1 / found.j0))
                break
            candidate = replace_levels(base, found.sigmas, alpha_bars)
            if candidate.schedule_id == current.schedule_id:
                break
            if candidate.timesteps[-1] > latest:
                logger.info("%s, trust %s: no step at or below sampler.t_max is left", search, trust)
                continue
            gate = None
            if prove:
                validation = validation or Validation(pool, config, prompts, current, alpha_bars, sums)
                gates.append(gate := validation.judge(candidate, search, trust))
                if not gate.passed:
                    continue
            if best is None or (gate and best[0] and gate.ratio < best[0].ratio):
                best = gate, found, candidate
            break
    gate = gates[-1] if gates else None
    if best is not None:
        gate, found, current = best
        set_trajectory(pool, current)
    assert found is not None, "every search has a candidate"
    return Update(
        table=table, trajectory=current, adopted=best is not None, j0=found.j0, j1=found.j1,
        saturation=found.saturation, gates=tuple(gates), gate=gate, diagnostics=sums.diagnostics(),
    )  # fmt: skip


def searches_of(config: Config, alpha_bars: FloatArray) -> tuple[str, ...]:
    """Return the searches of `vrg.search`; flow models, which start at alpha_bar 0, have `vrg` alone for `best`."""
    if config.vrg.search != "best":
        return (config.vrg.search,)
    return ("vrg", "hso_grid") if alpha_bars[-1] > 0 else ("vrg",)


def trusts_of(config: Config, search: str) -> tuple[float | None, ...]:
    """Return the sizes of the trust region to try; (None,) for a search without one."""
    if search != "vrg":
        return (None,)
    return tuple(config.vrg.trust / 2**halving for halving in range(config.vrg.halvings + 1))


class Validation:
    """Compares the final latents of candidates and of a long reference trajectory from the same noise."""

    def __init__(
        self, pool: RolloutPool, config: Config, prompts: Sequence[str], current: Trajectory, alpha_bars: FloatArray,
        sums: ErrorSums,
    ) -> None:  # fmt: skip
        """Sample along the reference and along the trajectory in use, once for all candidates.

        Args:
            pool: the rollout workers; they apply the model's x_0 rule.
            config: the run's configuration.
            prompts: the run's prompts.
            current: the trajectory in use.
            alpha_bars: the model's alpha_bar by timestep, shape (T,).
            sums: the error sums, for the share of elements that the x_0 rule changes.
        """
        self._pool, self._sums = pool, sums
        self._groups = single_samples(config, prompts, config.vrg.gate_samples, "vrg_gate", 0)
        steps = config.vrg.reference_steps or max(100, 4 * current.num_steps)
        self._reference_steps = min(steps, len(alpha_bars))
        long = spaced_trajectory(torch.from_numpy(alpha_bars), self._reference_steps, "trailing")
        self._reference = pool.final_latents(self._groups, long)
        self._old = self._errors(current)

    def judge(self, candidate: Trajectory, search: str, trust: float | None) -> GateResult:
        """Compare a candidate with the trajectory in use by the distance of final latents from the reference.

        Args:
            candidate: the candidate trajectory.
            search: its search, for the result.
            trust: size of the trust region, for the result; None for a search without one.
        """
        old, new = self._old, self._errors(candidate)
        # If the trajectory in use has no error, no candidate can improve it.
        ratio = float(new.mean() / old.mean()) if bool(old.mean() > 0) else float("inf")
        median_ratio = float((new / old).nan_to_num(nan=1.0).median())
        clipped = np.interp(np.log(to_sigmas(candidate.alpha_bars[:-1])), np.log(self._sums.sigmas), self._sums.clipped)
        logger.info("gate: %s, trust %s, ratio %.3f, median %.3f", search, trust, ratio, median_ratio)
        return GateResult(
            search=search, trust=trust, ratio=ratio, median_ratio=median_ratio, old_error=float(old.mean()),
            new_error=float(new.mean()), reference_steps=self._reference_steps,
            clipped_elements=float(clipped.mean()), clipped_steps=float((clipped > CLIPPED).mean()),
        )  # fmt: skip

    def _errors(self, trajectory: Trajectory) -> torch.Tensor:
        """Return the mean squared distance from the reference per sample, float64, shape (B,)."""
        final_latents = self._pool.final_latents(self._groups, trajectory)
        if isinstance(final_latents, torch.Tensor) and isinstance(self._reference, torch.Tensor):
            return (final_latents - self._reference).double().square().flatten(1).mean(1)
        pairs = zip(final_latents, self._reference, strict=True)
        return torch.stack([(latents - reference).double().square().mean() for latents, reference in pairs])


def set_trajectory(pool: RolloutPool, trajectory: Trajectory) -> None:
    """Set the trajectory of every worker and check the reported schedule ids.

    Raises:
        WeightSyncError: a worker reports another schedule id.
    """
    answers = pool.set_trajectory(trajectory)
    if set(answers) != {trajectory.schedule_id}:
        raise WeightSyncError(f"workers use {sorted(set(answers))} instead of trajectory {trajectory.schedule_id}")


def replace_levels(base: Trajectory, sigmas: Sequence[float] | np.ndarray, alpha_bars: FloatArray) -> Trajectory:
    """Replace the inner levels of a trajectory; the first and the last level of `base` are kept.

    Args:
        base: trajectory of N steps.
        sigmas: N decreasing sigmas.
        alpha_bars: the model's alpha_bar by timestep, shape (T,).
    """
    levels = to_alpha_bars(np.asarray(sigmas))
    # Take the noisy end from `base` to keep it bit for bit.
    timesteps = to_timesteps(sigmas, alpha_bars)
    return Trajectory(
        timesteps=(base.timesteps[0], *map(float, timesteps[1:])),
        alpha_bars=(base.alpha_bars[0], *map(float, levels[1:]), base.alpha_bars[-1]),
    )


def describe(update: Update) -> str:
    """Summarise an update in one line for the console."""
    gain = f"cumulative error {update.j0:.4g} -> {update.j1:.4g}"
    gates = [
        f"{gate.ratio:.3f} (median {gate.median_ratio:.3f}){candidate_of(gate.search, gate.trust)}"
        for gate in update.gates
    ]
    tried = ", ".join(gates) or "no candidate worth one"
    verdict = f"adopted {update.trajectory.schedule_id}" if update.adopted else "kept the trajectory in use"
    return f"vrg: {gain}; distance to the long reference, new over old: {tried}; {verdict}"


def candidate_of(search: str, trust: float | None) -> str:
    """Return the origin of a candidate as text, with a leading space."""
    return f" by {search}" if trust is None else f" at trust {trust:g}"
