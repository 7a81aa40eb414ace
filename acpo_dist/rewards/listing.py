"""Every metric by name with what one must know to choose it; what `acpo rewards list` prints."""

from dataclasses import asdict, dataclass
from typing import Any

from acpo_dist.core.registry import REWARDS, resolve
from acpo_dist.rewards.pyiqa_metric import PyiqaMetric, facts_of
from acpo_dist.rewards.pyiqa_table import PYIQA

_OURS = "code: Apache-2.0"
_HUB = f"{_OURS}; weights: their model card"


@dataclass(frozen=True, kw_only=True)
class RewardRow:
    """One line of the listing."""

    name: str
    """As `acpo score --reward` takes it."""
    type: str
    """As a configuration names it."""
    needs_download: bool
    """Weights come from elsewhere on first use, unless a local file or folder is given."""
    differentiable: bool
    """May drive an algorithm that needs the reward's gradient."""
    needs_prompts: bool
    range: str
    """Lowest and highest raw score; `~` means about."""
    direction: str
    """`higher` or `lower` is better."""
    minimum_size: int
    """Smallest height and width of an image, in pixels."""
    licence: str
    note: str


@dataclass(frozen=True, kw_only=True)
class _Own:
    """What a class of ours does not say itself."""

    range: str
    minimum_size: int
    needs_download: bool = False
    licence: str = _OURS
    note: str = ""


_OWN: dict[str, _Own] = {
    "two_stream": _Own(range="~0, ~1", minimum_size=32, note="weights embedded, from a file, or trained (`train`)"),
    "strided_judge": _Own(range="0, 1", minimum_size=16, note="weights embedded, from a file, or trained (`train`)"),
    "sharpness": _Own(range="0, 16", minimum_size=3, note="variance of the Laplacian; `prefer: less` turns it round"),
    "colourfulness": _Own(range="0, ~200", minimum_size=1, note="Hasler and Suesstrunk; `prefer: less` turns it round"),
    "saturation": _Own(range="0, 1", minimum_size=1, note="mean of HSV's S; `prefer: less` turns it round"),
    "edge_density": _Own(range="0, 1", minimum_size=1, note="share of edge pixels; `prefer: less` turns it round"),
    "soft_edge_density": _Own(range="0, 1", minimum_size=1, note="edge density with a logistic step"),
    "colour_entropy": _Own(range="0, 9", minimum_size=1, note="bits; `prefer: less` turns it round"),
    "soft_colour_entropy": _Own(range="0, 9", minimum_size=1, note="colour entropy with shared bins"),
    "clip_score": _Own(
        range="0, 2.5", minimum_size=1, needs_download=True, licence=_HUB, note="`weights`: hub id or folder of a CLIP"
    ),
    "pick_score": _Own(
        range="~18, ~24", minimum_size=1, needs_download=True, licence=_HUB,
        note="`weights`: hub id or folder of a preference CLIP; differences count",
    ),
    "aesthetic": _Own(
        range="~1, ~10", minimum_size=1, needs_download=True, licence=_HUB,
        note="`weights`: safetensors file of the head; `clip`: hub id or folder of its CLIP",
    ),
    "ipce": _Own(
        range="0, 5", minimum_size=1, needs_download=True, licence=_HUB,
        note="`weights`: folder or hub id of a CLIP, fine-tuned for IPCE or zero-shot",
    ),
}  # fmt: skip


def reward_listing() -> list[dict[str, Any]]:
    """All metrics, ours first, then pyiqa's; the keys are the fields of `RewardRow`.

    Range and direction of pyiqa's metrics are pyiqa's own where it is installed.
    """
    rows = [_own_row(name, facts) for name, facts in _OWN.items()]
    return [asdict(row) for row in [*rows, *(_pyiqa_row(name) for name in PYIQA)]]


def _own_row(name: str, facts: _Own) -> RewardRow:
    metric = resolve("reward", REWARDS, name)
    # Neither answer depends on the keys a user must set, so they need not be set here.
    config = metric.Config.model_construct(type=name)
    return RewardRow(
        name=name,
        type=name,
        differentiable=metric.differentiable(config),
        needs_prompts=metric.needs_prompts,
        direction="higher" if metric.direction(config) > 0 else "lower",
        **asdict(facts),
    )


def _pyiqa_row(name: str) -> RewardRow:
    facts, config = PYIQA[name], PyiqaMetric.Config(metric=name)
    notes = [
        *([f"not usable here: {facts.refused}"] if facts.refused else []),
        *(["`weights` takes a local file"] if facts.local else []),
        *(["one image at a time"] if not facts.batched else []),
    ]
    return RewardRow(
        name=f"pyiqa:{name}",
        type="pyiqa",
        needs_download=facts.download,
        differentiable=facts.differentiable,
        needs_prompts=name == "clipscore",
        range=facts_of(name)["score_range"],
        direction="higher" if PyiqaMetric.direction(config) > 0 else "lower",
        minimum_size=facts.minimum,
        licence=facts.licence,
        note="; ".join(notes),
    )
