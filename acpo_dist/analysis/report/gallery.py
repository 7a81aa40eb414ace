"""Pairs of images, what each gained or lost, and what the whole set says about content and diversity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from torch import Tensor

from acpo_dist.analysis.report.record import RunRecord
from acpo_dist.analysis.report.sample_renderer import Sample, SampleRenderer, read_pixels
from acpo_dist.core.types import Normaliser
from acpo_dist.evaluation.metrics.content import content_statistics
from acpo_dist.evaluation.metrics.distances import SampleError
from acpo_dist.evaluation.metrics.diversity import within_prompt_diversity
from acpo_dist.evaluation.metrics.features import LowPassPixels

_MIN_STD = 0.05
"""Least unit of a content shift, as the guard has it."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt and seed, drawn twice."""

    base: Sample
    tuned: Sample
    gain: float
    """Mean over the judges (the rewards where there is none) of the change in base standard deviations."""
    reward_gain: float


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """All pairs of a run."""

    iteration: int
    pairs: Sequence[Pair]
    judged: bool
    """Whether `gain` is the judges'."""
    content: Mapping[str, float]
    """Statistic -> shift of its mean in standard deviations of the base images."""
    diversity: float | None
    """Within-prompt distance on low-pass features as a share of the base model's; None if it cannot be measured."""


def make_gallery(record: RunRecord, renderer: SampleRenderer, iteration: int) -> Gallery:
    """Draw (or read) both sets and compare them image by image."""
    checkpoint = renderer.checkpoint(iteration)
    trajectory = checkpoint.state.get("trajectory")
    base = renderer.samples(None, trajectory)
    tuned = renderer.samples(checkpoint, trajectory)
    normalisers = {name: Normaliser(**value) for name, value in checkpoint.state["normalisers"].items()}
    rewards = [entry.name for entry in renderer.config.rewards.train]
    judges = [entry.name for entry in renderer.config.rewards.judges]
    pairs = [
        Pair(
            base=before, tuned=after, gain=_change(before, after, judges or rewards, normalisers),
            reward_gain=_change(before, after, rewards, normalisers),
        )
        for before, after in zip(base, tuned, strict=True)
    ]  # fmt: skip
    before, after = read_pixels(base), read_pixels(tuned)
    return Gallery(
        iteration=iteration, pairs=pairs, judged=bool(judges), content=content_shifts(before, after),
        diversity=diversity_share(before, after, [sample.prompt for sample in base]),
    )  # fmt: skip


def content_shifts(base: Tensor, tuned: Tensor) -> dict[str, float]:
    """Shift of each content statistic's mean, in standard deviations of the base images (at least 0.05)."""
    before, after = content_statistics(base), content_statistics(tuned)
    return {
        name: (fmean(after[name].tolist()) - fmean(values.tolist())) / max(_MIN_STD, pstdev(values.tolist()))
        for name, values in before.items()
    }


def diversity_share(base: Tensor, tuned: Tensor, prompts: Sequence[str]) -> float | None:
    """Within-prompt distance of the tuned images over that of the base's; None with one seed per prompt."""
    extract = LowPassPixels(8 if min(base.shape[2:]) >= 32 else 4)
    try:
        before, after = (within_prompt_diversity(extract(images).values, prompts) for images in (base, tuned))
    except (SampleError, ValueError):
        return None
    return after.mean_distance / before.mean_distance if before.mean_distance > 0 else None


def _change(before: Sample, after: Sample, names: Sequence[str], normalisers: Mapping[str, Normaliser]) -> float:
    return fmean(
        normalisers[name].normalise(after.scores[name]) - normalisers[name].normalise(before.scores[name])
        for name in names
    )
