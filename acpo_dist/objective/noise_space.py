"""Per-sample error statistics from which every noise-space loss is computed, with one policy and one reference forward.

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

from acpo_dist.diffusion.prediction import PREDICTION_TYPES, signal_and_noise, to_noise
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

        Subtracting the two means would lose precision, since both errors are nearly equal early in training.
        """
        return 2 * self.cross_B + self.drift_B

    @property
    def policy_error(self) -> Tensor:
        """Mean squared error of the policy, (B,)."""
        return self.reference_error_B + self.excess

    def rows(self, index: slice | Sequence[int] | Tensor) -> "ErrorStatistics":
        """Return the statistics of the selected samples."""
        return ErrorStatistics(
            cross_B=self.cross_B[index], drift_B=self.drift_B[index], reference_error_B=self.reference_error_B[index]
        )


def error_statistics(policy: Tensor, reference: Tensor, target: Tensor) -> ErrorStatistics:
    """Compute the statistics of three tensors of one shape (B, ...) and one unit.

    Args:
        policy: output of the policy with the graph; float32 or wider.
        reference: output of the frozen base model (for NFT of the old policy) on the same input, constant.
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
    """Compute the statistics of network outputs of any prediction type, in the units of `space`.

    x_t cancels in both differences, so the outputs are subtracted first and scaled afterwards. In `eps` space the error
    of a v-prediction is a^2 mean((v - v*)^2), so that beta has the same meaning for every prediction type.

    Args:
        policy_output: output of the policy with the graph, (B, ...), any floating dtype.
        reference_output: output of the frozen network on the same x_t, t and condition, (B, ...).
        target_output: exact output, result of the function `target_output`, (B, ...).
        alpha_bar_B: in (0, 1); 0 is allowed for velocity predictions in units of `v`.
        prediction_type: a name in `prediction.PREDICTION_TYPES`.
        space: `eps`, `v` or `x0`.

    Raises:
        ValueError: unknown space or prediction type.
    """
    drift = output_drift(policy_output, reference_output, alpha_bar_B, prediction_type, space)
    error = output_drift(reference_output.detach(), target_output, alpha_bar_B, prediction_type, space)
    return _statistics(drift, error)


def target_output(clean: Tensor, noise: Tensor, alpha_bar_B: Tensor, prediction_type: str) -> Tensor:
    """Return the exact network output at x_t = a x_0 + s eps: eps, a eps - s x_0, x_0, or a flow's eps - x_0.

    Raises:
        ValueError: unknown prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return clean
    if prediction_type == "flow_prediction":
        return noise - clean
    if prediction_type == "v_prediction":
        signal, spread = signal_and_noise(alpha_bar_B, clean)
        return signal * noise - spread * clean
    raise ValueError(f"unknown prediction_type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")


def denoising_residual(
    model_output: Tensor, noisy: Tensor, clean: Tensor, noise: Tensor, alpha_bar_B: Tensor, prediction_type: str
) -> Tensor:
    """Return eps-hat - eps, or v-hat - v for flow models, (B, ...), with the graph of `model_output`.

    Raises:
        ValueError: unknown prediction type.
    """
    if prediction_type == "flow_prediction":
        return model_output - target_output(clean, noise, alpha_bar_B, prediction_type)
    return to_noise(model_output, noisy, alpha_bar_B, prediction_type) - noise


def min_snr_weight(alpha_bar_B: Tensor, gamma: float) -> Tensor:
    """Return min(SNR, gamma) / SNR, the weight of an error in noise units, (B,), float64.

    For v-prediction the paper weights the velocity error by min(SNR, gamma) / (SNR + 1), which is equivalent.

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
