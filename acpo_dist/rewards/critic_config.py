"""Configuration of a latent critic, and the facts in its file. This module does not import torch."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import override

from acpo_dist.config.plugins import MetricConfig, ModelConfig
from acpo_dist.core.sizes import size_text

FACTS_KEY = "acpo_critic"
"""Entry of the safetensors metadata that holds `CriticFacts` as JSON."""
_LONGEST_HEADER = 1_000_000
"""Bytes; the header of a critic has a few thousand."""


class CriticFacts(BaseModel):
    """What a critic was distilled from and for; written into its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: dict[str, Any]
    """Section of the metric, as in `rewards.train`."""
    direction: Literal[1, -1]
    score_range: str
    licence: str
    model: str
    """`type` of the model."""
    path: str
    """`path` of the model, for messages."""
    channels: int
    """Channels of x_0."""
    shapes: tuple[tuple[int, int], ...]
    """Heights and widths of x_0 in the training data, in latent elements."""
    sizes: tuple[tuple[int, int], ...]
    """The same as (width, height) in pixels."""
    width: int
    """Width of the network."""

    @property
    def name(self) -> str:
        """The metric as `acpo score` names it."""
        return f"pyiqa:{self.metric['metric']}" if self.metric["type"] == "pyiqa" else str(self.metric["type"])


class LatentCriticConfig(MetricConfig):
    """`weights` that `acpo rewards distil` wrote."""

    type: Literal["latent_critic"] = "latent_critic"
    weights: str
    """safetensors file."""

    space: ClassVar[Literal["image", "latent"]] = "latent"
    lightweight: ClassVar[bool] = True
    note: ClassVar[str] = "a small network that predicts a metric from x0-hat; `weights`: from `acpo rewards distil`"

    @property
    def file(self) -> Path:
        """Weights file."""
        return Path(self.weights).expanduser()

    @property
    def facts(self) -> CriticFacts | None:
        """Facts in the file; None if there is no such file, or it holds no critic."""
        # `acpo rewards list` reads the properties of a section without weights.
        if "weights" not in self.__dict__ or not self.file.is_file():
            return None
        return _read_facts(self.file, self.file.stat().st_mtime_ns)

    @property
    def direction(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As of the metric."""
        return self.facts.direction if self.facts else 1

    @property
    def score_range(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As of the metric."""
        return f"~{self.facts.score_range}" if self.facts else "as its metric"

    @property
    def licence(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As of the metric, whose scores trained it."""
        return self.facts.licence if self.facts else "code: Apache-2.0; weights: as their metric"

    @override
    def unusable(self) -> str | None:
        if not self.file.is_file():
            return f"no weights at `{self.weights}`; `acpo rewards distil METRIC --model MODEL` writes them"
        if self.facts is None:
            return f"`{self.weights}` holds no critic; set `weights` to a file that `acpo rewards distil` wrote"
        return None

    @override
    def unfit(self, model: ModelConfig, judges: Sequence[MetricConfig]) -> str | None:
        facts = self.facts
        if facts is None:
            return self.unusable()
        metric = facts.name
        if model.pixel_space:
            return f"scores latents, and `{model.type}` works on pixels: train on `{metric}` itself"
        if model.type != facts.model:
            return (
                f"was distilled on latents of `{facts.model}` ({facts.path}), and model.type is {model.type}. Distil "
                f"it again: acpo rewards distil {metric} --model MODEL"
            )
        unknown = [size_text(size) for size, _ in model.sizes if size not in facts.sizes]
        if unknown:
            return (
                f"was distilled at {', '.join(map(size_text, facts.sizes))}, and model.image_size has "
                f"{', '.join(unknown[:3])}. Distil it at these sizes, or change model.image_size"
            )
        if not any(self._is_metric(judge, facts.metric) for judge in judges):
            return (
                f"estimates `{metric}` and can be cheated on its own, so the metric itself must judge the run: add "
                f"{json.dumps(facts.metric)} to rewards.judges"
            )
        return None

    @staticmethod
    def _is_metric(judge: MetricConfig, metric: Mapping[str, Any]) -> bool:
        """Return whether a judge is the metric, whatever file its weights are read from."""
        return judge.type == metric["type"] and getattr(judge, "metric", None) == metric.get("metric")


@lru_cache(maxsize=16)
def _read_facts(file: Path, changed: int) -> CriticFacts | None:
    """Read the facts from the header of a safetensors file.

    Args:
        file: the file.
        changed: its time of modification, so that a rewritten file is read again.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if length <= _LONGEST_HEADER else {}
        return CriticFacts.model_validate_json(header["__metadata__"][FACTS_KEY])
    except (OSError, ValueError, KeyError, TypeError, ValidationError, RecursionError):
        return None
