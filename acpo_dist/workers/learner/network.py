"""The policy as an algorithm sees it: a model family, and the frozen encoder where one is asked for."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from acpo_dist.algorithms.base import EncoderConfig
from acpo_dist.models.family import Condition, ModelFamily
from acpo_dist.models.ncp import NcpEncoder


class PolicyNetwork:
    """Satisfies `algorithms.base.Network`."""

    def __init__(self, family: ModelFamily, encoder: EncoderConfig | None) -> None:
        """Copy the encoder out of the base weights: before a checkpoint is put in, and before DeepSpeed shards them.

        Raises:
            ModelError: the family's network has no such encoder.
        """
        self._family = family
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Arithmetic of the network's own forwards, and of nothing else: embeddings, formulas, the decoder and metrics
        in this process would be rounded too, and no longer be those of calibration or of a pool elsewhere."""
        self._encoder = (
            NcpEncoder(family.network, output=encoder.output, checkpointing=encoder.checkpointing) if encoder else None
        )

    @property
    def prediction_type(self) -> str:
        """See `Network.prediction_type`."""
        return self._family.prediction_type

    @property
    def alpha_bars(self) -> Tensor:
        """See `Network.alpha_bars`."""
        return self._family.alpha_bars

    def encode(self, prompts: Sequence[str]) -> Condition:
        """See `Network.encode`."""
        return self._family.encode(prompts)

    def predict(self, noisy: Tensor, timesteps_B: Tensor, condition: Condition) -> Tensor:
        """See `Network.predict`."""
        with self.autocast():
            return self._family.predict(noisy, timesteps_B, condition)

    def anchored(self) -> AbstractContextManager[None]:
        """See `Network.anchored`."""
        return self._family.anchored()

    def features(self, latents: Tensor, timesteps_B: Tensor, condition: Condition) -> Sequence[Tensor]:
        """See `Network.features`.

        Raises:
            RuntimeError: the algorithm's configuration asked for no encoder.
        """
        if self._encoder is None:
            raise RuntimeError("features were asked for, but the algorithm's configuration names no encoder")
        return self._encoder.features(latents, timesteps_B, condition)
