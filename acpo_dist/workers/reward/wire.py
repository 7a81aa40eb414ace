"""Tensors between learner and reward pool, in half precision with a power-of-two scale per sample."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_LARGEST_EXPONENT = 126
"""Largest e for which 2**e and 2**-e are normal float32 numbers."""


@dataclass(frozen=True)
class WireTensor:
    """A packed tensor: `data * 2**exponent` per sample."""

    data: np.ndarray
    exponent: np.ndarray
    """int16 of shape (B,)."""

    @property
    def nbytes(self) -> int:
        """Size in bytes on the wire."""
        return self.data.nbytes + self.exponent.nbytes

    def rows(self, start: int, stop: int) -> "WireTensor":
        """Return the samples from `start` to `stop`, exclusive."""
        return WireTensor(self.data[start:stop], self.exponent[start:stop])


def pack(tensor: Tensor, dtype: str) -> WireTensor:
    """Scale each sample by a power of two to a largest magnitude in [1, 2), then round to `dtype`.

    Samples whose largest magnitude is below 1e-38 stay below 1: a larger factor exceeds the range of float32.

    Reward gradients per pixel are 1e-7 and smaller, where float16 is subnormal or zero; with the scale the relative
    rounding error is 2e-4 for any magnitude.

    Args:
        tensor: (B, ...), finite.
        dtype: `float16` or `float32`.
    """
    values = tensor.detach().to(device="cpu", dtype=torch.float32)
    if dtype == "float32":
        return WireTensor(values.numpy(), np.zeros(len(values), np.int16))
    peak = values.flatten(1).abs().amax(1)
    exponent = torch.where(peak > 0, torch.frexp(peak).exponent - 1, torch.zeros_like(peak, dtype=torch.int32))
    exponent = exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    scaled = torch.ldexp(values, -exponent.reshape(-1, *[1] * (values.ndim - 1)))
    return WireTensor(scaled.to(torch.float16).numpy(), exponent.to(torch.int16).numpy())


def unpack(wire: WireTensor) -> Tensor:
    """Return the unpacked tensor in float32."""
    values = torch.from_numpy(np.array(wire.data, copy=True)).float()
    exponent = torch.from_numpy(wire.exponent.astype(np.int32)).reshape(-1, *[1] * (values.ndim - 1))
    return torch.ldexp(values, exponent)


def join(parts: Sequence[WireTensor]) -> WireTensor:
    """Concatenate tensors of one shape and type; each sample keeps its own scale."""
    if len(parts) == 1:
        return parts[0]
    return WireTensor(np.concatenate([part.data for part in parts]), np.concatenate([part.exponent for part in parts]))
