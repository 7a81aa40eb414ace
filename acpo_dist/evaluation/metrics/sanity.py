"""Statistics that separate images from the output of a misconfigured model: noise, saturation, constant colour.

Legend: N images, H W pixels.
"""

from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor

from acpo_dist.evaluation.metrics.features import as_float

_CONSTANT = 1 / 255


def sanity_statistics(images: Tensor) -> dict[str, float]:
    """Compute the statistics of a set of images.

    Args:
        images: RGB (N, 3, H, W), uint8 or float in [0, 1]; H and W at least 2.

    Returns:
        Statistic name -> value:
            saturated: share of channel values at 0 or 1.
            spread: standard deviation of all channel values.
            contrast: mean over images of the standard deviation within an image.
            smoothness: mean over images of the correlation of neighbouring pixels; 0 for white noise, above 0.8 for
                photographs. Constant images are excluded; 1 if all are constant.
            constant: share of images whose standard deviation is below one grey level.
            variety: mean over pixels of the standard deviation between images; 0 if all images are equal, or N is 1.
    """
    pixels = as_float(images).cpu()
    within = pixels.flatten(1).std(1, correction=0)
    correlations = [
        _neighbour_correlation(image) for image, std in zip(pixels, within, strict=True) if std >= _CONSTANT
    ]
    return {
        "saturated": float(((pixels <= 0) | (pixels >= 1)).float().mean()),
        "spread": float(pixels.std(correction=0)),
        "contrast": float(within.mean()),
        "smoothness": fmean(correlations) if correlations else 1.0,
        "constant": float((within < _CONSTANT).float().mean()),
        "variety": float(pixels.std(0, correction=0).mean()),
    }


def sanity_problems(found: Mapping[str, float], real: Mapping[str, float] | None = None) -> dict[str, str]:
    """Report implausible statistics of a set of images.

    Args:
        found: `sanity_statistics` of the set.
        real: `sanity_statistics` of real images of the same kind; None compares with limits that hold for any image.

    Returns:
        Statistic -> message with the value and the limit; empty for plausible images. `constant` and `noise` mean that
        the images are unusable.
    """
    problems: dict[str, str] = {}
    if found["constant"] > 0.5:
        problems["constant"] = f"{found['constant']:.0%} of the images have a single colour"
    elif found["smoothness"] < 0.35:
        expected = f", real images have {real['smoothness']:.2f}" if real else ", images have above 0.6"
        problems["noise"] = f"neighbouring pixels have a correlation of {found['smoothness']:.2f}{expected}: noise"
    limit = max(0.08, 3 * real["saturated"]) if real else 0.4
    if found["saturated"] > limit and "constant" not in problems:
        problems["saturated"] = (
            f"{found['saturated']:.0%} of the channel values are at 0 or 255, expected at most {limit:.0%}"
        )
    if real and "constant" not in problems:
        for name in ("spread", "contrast"):
            ratio = found[name] / max(real[name], 1e-6)
            if not 0.7 <= ratio <= 1.4:
                problems[name] = f"{name} {found[name]:.3f} is {ratio:.2f} times that of real images ({real[name]:.3f})"
    elif found["contrast"] < 0.02 and "constant" not in problems:
        problems["contrast"] = f"contrast {found['contrast']:.3f}, expected at least 0.02: nearly uniform images"
    return problems


def latent_problems(clean: Tensor, *, pixel_space: bool) -> dict[str, str]:
    """Report implausible final x_0 of a model.

    Args:
        clean: x_0 (B, C, H, W): latents scaled to unit standard deviation by the VAE's scaling_factor, or pixels.
        pixel_space: whether x_0 are pixels in [-1, 1].

    Returns:
        Problem (`nonfinite`, `range` or `latents`) -> message with the value and the limit.
    """
    broken = float((~torch.isfinite(clean)).flatten(1).any(1).float().mean())
    if broken > 0:
        return {"nonfinite": f"{broken:.0%} of the samples hold NaN or infinity"}
    if pixel_space:
        outside = float((clean.abs() > 1.05).float().mean())
        return {"range": f"{outside:.0%} of x_0 lie outside [-1, 1], expected at most 10%"} if outside > 0.1 else {}
    std = float(clean.std(correction=0))
    if 0.55 <= std <= 1.8:
        return {}
    return {"latents": f"x_0 has standard deviation {std:.2f}, expected about 1 (0.55 to 1.8) for scaled latents"}


def _neighbour_correlation(image_CHW: Tensor) -> float:
    """Compute the correlation of horizontally and vertically adjacent values around their channel means."""
    centred = image_CHW - image_CHW.mean((1, 2), keepdim=True)
    across = (centred[:, :, 1:] * centred[:, :, :-1]).mean()
    down = (centred[:, 1:] * centred[:, :-1]).mean()
    return float((across + down) / 2 / centred.square().mean().clamp(min=1e-12))
