"""The anchor's strength at inference: between the base model's weights (0) and the tuned ones (1), also by timestep."""

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


@dataclass(frozen=True, kw_only=True)
class Range:
    """A strength for timesteps from `low` to `high`, both included."""

    low: float
    high: float
    scale: float


def parse_range(text: str) -> Range:
    """`t0:t1:a`, in any order of the timesteps.

    Raises:
        UsageError: not of this form, or the strength is outside 0..1.
    """
    try:
        first, second, scale = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise UsageError(f"--strength-range must read t0:t1:a, such as 0:300:0.5, found `{text}`") from error
    check_scale(scale, "--strength-range")
    return Range(low=min(first, second), high=max(first, second), scale=scale)


def parse_grid(text: str) -> tuple[float, ...]:
    """Strengths with commas between them.

    Raises:
        UsageError: no numbers, or one outside 0..1.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--grid must read as numbers with commas, such as 0,0.5,1, found `{text}`") from error
    for value in values:
        check_scale(value, "--grid")
    return values


def check_scale(value: float, option: str) -> None:
    """Refuse what is no place between base and tuned.

    Raises:
        UsageError: outside 0..1.
    """
    if not 0 <= value <= 1:
        raise UsageError(f"{option}: a strength lies between 0 (base model) and 1 (tuned), found {value:g}")


class LoraScale:
    """LoRA in a pipeline with a strength that may depend on the timestep; at 0 the base model itself answers.

    Text encoders that the file adapts too have the same strength. They are asked once for all timesteps.
    """

    def __init__(self, pipeline: Any, path: Path) -> None:
        """Load the file into the pipeline's U-Net, and into its text encoders where it has layers for them.

        Raises:
            ModelError: the file cannot be read, or is made for another architecture.
        """
        if not hasattr(pipeline, "load_lora_weights"):
            raise ModelError(f"--lora: a {type(pipeline).__name__} takes no LoRA.")
        file = _lora_file(path)
        expected, texts = check_lora_file(file, pipeline.unet)
        try:
            with _quiet():
                pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=_NAME)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"--lora: {file} does not fit the U-Net, it belongs to another one: {reason}") from error
        self._layers = _scaled_layers(pipeline.unet)
        encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
        self._text_layers = [pair for encoder in encoders if encoder is not None for pair in _scaled_layers(encoder)]
        for found, wanted, what in ((self._layers, expected, "U-Net"), (self._text_layers, texts, "text encoders")):
            if len(found) != wanted:
                raise ModelError(
                    f"--lora: {file} holds {wanted} layers for the {what}, but {len(found)} of them have a place here: "
                    "it belongs to another architecture."
                )
        self._file, self._scale, self._ranges = file, 1.0, tuple[Range, ...]()
        pipeline.unet.register_forward_pre_hook(self._before, with_kwargs=True)

    def set(self, scale: float, ranges: Sequence[Range] = ()) -> None:
        """Use this strength; of several ranges that hold a timestep the last one counts.

        Raises:
            UsageError: ranges for a file that adapts text encoders, which know no timestep.
        """
        if ranges and self._text_layers:
            raise UsageError(
                f"--strength-range: {self._file} adapts text encoders too, and a text is encoded once for all "
                "timesteps. Use one --anchor-strength, or a LoRA of the U-Net alone."
            )
        self._scale, self._ranges = scale, tuple(ranges)
        _turn(self._text_layers, scale)

    def at(self, timestep: float) -> float:
        """The strength for a timestep."""
        found = [entry.scale for entry in self._ranges if entry.low <= timestep <= entry.high]
        return found[-1] if found else self._scale

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        # One number per call in every pipeline; batches share it.
        scale = self.at(float(timestep.reshape(-1)[0]) if hasattr(timestep, "reshape") else float(timestep))
        _turn(self._layers, scale)


def _scaled_layers(network: Any) -> list[tuple[Any, float]]:
    """Modules of a network that the file adapts, each with its own scale at full strength."""
    # LoRA's own attributes are unknown to the type that all tuners share.
    found: list[Any] = [
        module
        for module in network.modules()
        if isinstance(module, BaseTunerLayer) and _NAME in getattr(module, "scaling", {})
    ]
    return [(layer, float(layer.scaling[_NAME])) for layer in found]


def _turn(layers: Sequence[tuple[Any, float]], scale: float) -> None:
    for layer, own in layers:
        # Off, not a weight of 0: the base model's image to the bit.
        layer._disable_adapters = scale == 0
        layer.scaling[_NAME] = scale * own


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers warns at length of text encoders that a U-Net's LoRA says nothing about."""
    logger = logging.getLogger("diffusers.loaders.lora_base")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _lora_file(path: Path) -> Path:
    """A file as it is; of a folder the one file in it that diffusers would take."""
    if path.is_file():
        return path
    inside = path / "pytorch_lora_weights.safetensors"
    if inside.is_file():
        return inside
    raise ModelError(f"--lora: expected a safetensors file or a folder with {inside.name}, found nothing at {path}")
