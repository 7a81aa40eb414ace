"""Interfaces of model families, used by rollout, learner and reward workers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from acpo_dist.core.allocator import return_freed_memory
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.core.sizes import Size
from acpo_dist.diffusion.clean_rule import CleanRule
from acpo_dist.models.noise_levels import NoiseSchedule

CHUNKS = "chunks"
"""Number of chunks of each prompt, int64 (B,) on the CPU; absent if all have one."""


@dataclass(frozen=True)
class Condition:
    """Conditioning tensors of B samples, by diffusers' argument names; empty for an unconditional model."""

    tensors: Mapping[str, Tensor]
    padding: Tensor | None = None
    """States of an empty chunk, (1, length, D), with which a shorter prompt is extended; None if no prompt has several
    chunks."""

    def where_null(self, is_null_B: Tensor, null: "Condition") -> "Condition":
        """Replace the condition of selected samples by the null condition.

        Args:
            is_null_B: samples to replace, bool, shape (B,).
            null: the null condition, broadcast over the batch.
        """
        own, null = _of_one_length(self, null)
        mixed = {}
        for name, value in own.tensors.items():
            if name not in null.tensors:
                # Original size and crop of a real image do not depend on the prompt.
                mixed[name] = value
                continue
            mask = is_null_B.reshape(-1, *[1] * (value.ndim - 1)).to(value.device)
            mixed[name] = torch.where(mask, null.tensors[name], value)
        return Condition(mixed, own.padding)

    def join(self, other: "Condition") -> "Condition":
        """Concatenate two batches along the first axis; where a prompt has several chunks, row by row as long."""
        own, other = _of_one_length(self, other)
        joined = {name: torch.cat([value, other.tensors[name]]) for name, value in own.tensors.items()}
        return Condition(joined, own.padding)

    def mask(self, device: torch.device | str) -> Tensor | None:
        """Return the states that belong to each prompt, bool (B, length); None if all prompts are equally long."""
        chunks = self.tensors.get(CHUNKS)
        if chunks is None or int(chunks.min()) == int(chunks.max()):
            return None
        length = self.tensors["prompt_embeds"].shape[1]
        ends = chunks[:, None] * (length // int(chunks.max()))
        return (torch.arange(length)[None] < ends).to(device)


def _of_one_length(first: Condition, second: Condition) -> tuple[Condition, Condition]:
    """Extend the shorter prompt of each pair of rows by empty chunks, so that guidance compares equal lengths."""
    if CHUNKS not in first.tensors and CHUNKS not in second.tensors:
        return first, second
    counts = [
        condition.tensors.get(CHUNKS, torch.ones(len(condition.tensors["prompt_embeds"]), dtype=torch.long))
        for condition in (first, second)
    ]
    wanted = torch.maximum(*counts)
    padding = (
        second.padding if first.padding is None else first.padding,
        (first.padding if second.padding is None else second.padding),
    )
    return (
        _extended(first, counts[0], wanted, padding[0]),
        _extended(second, counts[1], wanted, padding[1]),
    )


def _extended(condition: Condition, counts_B: Tensor, wanted_B: Tensor, padding: Tensor | None) -> Condition:
    assert padding is not None, "a condition of several chunks has the states of an empty one"
    states, length = condition.tensors["prompt_embeds"], padding.shape[1]
    most = int(wanted_B.max())
    rows = []
    for row, (count, target) in enumerate(zip(counts_B.tolist(), wanted_B.tolist(), strict=True)):
        own = states[row, : count * length]
        rest = own.new_zeros((most - target) * length, own.shape[1])
        rows.append(torch.cat([own, *[padding[0].to(own)] * (target - count), rest]))
    return Condition({**condition.tensors, "prompt_embeds": torch.stack(rows), CHUNKS: wanted_B}, padding)


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

    def sized(self, condition: Condition, noisy: Tensor) -> Condition:
        """Add the conditioning that depends on the size of the samples, unless `condition` has it.

        Args:
            condition: result of `encode`.
            noisy: x_t, shape (B, C, H, W).
        """
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
    """(C, H, W) of x_0 at `size`."""
    size: Size
    """(width, height) of the images in pixels; the first one if the configuration has several."""

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

    def shape_of(self, size: Size | None) -> tuple[int, int, int]:
        """Return (C, H, W) of x_0 for images of a size (width, height); None is the model's own."""
        ...

    def decode(self, clean: Tensor) -> Tensor:
        """Decode x_0 to RGB around [0, 1], float32, not clipped, differentiable."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode images to x_0, without gradients.

        Args:
            pixels: RGB in [0, 1], shape (B, 3, height, width).

        Returns:
            x_0, shape (B, C, H, W), float32.
        """
        ...

    def release(self) -> None:
        """Move what `memory.offload` keeps in host memory there, until its next use."""
        ...

    def save_pipeline(self, folder: Path) -> None:
        """Write a folder for diffusers' `DiffusionPipeline.from_pretrained`, with the tuned weights merged."""
        ...


def load_family(model: Any, *, device: str, trainable: bool) -> Any:
    """Load a model with all its components, as a worker does, and return the memory of intermediate copies.

    Args:
        model: the `model` section.
        device: torch device.
        trainable: as in `ModelFamily.load`.
    """
    family = resolve("model", MODELS, model.type).load(model, device=device, trainable=trainable)
    return_freed_memory()
    return family


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
