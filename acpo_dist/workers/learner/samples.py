"""Lookup of rollout data by sample id."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from acpo_dist.algorithms.base import LateStates, TailStates
from acpo_dist.core.errors import ConfigError, WeightSyncError
from acpo_dist.core.types import LateLatents, RolloutBatch
from acpo_dist.diffusion.trajectory import Trajectory


class SampleStore:
    """Looks up samples by id across rollout batches."""

    def __init__(self, batches: Sequence[RolloutBatch], *, policy_version: int | None) -> None:
        """Index the batches.

        Args:
            policy_version: version that every sample must have been drawn with; None does not check.

        Raises:
            WeightSyncError: a batch was drawn with another version of the weights.
        """
        self._at: dict[str, tuple[RolloutBatch, int]] = {}
        for batch in batches:
            if policy_version is not None and batch.policy_version != policy_version:
                raise WeightSyncError(
                    f"samples {batch.sample_ids[0]}... were drawn with weights version {batch.policy_version}, but the "
                    f"learner is at version {policy_version}; gradients are never applied to newer weights"
                )
            for row, sample_id in enumerate(batch.sample_ids):
                self._at[sample_id] = (batch, row)

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Return all samples, in the order of the batches."""
        return tuple(self._at)

    def ids_by_size(self) -> list[list[str]]:
        """Samples of each size, in the order of the batches."""
        found: dict[torch.Size, list[str]] = {}
        for sample_id, (batch, _) in self._at.items():
            found.setdefault(batch.latents_BCHW.shape[1:], []).append(sample_id)
        return list(found.values())

    def prompts(self, ids: Sequence[str]) -> tuple[str, ...]:
        """Return the prompt of each sample."""
        return tuple(batch.prompts[row] for batch, row in (self._at[sample_id] for sample_id in ids))

    def clean(self, ids: Sequence[str]) -> Tensor:
        """Return x_0 of each sample, (B, C, H, W)."""
        return torch.stack([batch.latents_BCHW[row] for batch, row in (self._at[sample_id] for sample_id in ids)])

    def late(self, ids: Sequence[str], keys: Sequence[int], *, stochastic: bool = False) -> LateStates:
        """Return one kept late state of each sample, selected by the sample's key.

        States are selected in proportion to the timesteps that their step covers, so that the objective and the
        measured drift are means over timesteps for any spacing of the trajectory. Transitions are selected with equal
        probability, since a policy gradient is a sum over steps with weight 1.

        Args:
            ids: samples.
            keys: random integer per sample.
            stochastic: select a transition among the steps that have a density, and also return the state after it.
        """
        chosen: list[tuple[LateLatents, int]] = []
        for sample_id, key in zip(ids, keys, strict=True):
            batch, row = self._at[sample_id]
            kept = [late for late in batch.late if not stochastic or late.following_alpha_bar < 1]
            # The low bits select the image of the data batch; the high bits select the state.
            widths = [1.0 if stochastic else late.width for late in kept]
            chosen.append((kept[_take(widths, (key >> 32) % 2**24 / 2**24)], row))
        following = [late.following_BCHW[row] for late, row in chosen if late.following_BCHW is not None]
        levels = torch.tensor([late.following_alpha_bar for late, _ in chosen], dtype=torch.float64)
        return LateStates(
            latents=torch.stack([late.latents_BCHW[row] for late, row in chosen]),
            timesteps_B=torch.tensor([late.timestep for late, _ in chosen]),
            alpha_bars_B=torch.tensor([late.alpha_bar for late, _ in chosen], dtype=torch.float64),
            following=torch.stack(following) if stochastic else None,
            following_alpha_bars_B=levels if stochastic else None,
        )

    def tail(self, ids: Sequence[str], steps: int) -> TailStates:
        """Return each sample's state before the last `steps` denoise steps, and the levels of these steps.

        Raises:
            ConfigError: the rollouts do not keep the states of that many last steps.
        """
        chosen: list[Tensor] = []
        kept: list[LateLatents] = []
        for sample_id in ids:
            batch, row = self._at[sample_id]
            kept = last_steps(batch)
            if len(kept) < steps:
                raise ConfigError(
                    f"algorithm.gradient_steps is {steps}, and rollouts keep the states of the last {len(kept)} "
                    "steps without a gap. Raise sampler.late_per_sample (and sampler.t_max), or lower "
                    "algorithm.gradient_steps."
                )
            kept = kept[-steps:]
            chosen.append(kept[0].latents_BCHW[row])
        trajectory = Trajectory(
            timesteps=tuple(late.timestep for late in kept),
            alpha_bars=(*(late.alpha_bar for late in kept), kept[-1].following_alpha_bar),
        )
        return TailStates(latents=torch.stack(chosen), trajectory=trajectory)

    def longest_tail(self, ids: Sequence[str]) -> int:
        """Return the number of last steps whose states are kept without a gap."""
        return min(len(last_steps(self._at[sample_id][0])) for sample_id in ids)


def last_steps(batch: RolloutBatch) -> list[LateLatents]:
    """Return the kept states that reach the end of the trajectory without a gap, in sampling order."""
    found: list[LateLatents] = []
    for late in reversed(batch.late):
        if late.denoise_step != (found[0].denoise_step - 1 if found else late.denoise_step):
            break
        if not found and late.following_alpha_bar < 1:
            break
        found.insert(0, late)
    return found


def _take(widths: Sequence[float], share: float) -> int:
    """Return the index of the entry in which this share (0 to below 1) of all the widths ends."""
    ends = list(accumulate(widths))
    return bisect_right(ends, share * ends[-1])
