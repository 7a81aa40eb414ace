"""Streaming statistics of the prediction error. Statistics of different shards are merged by addition.

K nodes, C channels, n images. e is the error of the predicted noise of one image at one node; statistics per image are
means over its elements. All values are float64. All nodes use the same noise for an image, so the errors at
neighbouring nodes are correlated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.levels import FloatArray
from acpo_dist.vrg.table import ErrorTable


@dataclass(frozen=True, kw_only=True, eq=False)
class ErrorSums:
    """Sums over n images at K nodes."""

    sigmas: FloatArray
    """(K,), ascending."""
    count: int
    square_K: FloatArray
    """Sum of m = mean e^2."""
    square2_K: FloatArray
    """Sum of m^2."""
    fourth_K: FloatArray
    """Sum of mean e^4."""
    channel_KC: FloatArray
    """Sum of the mean error per channel."""
    channel2_KC: FloatArray
    """Sum of its square."""
    gram_KK: FloatArray
    """Sum of mean (e_k e_l)."""
    clipped_K: FloatArray
    """Sum of the share of x0-hat's elements that the scheduler's x_0 rule changed."""

    def __add__(self, other: "ErrorSums") -> "ErrorSums":
        """Merge the sums of two sets of images.

        Raises:
            VrgError: the nodes differ.
        """
        if not np.array_equal(self.sigmas, other.sigmas):
            raise VrgError("error sums of different nodes cannot be merged; measure them on the same sigmas.")
        added = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "sigmas"}
        return ErrorSums(sigmas=self.sigmas, **added)

    @property
    def v(self) -> FloatArray:
        """Mean squared error per element, shape (K,)."""
        return self.square_K / self.count

    @property
    def standard_errors(self) -> FloatArray:
        """Standard error of `v` over images, shape (K,); infinite for fewer than two images."""
        if self.count < 2:
            return np.full_like(self.square_K, np.inf)
        variance = (self.square2_K - self.square_K**2 / self.count) / (self.count - 1)
        return np.sqrt(np.maximum(variance, 0) / self.count)

    @property
    def clipped(self) -> FloatArray:
        """Share of x0-hat's elements that the scheduler's x_0 rule changed, in [0, 1], shape (K,)."""
        return self.clipped_K / self.count

    def table(self, provenance: Mapping[str, Any]) -> ErrorTable:
        """Build an error table with standard errors.

        Args:
            provenance: JSON values that describe the measurement; `images` is added.
        """
        return ErrorTable(
            sigmas=self.sigmas, v=self.v, standard_errors=self.standard_errors,
            provenance={**provenance, "images": self.count},
        )  # fmt: skip

    def diagnostics(self) -> dict[str, list[float]]:
        """Diagnostics of the assumptions of J, one value per node.

        Returns:
            `bias_ratio`: squared mean error per channel divided by v, minus its expectation for n images of a
            zero-mean error. `bias_z`: largest z-score of a channel mean. `lag1_correlation`: correlation with the next
            noisier node (nan for the noisiest node). `excess_kurtosis`: relative to a Gaussian with the pooled
            variance. `clipped`: share of elements that the x_0 rule changed.
        """
        n = self.count
        mean = self.channel_KC / n
        spread = np.maximum(self.channel2_KC / n - mean**2, 0) / max(n - 1, 1)
        gram = self.gram_KK / n
        scale = np.sqrt(np.diag(gram))
        lag = np.append(np.diag(gram, 1) / (scale[:-1] * scale[1:]), np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.where(spread > 0, np.abs(mean) / np.sqrt(spread), 0.0)
        return {
            "bias_ratio": (np.maximum(mean**2 - spread, 0).mean(1) / self.v).tolist(),
            "bias_z": z.max(1).tolist(),
            "lag1_correlation": lag.tolist(),
            "excess_kurtosis": (self.fourth_K / n / self.v**2 - 3).tolist(),
            "clipped": self.clipped.tolist(),
        }


def sums_of(sigmas: Sequence[float], errors_KBCM: FloatArray, clipped_KB: FloatArray | None = None) -> ErrorSums:
    """Compute the sums of one batch.

    Args:
        sigmas: the K nodes, ascending.
        errors_KBCM: e with the prompt's condition, B images, C channels, M pixels.
        clipped_KB: share of x0-hat's elements that the x_0 rule changed; None means 0.

    Raises:
        VrgError: an error is not finite.
    """
    e = np.asarray(errors_KBCM, dtype=np.float64)
    if not np.isfinite(e).all():
        raise VrgError("the network's noise prediction is not finite; no error table can be measured on it.")
    square_KB = (e**2).mean((2, 3))
    channel_KBC = e.mean(3)
    flat = e.reshape(*e.shape[:2], -1)
    return ErrorSums(
        sigmas=np.asarray(sigmas, dtype=np.float64), count=e.shape[1], square_K=square_KB.sum(1),
        square2_K=(square_KB**2).sum(1), fourth_K=(e**4).mean((2, 3)).sum(1), channel_KC=channel_KBC.sum(1),
        channel2_KC=(channel_KBC**2).sum(1), gram_KK=np.einsum("kbm,lbm->kl", flat, flat) / flat.shape[2],
        clipped_K=np.zeros(len(sigmas)) if clipped_KB is None else clipped_KB.sum(1),
    )  # fmt: skip
