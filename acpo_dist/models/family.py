"""Interfaces of model families, used by rollout, learner and reward workers."""

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
    """Conditioning tensors of B samples, by diffusers' argument names; empty for an unconditional model."""

    tensors: Mapping[str, Tensor]

    def where_null(self, is_null_B: Tensor, null: "Condition") -> "Condition":
        """Replace the condition of selected samples by the null condition.

        Args:
            is_null_B: samples to replace, bool, shape (B,).
            null: the null condition, broadcast over the batch.
        """
        mixed = {}
        for name, value in self.tensors.items():
            mask = is_null_B.reshape(-1, *[1] * (value.ndim - 1)).to(value.device)
            mixed[name] = torch.where(mask, null.tensors[name], value)
        return Condition(mixed)

    def join(self, other: "Condition") -> "Condition":
        """Concatenate two batches along the first axis."""
        return Condition({name: torch.cat([value, other.tensors[name]]) for name, value in self.tensors.items()})


class Decoder(Protocol):
    """Converts x_0 to pixels."""

    def decode(self, clean: Tensor) -> Tensor:
        """Decode x_0 to images.

        Args:
            clean: x_0, shape (B, C, H, W).

        Returns:
            RGB around [0, 1], shape (B, 3, H', W'), float32, not clipped, differentiable.
        """
        ...


class Denoiser(Protocol):
    """The part of a model that a learner uses: network, anchor and conditioning."""

    network: nn.Module
    """The trained network, as passed to the optimiser or to DeepSpeed."""
    alpha_bars: Tensor
    """Cumulative signal fraction by timestep, float64, shape (T,)."""
    prediction_type: str
    clean_rule: CleanRule
    """The x_0 rule of the model's scheduler."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts, with caching; the empty prompt gives the null condition."""
        ...

    def predict(self, noisy: Tensor, timesteps_B: Tensor, condition: Condition) -> Tensor:
        """Run the network.

        Args:
            noisy: x_t, shape (B, C, H, W), float32.
            timesteps_B: timestep per sample.
            condition: conditioning of the B samples.

        Returns:
            Network output in float32, same shape as `noisy`.
        """
        ...

    def anchored(self) -> AbstractContextManager[None]:
        """Context in which `predict` runs the frozen base model."""
        ...

    def substituted(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Context in which `predict` uses the given values of the trainable weights, without gradients.

        Args:
            weights: values by parameter name.
        """
        ...


class ModelFamily(Denoiser, Protocol):
    """A loaded model: trainable network, frozen anchor, conditioning and decoder."""

    conditional: ClassVar[bool]
    pixel_space: ClassVar[bool]
    """Whether x_0 is the image, so that real images can be noised without an encoder."""
    schedule: NoiseSchedule
    """The noise schedule, from which trajectories are created."""
    device: str
    sample_shape: tuple[int, int, int]
    """(C, H, W) of x_0."""
    pixels: int
    """Height and width of the images in pixels."""

    @classmethod
    def check(cls, config: Any) -> None:
        """Check the configured path without loading the model.

        Raises:
            ModelError: the path is not a model of this family.
        """
        ...

    @classmethod
    def load(cls, config: Any, *, device: str, trainable: bool) -> "ModelFamily":
        """Load the model from the configured path.

        Args:
            config: the `model` section.
            device: torch device.
            trainable: whether the weights are trained (learner) or only sampled from (rollout).

        Raises:
            ModelError: the model is missing, cannot be read, or does not belong to this family.
        """
        ...

    @classmethod
    def load_decoder(cls, config: Any, *, device: str) -> Decoder:
        """Load the decoder only, for a reward worker."""
        ...

    def decode(self, clean: Tensor) -> Tensor:
        """Decode x_0 to RGB around [0, 1], float32, not clipped, differentiable."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode images to x_0, without gradients.

        Args:
            pixels: RGB in [0, 1], shape (B, 3, `pixels`, `pixels`).

        Returns:
            x_0, shape (B, C, H, W), float32.
        """
        ...

    def save_pipeline(self, folder: Path) -> None:
        """Write a folder for diffusers' `DiffusionPipeline.from_pretrained`, with the tuned weights merged."""
        ...


def trainable_tensors(network: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters of a network, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def copy_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy values into the trainable parameters of a network.

    Args:
        network: the network; its parameters keep data type and device.
        weights: values by parameter name.

    Raises:
        ValueError: names or shapes differ from those of the trainable parameters; nothing is copied.
    """
    own = trainable_tensors(network)
    odd = sorted(set(own) ^ set(weights)) or [name for name, value in own.items() if weights[name].shape != value.shape]
    if odd:
        raise ValueError(f"names or shapes differ from those of the trainable parameters, such as {odd[:5]}")
    for name, parameter in own.items():
        parameter.copy_(weights[name])


@contextmanager
def switched(attribute_owners: Sequence[Any], attribute: str, value: object) -> Iterator[None]:
    """Context that sets an attribute of several objects and restores the old values on exit.

    Args:
        attribute_owners: the objects.
        attribute: name of the attribute.
        value: value within the context.
    """
    before = [getattr(owner, attribute) for owner in attribute_owners]
    for owner in attribute_owners:
        setattr(owner, attribute, value)
    try:
        yield
    finally:
        for owner, old in zip(attribute_owners, before, strict=True):
            setattr(owner, attribute, old)
