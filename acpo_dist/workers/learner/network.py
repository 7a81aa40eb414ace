"""Implementation of `algorithms.base.Network` on a model family, with an optional frozen encoder."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor
from typing_extensions import override

from acpo_dist.algorithms.base import Network
from acpo_dist.config.plugins import EncoderConfig
from acpo_dist.core.errors import ModelError
from acpo_dist.diffusion.clean_rule import CleanRule
from acpo_dist.models.family import Condition, Denoiser
from acpo_dist.models.ncp import NcpEncoder


class PolicyNetwork(Network):
    """`algorithms.base.Network` on a model family."""

    def __init__(self, family: Denoiser, encoder: EncoderConfig | None) -> None:
        """Copy the encoder from the base weights, before a checkpoint is loaded and before DeepSpeed shards them.

        Raises:
            ModelError: the family's network has no such encoder, or the model is a flow model.
        """
        if encoder is not None and family.prediction_type == "flow_prediction":
            raise ModelError(
                "algorithm.space is ncp, and the model is a flow model: NCP compares states after one reverse step of "
                "a discrete schedule, which divides by a = 1 - sigma and is undefined at sigma 1. Set "
                "algorithm.space=eps, whose errors are those of the velocity."
            )
        self._family = family
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Autocast context of the network's forward passes only; with a wider scope embeddings, formulas, the
        decoder and metrics in this process would be rounded too, and differ from calibration and from a pool in
        another process."""
        self.old_weights: Mapping[str, Tensor] | None = None
        """Trainable weights of the old policy, on the device; None while they equal the policy's."""
        self._encoder = (
            NcpEncoder(family.network, output=encoder.output, checkpointing=encoder.checkpointing) if encoder else None
        )

    @property
    def encoder_weights(self) -> list[Tensor]:
        """Weights of the frozen encoder; empty without one."""
        return list(self._encoder.network.parameters()) if self._encoder is not None else []

    @property
    @override
    def prediction_type(self) -> str:
        return self._family.prediction_type

    @property
    @override
    def clean_rule(self) -> CleanRule:
        return self._family.clean_rule

    @property
    @override
    def alpha_bars(self) -> Tensor:
        return self._family.alpha_bars

    @override
    def encode(self, prompts: Sequence[str], conditioning: Mapping[str, Tensor] | None = None) -> Condition:
        condition = self._family.encode(prompts)
        return replace(condition, tensors={**condition.tensors, **conditioning}) if conditioning else condition

    @override
    def predict(self, noisy: Tensor, timesteps_B: Tensor, condition: Condition) -> Tensor:
        with self.autocast():
            return self._family.predict(noisy, timesteps_B, condition)

    @override
    def anchored(self) -> AbstractContextManager[None]:
        return self._family.anchored()

    @override
    def old(self) -> AbstractContextManager[None]:
        return nullcontext() if self.old_weights is None else self._family.substituted(self.old_weights)

    @override
    def features(self, latents: Tensor, timesteps_B: Tensor, condition: Condition) -> Sequence[Tensor]:
        """Return features of the frozen encoder.

        Raises:
            RuntimeError: the algorithm's configuration has no `encoder`.
        """
        if self._encoder is None:
            raise RuntimeError("features need an encoder, and the algorithm's configuration has none")
        return self._encoder.features(latents, timesteps_B, self._family.sized(condition, latents))
