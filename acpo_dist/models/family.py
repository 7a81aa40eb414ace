"""The interface of model families that rollout, learner and reward workers use."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from acpo_dist.diffusion.clean_rule import CleanRule
from acpo_dist.models.noise_levels import NoiseSchedule


@dataclass(frozen=True)
class Condition:
    """Conditioning of B samples, by diffusers' names; empty for an unconditional model."""

    tensors: Mapping[str, Tensor]

    def where_null(self, is_null_B: Tensor, null: "Condition") -> "Condition":
        """Replace the condition of the marked samples by the null prompt's."""
        mixed = {}
        for name, value in self.tensors.items():
            mask = is_null_B.reshape(-1, *[1] * (value.ndim - 1)).to(value.device)
            mixed[name] = torch.where(mask, null.tensors[name], value)
        return Condition(mixed)

    def join(self, other: "Condition") -> "Condition":
        """Concatenate two batches."""
        return Condition({name: torch.cat([value, other.tensors[name]]) for name, value in self.tensors.items()})


class Decoder(Protocol):
    """From x_0 to pixels."""

    def decode(self, clean: Tensor) -> Tensor:
        """x_0 (B, C, H, W) -> RGB pixels around [0, 1], float32, not clipped, differentiable."""
        ...


class Denoiser(Protocol):
    """The part of a loaded model that a learner runs: network, anchor and conditioning."""

    network: nn.Module
    """The network that trains, as the optimiser or DeepSpeed gets it."""
    alpha_bars: Tensor
    """Cumulative signal fraction by timestep, float64, shape (T,)."""
    prediction_type: str
    clean_rule: CleanRule
    """What the model's scheduler does to x0-hat before a step."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Conditioning of prompts, cached; the empty prompt is the null condition."""
        ...

    def predict(self, noisy: Tensor, timesteps_B: Tensor, condition: Condition) -> Tensor:
        """Network output in float32, same shape as `noisy`."""
        ...

    def anchored(self) -> AbstractContextManager[None]:
        """While active, `predict` runs the frozen base model."""
        ...

    def substituted(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """While active, `predict` runs with these values of the trainable weights; without gradient."""
        ...


class ModelFamily(Denoiser, Protocol):
    """One loaded model: a trainable network, its frozen anchor, its conditioning and its decoder."""

    conditional: ClassVar[bool]
    pixel_space: ClassVar[bool]
    """Whether x_0 is the image itself, so that real images can be noised without an encoder."""
    schedule: NoiseSchedule
    """The scheduler's configuration, from which trajectories are made."""
    device: str
    sample_shape: tuple[int, int, int]
    """(C, H, W) of x_0."""
    pixels: int
    """Height and width of its images."""

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a path that cannot be a model, without loading anything.

        Raises:
            ModelError: found and expected kind of path.
        """
        ...

    @classmethod
    def load(cls, config: Any, *, device: str, trainable: bool) -> "ModelFamily":
        """Load from the configured path.

        Raises:
            ModelError: missing, unreadable or unfitting, with what to do.
        """
        ...

    @classmethod
    def load_decoder(cls, config: Any, *, device: str) -> Decoder:
        """The decoder alone, for a reward worker."""
        ...

    def decode(self, clean: Tensor) -> Tensor:
        """As `Decoder.decode`."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """RGB in [0, 1], (B, 3, pixels, pixels) -> x_0 (B, C, H, W), float32, without gradient."""
        ...

    def save_pipeline(self, folder: Path) -> None:
        """Write a folder that diffusers' `DiffusionPipeline.from_pretrained` opens, tuned weights merged in."""
        ...


def trainable_tensors(network: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that train, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def copy_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy values into the trainable parameters of a network.

    Args:
        network: its parameters keep their type and device.
        weights: values by parameter name.

    Raises:
        ValueError: names or shapes are not those of the trainable parameters; nothing is copied then.
    """
    own = trainable_tensors(network)
    odd = sorted(set(own) ^ set(weights)) or [name for name, value in own.items() if weights[name].shape != value.shape]
    if odd:
        raise ValueError(f"names or shapes differ from those of the trainable parameters, such as {odd[:5]}")
    for name, parameter in own.items():
        parameter.copy_(weights[name])


@contextmanager
def switched(attribute_owners: Sequence[Any], attribute: str, value: object) -> Iterator[None]:
    """Set an attribute on several objects, and put the old values back."""
    before = [getattr(owner, attribute) for owner in attribute_owners]
    for owner in attribute_owners:
        setattr(owner, attribute, value)
    try:
        yield
    finally:
        for owner, old in zip(attribute_owners, before, strict=True):
            setattr(owner, attribute, old)
