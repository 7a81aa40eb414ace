"""Metrics of our own: TwoStream-IQA and the differently built judge."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from acpo_dist.core.errors import RewardConfigError
from acpo_dist.rewards.base import MetricConfig, SmoothQuality
from acpo_dist.rewards.inputs import check_images
from acpo_dist.rewards.strided_judge import SMALLEST, StridedJudge
from acpo_dist.rewards.two_stream import PATCH, PATCHES, PUBLISHED, TOY, TwoStream

_ASSETS = Path(__file__).resolve().parents[1] / "data" / "toy" / "assets"


class _WeightedConfig(MetricConfig):
    weights: str = "toy"
    """`toy` for the embedded weights, a safetensors file, or `train` to train on damaged `data.path` first."""
    train_steps: int = Field(default=800, ge=1)
    """Steps of that training."""


class _NetworkMetric(SmoothQuality):
    """A network of ours with weights from a file."""

    Config: ClassVar[type[MetricConfig]] = _WeightedConfig
    needs_prompts = False
    _toy_file: ClassVar[str]
    _smallest: ClassVar[int]
    """Least height and width of an image."""

    def __init__(self, config: _WeightedConfig, *, device: str = "cpu") -> None:
        """Load the weights.

        Raises:
            RewardConfigError: the file is missing or does not fit.
        """
        reason = self.unusable(config)
        if reason:
            raise RewardConfigError(f"`{config.name}`: {reason}")
        if config.weights == "train":
            raise RewardConfigError(
                f"`{config.name}`: weights `train` need `data.path` and `acpo train`, which trains them first"
            )
        path = self._file(config)
        try:
            state = load_file(path)
            self.network = self._build(state)
            self.network.load_state_dict(state)
        except (SafetensorError, RuntimeError, KeyError) as error:
            raise RewardConfigError(
                f"`{config.name}`: {path} does not hold weights for `{config.type}`: {error}"
            ) from error
        self._name = config.name
        # Channels last: the same sums, 1.2 to 1.7 times as fast on a CPU.
        self.network.to(device).eval().requires_grad_(False)
        # torch's stubs know only the other ways to call it.
        self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @classmethod
    def _file(cls, config: _WeightedConfig) -> Path:
        return _ASSETS / cls._toy_file if config.weights == "toy" else Path(config.weights).expanduser()

    @classmethod
    def _build(cls, state: dict[str, Tensor]) -> nn.Module:
        raise NotImplementedError

    @classmethod
    def unusable(cls, config: MetricConfig) -> str | None:
        """See `Metric.unusable`."""
        assert isinstance(config, _WeightedConfig)
        if config.weights == "train":
            return None
        path = cls._file(config)
        return None if path.is_file() else f"no weights at `{path}`; set `weights` to `toy` or to a safetensors file"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Metric.__call__`.

        Raises:
            RewardError: images that it cannot take.
        """
        check_images(images, name=self._name, minimum=self._smallest)
        return self._score(images)

    def _score(self, images: Tensor) -> Tensor:
        return self.network(images)


class TwoStreamMetric(_NetworkMetric):
    """TwoStream-IQA, quality 0 to 1."""

    class Config(_WeightedConfig):
        """`weights` of the published or of the toy size."""

        type: Literal["two_stream"] = "two_stream"
        patches: int = Field(default=PATCHES, ge=1)
        """Most 32 x 32 tiles of an image that are looked at; of more, `seed` draws so many, the same in every call."""
        seed: int = 0
        """Of the tiles that are looked at."""

    _toy_file: ClassVar[str] = "two_stream.safetensors"
    _smallest: ClassVar[int] = PATCH

    def __init__(self, config: Config, *, device: str = "cpu") -> None:
        """See `_NetworkMetric`."""
        super().__init__(config, device=device)
        self._patches, self._seed = config.patches, config.seed

    def _score(self, images: Tensor) -> Tensor:
        return self.network(images, patches=self._patches, seed=self._seed)

    @classmethod
    def _build(cls, state: dict[str, Tensor]) -> nn.Module:
        first = state["image_stream.features.0.weight"].shape[0]
        return TwoStream(TOY if first == TOY.channels[0] else PUBLISHED)


class StridedJudgeMetric(_NetworkMetric):
    """The strided judge, quality 0 to 1."""

    class Config(_WeightedConfig):
        """`weights` of the judge."""

        type: Literal["strided_judge"] = "strided_judge"

    _toy_file: ClassVar[str] = "judge.safetensors"
    _smallest: ClassVar[int] = SMALLEST

    @classmethod
    def _build(cls, state: dict[str, Tensor]) -> nn.Module:
        return StridedJudge(state["stem.weight"].shape[0])
