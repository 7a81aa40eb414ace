"""Metrics based on a CLIP model: CLIPScore, preference models of the form e^s cos, and aesthetic heads."""

import re
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from acpo_dist.core.errors import RewardConfigError
from acpo_dist.rewards.clip_backbone import ClipBackbone
from acpo_dist.rewards.config import AestheticConfig, ClipScoreConfig, ClipTextConfig, PickScoreConfig
from acpo_dist.rewards.inputs import check_images, check_prompts


class ClipTextMetric:
    """Base class of metrics that compare an image with its prompt; subclasses implement the formula."""

    def __init__(self, config: ClipTextConfig, *, device: str = "cpu") -> None:
        """Load the model.

        Raises:
            RewardConfigError: the model or its tokenizer is missing, unreachable or incomplete.
        """
        self._config = config
        self._clip = ClipBackbone(
            config.weights, name=config.name, texts=True, tokenizer=config.tokenizer, device=device
        )

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise NotImplementedError

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image against its prompt.

        Args:
            images: float32 RGB in [0, 1], shape (B, 3, H, W).
            prompts: one per image.

        Returns:
            Raw scores (B,), float32.

        Raises:
            RewardError: the images are invalid, or an image has no prompt.
        """
        check_images(images, name=self._config.name)
        check_prompts(prompts, len(images), name=self._config.name)
        return self._score(images, prompts)

    def cosine(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosine between each image (B, 3, H, W) and its own text, (B,)."""
        vectors = self._clip.image_vectors(self._clip.single_view(images))
        return (vectors * self._clip.text_vectors(texts)).sum(-1)


class ClipScore(ClipTextMetric):
    """CLIPScore, 2.5 max(cos, 0), in [0, 2.5]; the gradient is zero where the cosine is negative.

    Source: Hessel et al. (EMNLP 2021), eq. 1 and the prefix of its section 3.
    """

    Config = ClipScoreConfig

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert isinstance(self._config, self.Config)
        texts = [self._config.prefix + prompt for prompt in prompts]
        return 2.5 * self.cosine(images, texts).clamp(min=0)


class PickScore(ClipTextMetric):
    """Preference e^s cos of a CLIP fine-tuned on human choices; only differences between scores are meaningful.

    Supports PickScore (Kirstain et al. 2023) and other models of this form, such as HPS, saved as a transformers CLIP.
    """

    Config = PickScoreConfig

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._clip.scale * self.cosine(images, prompts)


class Aesthetic:
    """A head of linear layers on the unit vector of an image, in the head's own unit (LAION's: about 1 to 10)."""

    Config = AestheticConfig

    def __init__(self, config: AestheticConfig, *, device: str = "cpu") -> None:
        """Load head and model.

        Raises:
            RewardConfigError: the head or the model is missing, or their dimensions do not match.
        """
        if reason := config.unusable():
            raise RewardConfigError(f"`{config.name}`: {reason}.")
        self._name = config.name
        self._head = read_head(Path(config.weights).expanduser(), config.activation, name=config.name).to(device)
        self._clip = ClipBackbone(config.clip, name=config.name, texts=False, device=device)
        first = next(layer for layer in self._head if isinstance(layer, nn.Linear))
        if first.in_features != self._clip.width:
            raise RewardConfigError(
                f"`{config.name}`: the head in {config.weights} takes vectors of {first.in_features} numbers, "
                f"`{config.clip}` gives {self._clip.width}: set `clip` to the model of the head."
            )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images; the prompts are ignored.

        Args:
            images: float32 RGB in [0, 1], shape (B, 3, H, W).
            prompts: one per image.

        Returns:
            Raw scores (B,), float32, in the head's unit.

        Raises:
            RewardError: the images are invalid.
        """
        check_images(images, name=self._name)
        return self._head(self._clip.image_vectors(self._clip.single_view(images))).squeeze(-1)


def read_head(path: Path, activation: str, *, name: str) -> nn.Sequential:
    """Linear layers from a safetensors file, frozen, in float32: (N, D) -> (N, 1).

    Raises:
        RewardConfigError: the file holds other tensors, or the dimensions of consecutive layers do not match.
    """
    try:
        state = load_file(path)
        order = sorted((int(found[1]), key) for key in state if (found := re.search(r"(\d+)\.weight$", key)))
        weights = [state.pop(key) for _, key in order]
        biases = [state.pop(key.removesuffix("weight") + "bias") for _, key in order]
        widths = [*(weight.shape[1] for weight in weights), 1]
        if not weights or state or [weight.shape[0] for weight in weights] != widths[1:]:
            raise ValueError("expected only linear layers `N.weight`, `N.bias`, of which the last returns one number")
        layers: list[nn.Module] = []
        for weight, bias in zip(weights, biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers += [layer, {"none": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU}[activation]()]
    except (SafetensorError, OSError, RuntimeError, KeyError, IndexError, ValueError) as error:
        raise RewardConfigError(f"`{name}`: {path} does not hold an aesthetic head: {error}") from error
    return nn.Sequential(*layers[:-1]).eval().requires_grad_(False)
