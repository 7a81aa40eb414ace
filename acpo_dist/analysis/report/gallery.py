"""Pairs of base and tuned images: gain of each pair, content shifts and diversity of the set, and embedded images."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from PIL import Image

from acpo_dist.analysis.report.record import RunRecord
from acpo_dist.analysis.report.sample_renderer import Sample, SampleRenderer, read_pixels
from acpo_dist.core.by_size import Mixed, map_by_size
from acpo_dist.core.types import Normaliser
from acpo_dist.evaluation.metrics.content import content_statistics
from acpo_dist.evaluation.metrics.distances import SampleError
from acpo_dist.evaluation.metrics.diversity import within_prompt_diversity
from acpo_dist.evaluation.metrics.features import LowPassPixels

_MIN_STD = 0.05
"""Lower bound of the standard deviation that divides a content shift; the guard uses the same."""
_LARGEST = 512
"""Longer side of an embedded image in pixels; the files in the run's `report/` folder keep their size."""
_LOSSLESS = 128
"""Largest side of an image that is embedded as PNG."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Images of one prompt and seed by both models."""

    base: Sample
    tuned: Sample
    gain: float
    """Mean over the judges (over the rewards if there is none) of the change in base standard deviations."""
    reward_gain: float


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """All pairs of a run."""

    iteration: int
    pairs: Sequence[Pair]
    judged: bool
    """Whether `gain` is computed from judges."""
    content: Mapping[str, float]
    """Statistic -> shift of its mean in standard deviations of the base images."""
    diversity: float | None
    """Within-prompt distance on low-pass features relative to the base model's; None if it cannot be measured."""


def make_gallery(record: RunRecord, renderer: SampleRenderer, iteration: int) -> Gallery:
    """Render or read both sets and compare them image by image."""
    checkpoint = renderer.checkpoint(iteration)
    trajectory = checkpoint.state.get("trajectory")
    base = renderer.samples(None, trajectory)
    tuned = renderer.samples(checkpoint, trajectory)
    normalisers = {name: Normaliser(**value) for name, value in checkpoint.state["normalisers"].items()}
    judges = [entry.name for entry in renderer.config.rewards.judges]
    # A reward on latents is judged by its metric.
    rewards = [entry.name for entry in renderer.config.rewards.train if entry.space == "image"] or judges
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


def gallery_cards(gallery: Gallery) -> list[dict[str, Any]]:
    """Return the pairs for the page, the largest regression first, with their position in each order."""
    pairs = gallery.pairs
    by_gain = sorted(range(len(pairs)), key=lambda index: pairs[index].gain)
    by_prompt = sorted(range(len(pairs)), key=lambda index: (pairs[index].base.prompt, index))
    cards = []
    for rank, index in enumerate(by_gain):
        gain = round(pairs[index].gain, 2)
        tone, word = ("same", "● same") if gain == 0 else ("won", "▲ gained") if gain > 0 else ("lost", "▼ lost")
        cards.append(
            {"pair": pairs[index], "worst": rank, "prompt": by_prompt.index(index), "tone": tone, "word": word}
        )
    return cards


def embedded(sample: Sample) -> dict[str, Any]:
    """Return data URL, width, height of an embedded image, and whether enlarged pixels stay sharp."""
    with Image.open(sample.file) as opened:
        image = opened.convert("RGB")
    image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind, options = ("png", {"optimize": True}) if max(image.size) <= _LOSSLESS else ("jpeg", {"quality": 88})
    image.save(buffer, format=kind, **options)
    url = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"url": url, "width": image.width, "height": image.height, "sharp": image.width < _LARGEST // 2}


def content_shifts(base: Mixed, tuned: Mixed) -> dict[str, float]:
    """Return the shift of each content statistic's mean, in standard deviations of the base images (at least 0.05)."""
    before, after = content_statistics(base), content_statistics(tuned)
    return {
        name: (fmean(after[name].tolist()) - fmean(values.tolist())) / max(_MIN_STD, pstdev(values.tolist()))
        for name, values in before.items()
    }


def diversity_share(base: Mixed, tuned: Mixed, prompts: Sequence[str]) -> float | None:
    """Return the within-prompt distance of tuned relative to base images; None with one seed per prompt."""
    extract = LowPassPixels(8 if min(min(image.shape[1:]) for image in base) >= 32 else 4)
    try:
        before, after = (
            within_prompt_diversity(map_by_size(images, lambda part: extract(part).values), prompts)
            for images in (base, tuned)
        )
    except (SampleError, ValueError):
        return None
    return after.mean_distance / before.mean_distance if before.mean_distance > 0 else None


def _change(before: Sample, after: Sample, names: Sequence[str], normalisers: Mapping[str, Normaliser]) -> float:
    return fmean(
        normalisers[name].normalise(after.scores[name]) - normalisers[name].normalise(before.scores[name])
        for name in names
    )
