"""LoRA scale at inference, from the base model (0) to the tuned model (1), optionally by timestep range."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from acpo_dist.core.errors import ModelError, UsageError
from acpo_dist.models.lora_files import check_lora_file

_NAME = "tuned"
_TIMESTEPS = ("UNet2DConditionModel", "SD3Transformer2DModel")
"""Networks whose pipelines call them with timesteps from 0 to 1000; other transformers take shares of the schedule."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """LoRA scale for timesteps from `low` to `high`, both included."""

    low: float
    high: float
    scale: float


def parse_range(text: str) -> Range:
    """Parse `t0:t1:scale`; the two timesteps may come in either order.

    Raises:
        UsageError: another form, or a scale outside 0..1.
    """
    try:
        first, second, scale = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise UsageError(f"--lora-scale-range must read t0:t1:scale, such as 0:300:0.5, found `{text}`") from error
    check_scale(scale, "--lora-scale-range")
    return Range(low=min(first, second), high=max(first, second), scale=scale)


def parse_grid(text: str) -> tuple[float, ...]:
    """Parse comma-separated LoRA scales.

    Raises:
        UsageError: not numbers, or a scale outside 0..1.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--grid must be comma-separated numbers, such as 0,0.5,1, found `{text}`") from error
    for value in values:
        check_scale(value, "--grid")
    return values


def check_scale(value: float, option: str) -> None:
    """Refuse a LoRA scale outside 0..1.

    Args:
        value: the scale.
        option: command line option that set it, for the message.

    Raises:
        UsageError: outside 0..1.
    """
    if not 0 <= value <= 1:
        raise UsageError(f"{option}: a LoRA scale is between 0 (base model) and 1 (tuned model), found {value:g}")


class LoraScale:
    """Scales a LoRA loaded into a diffusers pipeline, optionally by timestep; scale 0 is the base model bit for bit.

    Text encoder layers in the file get the same scale. A prompt is encoded once for all timesteps, so they cannot have
    a scale by timestep.
    """

    def __init__(self, pipeline: Any, path: Path) -> None:
        """Load a LoRA file into the network, and into the text encoders if it has layers for them.

        Args:
            pipeline: a diffusers pipeline with `load_lora_weights`.
            path: safetensors file, or a folder with `pytorch_lora_weights.safetensors`.

        Raises:
            ModelError: the file cannot be read, or belongs to another architecture.
        """
        if not hasattr(pipeline, "load_lora_weights"):
            raise ModelError(f"--lora: {type(pipeline).__name__} does not support LoRA.")
        file = _lora_file(path)
        network: Any = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
        expected, texts = check_lora_file(file, network)
        try:
            with _quiet():
                pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=_NAME)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"--lora: {file} does not fit this network (another architecture): {reason}") from error
        self._layers = _scaled_layers(network)
        encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
        self._text_layers = [pair for encoder in encoders if encoder is not None for pair in _scaled_layers(encoder)]
        for found, wanted, what in ((self._layers, expected, "network"), (self._text_layers, texts, "text encoders")):
            if len(found) != wanted:
                raise ModelError(
                    f"--lora: {file} has {wanted} layers for the {what}, and {len(found)} of them exist in this model: "
                    "it belongs to another architecture."
                )
        self._file, self._scale, self._ranges = file, 1.0, tuple[Range, ...]()
        self._kind = type(network).__name__
        network.register_forward_pre_hook(self._before, with_kwargs=True)

    def set(self, scale: float, ranges: Sequence[Range] = ()) -> None:
        """Set the scale of the following pipeline calls.

        Args:
            scale: LoRA scale in 0..1.
            ranges: scales for ranges of timesteps; the last range that contains a timestep applies.

        Raises:
            UsageError: ranges for a file that also adapts text encoders, or for a network that counts time otherwise.
        """
        if ranges and self._kind not in _TIMESTEPS:
            raise UsageError(
                f"--lora-scale-range: {self._kind} is not called with timesteps from 0 to 1000. Use --lora-scale."
            )
        if ranges and self._text_layers:
            raise UsageError(
                f"--lora-scale-range: {self._file} also adapts text encoders, and a prompt is encoded once for all "
                "timesteps. Use --lora-scale, or a LoRA without layers for them."
            )
        self._scale, self._ranges = scale, tuple(ranges)
        _turn(self._text_layers, scale)

    def at(self, timestep: float) -> float:
        """LoRA scale at a timestep."""
        found = [entry.scale for entry in self._ranges if entry.low <= timestep <= entry.high]
        return found[-1] if found else self._scale

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._ranges:
            _turn(self._layers, self._scale)
            return
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        # Pipelines pass one timestep per call for the whole batch.
        scale = self.at(float(timestep.reshape(-1)[0]) if hasattr(timestep, "reshape") else float(timestep))
        _turn(self._layers, scale)


def _scaled_layers(network: Any) -> list[tuple[Any, float]]:
    """(module, its own LoRA scaling) for each module that the file adapts."""
    # `scaling` is not declared on the base class of peft's tuner layers.
    found: list[Any] = [
        module
        for module in network.modules()
        if isinstance(module, BaseTunerLayer) and _NAME in getattr(module, "scaling", {})
    ]
    return [(layer, float(layer.scaling[_NAME])) for layer in found]


def _turn(layers: Sequence[tuple[Any, float]], scale: float) -> None:
    for layer, own in layers:
        # Disabled rather than multiplied by 0: the image equals the base model's bit for bit.
        layer._disable_adapters = scale == 0
        layer.scaling[_NAME] = own * scale


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warning of diffusers that a U-Net LoRA has no text encoder layers."""
    logger = logging.getLogger("diffusers.loaders.lora_base")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _lora_file(path: Path) -> Path:
    """The file itself, or the file that diffusers loads from a folder."""
    if path.is_file():
        return path
    inside = path / "pytorch_lora_weights.safetensors"
    if inside.is_file():
        return inside
    raise ModelError(f"--lora: expected a safetensors file or a folder with {inside.name}, found nothing at {path}")
