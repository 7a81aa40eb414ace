"""Configuration sections of the rewards. This module does not import torch, so that validation is fast."""

import importlib.util
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from acpo_dist.config.plugins import MetricConfig
from acpo_dist.core.registry import nearest
from acpo_dist.rewards.clip_source import clip_unusable
from acpo_dist.rewards.pyiqa_table import PYIQA, PyiqaFacts, facts_of

_ASSETS = Path(__file__).resolve().parents[1] / "data" / "toy" / "assets"
_OURS = "code: Apache-2.0"
_HUB = f"{_OURS}; weights: their model card"
_TURN = "`prefer: less` reverses it"
_STANDARD_SIZE = 224
PATCHES = 256
"""Largest number of tiles that TwoStream scores per image: all up to 512 x 512, a fixed quarter of 1024 x 1024."""


class NetworkConfig(MetricConfig):
    """Keys of the built-in network metrics."""

    weights: str = "toy"
    """`toy` for the embedded weights, a safetensors file, or `train` to train on damaged images of `data.path`
    first."""
    train_steps: int = Field(default=800, ge=1)
    """Optimiser steps of that training."""

    licence: ClassVar[str] = _OURS
    note: ClassVar[str] = "weights embedded, from a file, or trained (`train`)"
    lightweight: ClassVar[bool] = True
    toy_file: ClassVar[str]
    """Embedded weights."""

    @property
    def file(self) -> Path:
        """Weights file, unless `weights` is `train`."""
        return _ASSETS / self.toy_file if self.weights == "toy" else Path(self.weights).expanduser()

    def unusable(self) -> str | None:
        """Report a missing weights file."""
        if self.weights == "train" or self.file.is_file():
            return None
        return f"no weights at `{self.file}`; set `weights` to `toy` or to a safetensors file"


class TwoStreamConfig(NetworkConfig):
    """`weights` of the published or of the toy size."""

    type: Literal["two_stream"] = "two_stream"
    patches: int = Field(default=PATCHES, ge=1)
    """Largest number of 32 x 32 tiles scored per image; if there are more, this many are drawn from `seed`, the same
    in every call."""
    seed: int = 0
    """Seed of the drawn tiles."""

    gradient_step: ClassVar[float | None] = 4.0
    score_range: ClassVar[str] = "~0, ~1"
    minimum_size: ClassVar[int] = 32
    toy_file: ClassVar[str] = "two_stream.safetensors"


class StridedJudgeConfig(NetworkConfig):
    """`weights` of the judge."""

    type: Literal["strided_judge"] = "strided_judge"

    score_range: ClassVar[str] = "0, 1"
    minimum_size: ClassVar[int] = 16
    toy_file: ClassVar[str] = "judge.safetensors"


class StatisticConfig(MetricConfig):
    """Keys of the image statistics."""

    prefer: Literal["more", "less"] = "more"
    """Direction that counts as better; a statistic has no direction of its own."""

    licence: ClassVar[str] = _OURS
    lightweight: ClassVar[bool] = True

    @property
    def direction(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """+1 for `more`, -1 for `less`."""
        return 1 if self.prefer == "more" else -1


class SharpnessConfig(StatisticConfig):
    """Variance of the Laplacian."""

    type: Literal["sharpness"] = "sharpness"

    score_range: ClassVar[str] = "0, 16"
    minimum_size: ClassVar[int] = 3
    note: ClassVar[str] = f"variance of the Laplacian; {_TURN}"


class ColourfulnessConfig(StatisticConfig):
    """Hasler and Suesstrunk's colourfulness."""

    type: Literal["colourfulness"] = "colourfulness"

    score_range: ClassVar[str] = "0, ~200"
    note: ClassVar[str] = f"Hasler and Suesstrunk; {_TURN}"


class SaturationConfig(StatisticConfig):
    """Mean saturation."""

    type: Literal["saturation"] = "saturation"

    score_range: ClassVar[str] = "0, 1"
    note: ClassVar[str] = f"mean of HSV's S; {_TURN}"


class EdgeDensityConfig(StatisticConfig):
    """Share of edge pixels, without a gradient."""

    type: Literal["edge_density"] = "edge_density"

    differentiable: ClassVar[bool] = False
    score_range: ClassVar[str] = "0, 1"
    note: ClassVar[str] = f"share of edge pixels; {_TURN}"


class SoftEdgeDensityConfig(StatisticConfig):
    """Edge density with a logistic step."""

    type: Literal["soft_edge_density"] = "soft_edge_density"

    score_range: ClassVar[str] = "0, 1"
    note: ClassVar[str] = "edge density with a logistic step"


class ColourEntropyConfig(StatisticConfig):
    """Entropy of the colour histogram, without a gradient."""

    type: Literal["colour_entropy"] = "colour_entropy"

    differentiable: ClassVar[bool] = False
    score_range: ClassVar[str] = "0, 9"
    note: ClassVar[str] = f"bits; {_TURN}"


class SoftColourEntropyConfig(StatisticConfig):
    """Colour entropy with shared bins."""

    type: Literal["soft_colour_entropy"] = "soft_colour_entropy"

    score_range: ClassVar[str] = "0, 9"
    note: ClassVar[str] = "colour entropy with shared bins"


class ClipTextConfig(MetricConfig):
    """Keys of the metrics that compare an image with its prompt through a CLIP."""

    weights: str
    """Folder written by `save_pretrained`, or hub id, of a transformers CLIP."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, if `weights` contains none."""

    needs_prompts: ClassVar[bool] = True
    needs_download: ClassVar[bool] = True
    licence: ClassVar[str] = _HUB

    def unusable(self) -> str | None:
        """Report a missing model or tokenizer."""
        return clip_unusable(self.weights) or (clip_unusable(self.tokenizer) if self.tokenizer else None)


class ClipScoreConfig(ClipTextConfig):
    """The CLIP, and the prefix of the prompt."""

    type: Literal["clip_score"] = "clip_score"
    weights: str = "openai/clip-vit-base-patch32"
    prefix: str = "A photo depicts "
    """Prefix of every prompt."""

    score_range: ClassVar[str] = "0, 2.5"
    note: ClassVar[str] = "`weights`: hub id or folder of a CLIP"


class PickScoreConfig(ClipTextConfig):
    """The preference model."""

    type: Literal["pick_score"] = "pick_score"
    weights: str = "yuvalkirstain/PickScore_v1"

    score_range: ClassVar[str] = "~18, ~24"
    note: ClassVar[str] = "`weights`: hub id or folder of a preference CLIP; only differences are meaningful"


class AestheticConfig(MetricConfig):
    """The head and its CLIP."""

    type: Literal["aesthetic"] = "aesthetic"
    weights: str
    """safetensors file of the head: pairs `N.weight`, `N.bias` (any prefix), applied in the order of N."""
    clip: str = "openai/clip-vit-large-patch14"
    """Folder or hub id of the transformers CLIP on which the head was trained."""
    activation: Literal["none", "relu", "gelu"] = "none"
    """Activation between the layers; LAION's improved predictor has none."""

    needs_download: ClassVar[bool] = True
    score_range: ClassVar[str] = "~1, ~10"
    licence: ClassVar[str] = _HUB
    note: ClassVar[str] = "`weights`: safetensors file of the head; `clip`: hub id or folder of its CLIP"

    def unusable(self) -> str | None:
        """Report a missing head or CLIP."""
        if not Path(self.weights).expanduser().is_file():
            return f"no head at `{self.weights}`; set `weights` to a safetensors file with its linear layers"
        return clip_unusable(self.clip)


class IpceConfig(ClipTextConfig):
    """The CLIP, and its patches."""

    type: Literal["ipce"] = "ipce"
    short_side: int = Field(default=512, ge=_STANDARD_SIZE)
    """Minimum length of the shorter side in pixels, for a CLIP of 224 pixels; the 30K set used 768."""
    patches: int = Field(default=8, ge=1)
    """Number of local views; the paper trains with 8 random ones and tests with 15 evenly spaced ones."""
    positions: Literal["seeded", "even"] = "seeded"
    """Patch positions: drawn from `seed`, the same in every call, or evenly spaced."""
    seed: int = 0
    """Seed of the patch positions."""

    score_range: ClassVar[str] = "0, 5"
    note: ClassVar[str] = "`weights`: folder or hub id of a CLIP, fine-tuned for IPCE or zero-shot"


class PyiqaConfig(MetricConfig):
    """The metric of pyiqa."""

    type: Literal["pyiqa"] = "pyiqa"
    metric: str
    """pyiqa's name, such as musiq or piqe; `acpo rewards list` shows all names."""
    weights: str | None = None
    """File to load instead of a download: a state dict as .pth (bare, or under the key `params`) or safetensors."""

    def default_name(self) -> str:
        """Default name: the metric's own."""
        return self.metric

    @property
    def facts(self) -> PyiqaFacts | None:
        """The metric's row of the table; None for a name that pyiqa does not have."""
        return PYIQA.get(self.metric)

    @property
    def needs_prompts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True only for `clipscore`, which is rejected."""
        return self.metric == "clipscore"

    @property
    def needs_download(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in the table."""
        return self.facts is not None and self.facts.download

    @property
    def differentiable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in the table."""
        return self.facts is not None and self.facts.differentiable

    @property
    def gradient_step(self) -> float | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in the table."""
        return self.facts.gradient_step if self.facts else None

    @property
    def direction(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """pyiqa's own metadata if it is installed, else as in the table."""
        return -1 if facts_of(self.metric)["lower_better"] else 1

    @property
    def score_range(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """pyiqa's own metadata if it is installed, else as in the table."""
        return facts_of(self.metric)["score_range"]

    @property
    def minimum_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in the table."""
        return self.facts.minimum if self.facts else 1

    @property
    def licence(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in the table."""
        return self.facts.licence if self.facts else "not stated"

    @property
    def note(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Limitations of the metric."""
        facts = self.facts
        if facts is None:
            return ""
        notes = {
            f"not usable here: {facts.refused}": facts.refused,
            "`weights` accepts a local file": facts.local,
            "one image at a time": not facts.batched,
        }
        return "; ".join(text for text, holds in notes.items() if holds)

    def unusable(self) -> str | None:
        """Report an unknown or rejected metric, a missing file, or a missing pyiqa."""
        facts = self.facts
        if facts is None:
            return f"pyiqa has no no-reference metric `{self.metric}`.{nearest(self.metric, sorted(PYIQA))}"
        if facts.refused:
            return f"pyiqa's `{self.metric}` {facts.refused}"
        if self.weights is not None and facts.local is None:
            return f"pyiqa's `{self.metric}` reads no weights from a file; remove `weights`"
        if self.weights is not None and not Path(self.weights).expanduser().is_file():
            return f"no weights at `{self.weights}`; set `weights` to an existing file, or remove it"
        if importlib.util.find_spec("pyiqa") is None:
            return "pyiqa is not installed (noncommercial licence, optional): pip install 'acpo-dist[pyiqa]'"
        return None
