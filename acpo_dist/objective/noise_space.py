"""Two numbers per sample that every noise-space term is made of: one policy and one reference forward serve all.

With e = reference - target and drift = policy - reference:

    c = mean(e * drift)      a = mean(drift^2)      mean((policy - target)^2) = mean(e^2) + 2 c + a

    anchor                          a
    denoising, SFT                  mean(e^2) + 2 c + a
    advantage-weighted (NFT)        2 A c + beta a
    Diffusion-DPO                   softplus(beta / 2 ((2 c + a) of the winner - (2 c + a) of the loser))

Means run over the elements of a sample, never over samples. The same decomposition serves NCP distances, where
policy, reference and target are features instead of noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from acpo_dist.diffusion.prediction import signal_and_noise
from acpo_dist.objective.anchor import output_drift


@dataclass(frozen=True, kw_only=True)
class ErrorStatistics:
    """Errors of policy and reference against the same target. All (B,), float32 or wider."""

    cross_B: Tensor
    """c, with the policy's gradient."""
    drift_B: Tensor
    """a, with the policy's gradient."""
    reference_error_B: Tensor
    """mean(e^2), constant."""

    @property
    def excess(self) -> Tensor:
        """Policy error minus reference error, 2 c + a, (B,).

        A subtraction of two means would lose it: near the start both errors agree in all but their last digits.
        """
        return 2 * self.cross_B + self.drift_B

    @property
    def policy_error(self) -> Tensor:
        """Mean squared error of the policy, (B,)."""
        return self.reference_error_B + self.excess

    def rows(self, index: slice | Sequence[int] | Tensor) -> "ErrorStatistics":
        """The statistics of some samples."""
        return ErrorStatistics(
            cross_B=self.cross_B[index], drift_B=self.drift_B[index], reference_error_B=self.reference_error_B[index]
        )


def error_statistics(policy: Tensor, reference: Tensor, target: Tensor) -> ErrorStatistics:
    """Statistics of three tensors of one shape (B, ...), all in one unit.

    Args:
        policy: carries the gradient; float32 or wider.
        reference: output of the frozen base (for NFT of the old policy) on the same input, constant.
        target: exact value, constant.
    """
    return _statistics(policy - reference.detach(), reference.detach() - target.detach())


def noise_statistics(
    policy_output: Tensor,
    reference_output: Tensor,
    target_output: Tensor,
    alpha_bar_B: Tensor,
    prediction_type: str,
    *,
    space: str = "eps",
) -> ErrorStatistics:
    """Statistics of network outputs of any kind, in noise units unless another space is asked for.

    x_t cancels in both differences, so the outputs are subtracted first and scaled after. In `eps` space the error
    of a v-prediction is a^2 mean((v - v*)^2): beta then means the same for every prediction type.

    Args:
        policy_output: network output with the gradient, (B, ...), any floating dtype.
        reference_output: frozen output on the same x_t, t and condition.
        target_output: see `target_output`.
        alpha_bar_B: in (0, 1).
        prediction_type: `epsilon`, `v_prediction` or `sample`.
        space: `eps`, `v` or `x0`.

    Raises:
        ValueError: unknown space or prediction type.
    """
    drift = output_drift(policy_output, reference_output, alpha_bar_B, prediction_type, space)
    error = output_drift(reference_output.detach(), target_output, alpha_bar_B, prediction_type, space)
    return _statistics(drift, error)


def target_output(clean: Tensor, noise: Tensor, alpha_bar_B: Tensor, prediction_type: str) -> Tensor:
    """Exact network output at x_t = a x_0 + s eps: eps, a eps - s x_0, or x_0.

    Raises:
        ValueError: unknown prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return clean
    if prediction_type == "v_prediction":
        signal, spread = signal_and_noise(alpha_bar_B, clean)
        return signal * noise - spread * clean
    raise ValueError(f"unknown prediction_type {prediction_type!r}; known: epsilon, v_prediction, sample")


def min_snr_weight(alpha_bar_B: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR, the weight of an error in noise units, (B,), float64.

    For v-prediction the publication weighs the velocity error by min(SNR, gamma) / (SNR + 1), which is the same.

    Source: min-SNR weighting (Hang et al. 2023).
    """
    snr_B = alpha_bar_B.double() / (1 - alpha_bar_B.double())
    return snr_B.clamp(max=gamma) / snr_B


def _statistics(drift: Tensor, error: Tensor) -> ErrorStatistics:
    return ErrorStatistics(
        cross_B=(error * drift).flatten(1).mean(1),
        drift_B=drift.square().flatten(1).mean(1),
        reference_error_B=error.square().flatten(1).mean(1),
    )
