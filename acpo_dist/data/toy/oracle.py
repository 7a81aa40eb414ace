"""Exact oracle of the toy world: distance to the nearest clean template. No policy can hack it."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from acpo_dist.data.toy.world import IMAGE_SIZE, caption_index, captions, templates


@dataclass(frozen=True, kw_only=True)
class OracleReport:
    """Means over a set of images."""

    oracle_mse: float
    """Mean squared distance to the nearest template, RGB in [0, 1]; lower is better."""
    oracle_psnr: float
    """Mean over images of -10 log10 of that distance, in dB (distances under 1e-6 count as 60 dB)."""
    template_entropy: float
    """Entropy in nats of the nearest template over the set; at most log(min(864, images))."""
    caption_accuracy: float | None
    """Share of images whose nearest template has the prompt's caption; None without prompts."""

    def as_dict(self) -> dict[str, float | None]:
        """Return JSON-compatible data."""
        return asdict(self)


def nearest_template(images: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest clean template of each image.

    Args:
        images: float RGB in [0, 1], shape (B, 3, 32, 32).

    Returns:
        (template ids int64 (B,), mean squared distances float32 (B,)).

    Raises:
        ValueError: another shape, or a non-finite pixel.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"the toy oracle needs images of shape (B, 3, 32, 32), found {tuple(images.shape)}")
    if not torch.isfinite(images).all():
        raise ValueError("the toy oracle found non-finite pixels")
    flat = images.flatten(1).double()
    clean = templates().flatten(1).double()
    ids, distances = [], []
    for chunk in flat.split(256):
        # In float64 the expanded square is accurate to far below one grey level.
        square = chunk.square().sum(1, keepdim=True) - 2 * chunk @ clean.T + clean.square().sum(1)
        best = square.argmin(1)
        ids.append(best)
        distances.append((chunk - clean[best]).square().mean(1))
    return torch.cat(ids), torch.cat(distances).float()


def judge_exactly(images: Tensor, prompts: list[str] | None = None) -> OracleReport:
    """Compute the oracle metrics of a set of images.

    Args:
        images: float RGB in [0, 1], shape (B, 3, 32, 32).
        prompts: B captions of the toy world, or None.

    Returns:
        Means over the images.

    Raises:
        ValueError: a prompt is no caption of the toy world, or `images` is invalid (see `nearest_template`).
    """
    ids, mse = nearest_template(images)
    share = torch.bincount(ids, minlength=templates().shape[0]).double() / len(ids)
    share = share[share > 0]
    accuracy = None
    if prompts is not None:
        position = {caption: index for index, caption in enumerate(captions())}
        foreign = sorted({prompt for prompt in prompts if prompt not in position})
        if foreign:
            raise ValueError(f"prompts that are no captions of the toy world, such as {foreign[0]!r}")
        wanted = torch.tensor([position[prompt] for prompt in prompts])
        accuracy = float((caption_index()[ids] == wanted).double().mean())
    return OracleReport(
        oracle_mse=float(mse.double().mean()),
        oracle_psnr=float((-10 * torch.log10(mse.double().clamp(min=1e-6))).mean()),
        template_entropy=float(-(share * share.log()).sum()),
        caption_accuracy=accuracy,
    )


def kept_scenes(images: Tensor, base: Tensor) -> float:
    """Return the share of images that show the base model's scene: shape, colours, place and size.

    Entropy, caption accuracy and drift do not see a policy that makes all shapes small; this share does.

    Args:
        images: float RGB in [0, 1], shape (B, 3, 32, 32).
        base: images of the base model from the same prompts and noise, same shape.

    Raises:
        ValueError: different numbers of images, or invalid ones (see `nearest_template`).
    """
    if len(images) != len(base):
        raise ValueError(f"{len(images)} images cannot be compared with {len(base)} of the base model")
    return float((nearest_template(images)[0] == nearest_template(base)[0]).double().mean())
