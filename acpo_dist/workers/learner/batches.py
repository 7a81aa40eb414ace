"""Micro-batches from rollouts or from pairs of a data set; each sample has its own random stream."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acpo_dist.algorithms.base import LateStates, MicroBatch, TailStates
from acpo_dist.config.schema import DataConfig, LearnerConfig, RewardsConfig, SamplerConfig
from acpo_dist.core.seeding import derive_seed
from acpo_dist.core.types import TrainTask
from acpo_dist.data.images import ImageSet, load_images
from acpo_dist.data.pairs import PairSet, is_pair_id
from acpo_dist.models.family import ModelFamily
from acpo_dist.workers.learner.real_images import RealBatch, RealImages
from acpo_dist.workers.learner.samples import SampleStore


@dataclass(frozen=True, kw_only=True)
class LearnerSpec:
    """The sections that a learner rank needs."""

    model: Any
    algorithm: Any
    learner: LearnerConfig
    rewards: RewardsConfig
    sampler: SamplerConfig
    data: DataConfig
    seed: int
    max_staleness: int = 0
    """`pipeline.max_staleness`: number of earlier versions whose weights are kept."""
    latent_cache: Path | None = None
    """Folder of the latents of `data.path`."""

    @property
    def accumulation(self) -> int:
        """Number of micro-batches per rank and optimiser step."""
        return self.learner.global_batch // (self.learner.micro_batch * self.learner.num_ranks)


def memory_remedy(spec: LearnerSpec) -> str:
    """Return settings to change when the learner runs out of memory, the cheapest first."""
    learner, memory = spec.learner, getattr(spec.model, "memory", None)
    ways = [
        text
        for text, helps in (
            (
                f"lower learner.micro_batch ({learner.micro_batch}), which does not change the update",
                learner.micro_batch > 1,
            ),
            ("set model.memory.gradient_checkpointing=true", memory is not None and not memory.gradient_checkpointing),
            (
                "set learner.offload_optimizer=cpu",
                learner.offload_optimizer == "none" and learner.zero_stage in (1, 2),
            ),
            (
                "tune with LoRA in a new run, or on more ranks with learner.zero_stage=2",
                spec.model.tuning.method == "full",
            ),
        )
        if helps
    ] or ["use a larger device"]
    return f"{ways[0][0].upper()}{'; '.join(ways)[1:]}."


def mean_elements(model: Any, family: ModelFamily) -> int:
    """Return the elements of one x_0; their mean by share if the model draws several sizes."""
    shares = model.sizes
    if len(shares) < 2:
        return math.prod(family.sample_shape)
    total = sum(share for _, share in shares)
    return round(sum(share * math.prod(family.shape_of(size)) for size, share in shares) / total)


class BatchMaker:
    """Builds micro-batches from sample ids."""

    def __init__(self, spec: LearnerSpec, family: ModelFamily, *, device: str) -> None:
        """Open the configured data.

        Raises:
            DataError: the data cannot be read.
        """
        self._spec, self._family, self._device = spec, family, device
        self._images = self._open_images()
        self._captioned = self._open_captioned()
        self._pairs = PairSet(spec.data.pairs, family.size) if spec.data.pairs is not None else None
        self.broken: list[str] = []
        """Samples of pairs left out since `take_broken` because an image of the pair could not be decoded."""

    def make(self, store: SampleStore, ids: tuple[str, ...], task: TrainTask | None, step: int) -> MicroBatch:
        """Build one micro-batch.

        Args:
            store: rollouts of the samples.
            ids: samples; for an algorithm on pairs, winner and loser are adjacent.
            task: the iteration's task, or None for base samples before the first iteration.
            step: optimiser step of the iteration.
        """
        spec = self._spec
        keys = self._keys(ids, task, step)
        weights = torch.tensor([task.weights[sample_id] if task else 1.0 for sample_id in ids])
        states: LateStates | None = None
        unreadable: Tensor | None = None
        tail: TailStates | None = None
        real = False
        captioned: RealBatch | None = None
        if is_pair_id(ids[0]):
            assert self._pairs is not None, "pair ids need data.pairs"
            read = self._pairs.read(ids)
            clean, prompts, real = self._encode(read.pixels), read.prompts, True
            # Both samples of a broken pair are left out, and counted in `take_broken`.
            weights = weights * read.whole_B
            unreadable = torch.tensor([sample_id in read.broken for sample_id in ids], device=self._device)
            self.broken += [sample_id for sample_id, whole in zip(ids, read.whole_B.tolist(), strict=True) if not whole]
        else:
            states = self._to_device(store.late(ids, keys, stochastic=spec.algorithm.needs_noise))
            tail = self._tail(store, ids, task, step)
            clean, prompts = store.clean(ids), store.prompts(ids)
            if self._images is not None:
                clean, real = 2 * self._images.batch([key % len(self._images) for key in keys]) - 1, True
            if self._captioned is not None:
                captioned = self._captioned.batch(keys)
                clean, real = captioned.clean, True
        return MicroBatch(
            sample_ids=ids,
            prompts=prompts,
            noise_keys=tuple(keys),
            states=states,
            tail=tail,
            clean=clean.to(self._device),
            clean_prompts=captioned.captions if captioned else None,
            clean_conditioning=captioned.conditioning if captioned else {},
            latest_share=spec.sampler.latest_share(self._family.alpha_bars.tolist()),
            clean_is_real=real,
            weights_B=weights.to(self._device),
            guidance_scale=spec.sampler.guidance_for(conditional=self._family.conditional),
            guidance_rescale=spec.sampler.guidance_rescale,
            eta=spec.sampler.eta,
            stochastic_step=spec.sampler.stochastic_step,
            constants=task.constants if task else {},
            unreadable_B=unreadable,
        )

    def take_broken(self) -> list[str]:
        """Return the samples left out since the last call, two of each pair."""
        broken, self.broken = self.broken, []
        return broken

    def _keys(self, ids: Sequence[str], task: TrainTask | None, step: int) -> list[int]:
        owners = [ids[index - index % 2] for index in range(len(ids))] if self._spec.algorithm.paired else ids
        iteration = task.iteration if task else -1
        return [derive_seed("learner", self._spec.seed, iteration, step, owner) for owner in owners]

    def _tail(self, store: SampleStore, ids: Sequence[str], task: TrainTask | None, step: int) -> TailStates | None:
        steps: Any = getattr(self._spec.algorithm, "gradient_steps", "estimate")
        if steps == "estimate":
            return None
        if steps == "random":
            # The same for all ranks and micro-batches of an optimiser step: collectives count forwards.
            longest = min(store.longest_tail(ids), self._spec.algorithm.max_gradient_steps or sys.maxsize)
            seed = derive_seed("gradient_steps", self._spec.seed, task.iteration if task else -1, step)
            steps = 1 + seed % max(1, longest)
        tail = store.tail(ids, steps)
        return TailStates(latents=tail.latents.to(self._device), trajectory=tail.trajectory)

    @torch.no_grad()
    def _encode(self, pixels_BCHW: Tensor) -> Tensor:
        return self._family.encode_images(pixels_BCHW.to(self._device))

    def _to_device(self, late: LateStates) -> LateStates:
        following, levels = late.following, late.following_alpha_bars_B
        return LateStates(
            latents=late.latents.to(self._device),
            timesteps_B=late.timesteps_B.to(self._device),
            alpha_bars_B=late.alpha_bars_B.to(self._device),
            following=following.to(self._device) if following is not None else None,
            following_alpha_bars_B=levels.to(self._device) if levels is not None else None,
        )

    @property
    def _uses_data(self) -> bool:
        anchor = getattr(self._spec.algorithm, "anchor", None)
        return self._spec.data.path is not None and getattr(anchor, "source", "rollout") == "data"

    def _open_captioned(self) -> RealImages | None:
        if not self._uses_data or self._family.pixel_space:
            return None
        assert self._spec.latent_cache is not None, "set by `learner_spec`"
        return RealImages(self._spec.data, self._family, self._spec.latent_cache)

    def _open_images(self) -> ImageSet | None:
        data = self._spec.data
        if not self._uses_data or not self._family.pixel_space:
            return None
        assert data.path is not None
        return load_images(data.path, data.image_column, data.max_images, self._family.size)
