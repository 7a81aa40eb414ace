"""Graded damage: transformations that degrade a clean scene by a known severity.

There are two disjoint families. `BASE_DAMAGE` degrades the training images of the base models and the reward;
`JUDGE_DAMAGE` trains the independent judge, so that reward and judge share no artefact by construction.
Images are float32 RGB in [0, 1] of shape (B, 3, 32, 32); severities are in [0, 1] of shape (B,).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor

Damage = Callable[[Tensor, Tensor, torch.Generator], Tensor]
CLEAN_SHARE = 0.30


def gaussian_blur(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Blur with a standard deviation of 0.3 to 2.7 pixels."""
    sigma = 0.3 + 2.4 * severity
    taps = torch.arange(-7, 8, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps[None] / sigma[:, None]).square())
    kernel = kernel / kernel.sum(1, keepdim=True)
    batch, channels, height, width = images.shape
    flat = F.pad(images, (7, 7, 7, 7), mode="replicate").reshape(1, batch * channels, height + 14, width + 14)
    weight = kernel.repeat_interleave(channels, 0)
    flat = F.conv2d(flat, weight[:, None, :, None], groups=batch * channels)
    flat = F.conv2d(flat, weight[:, None, None, :], groups=batch * channels)
    return flat.reshape(batch, channels, height, width)


def grain(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise with a grain of two pixels and a standard deviation of up to 0.30."""
    noise = torch.randn(images.shape[0], 3, images.shape[2] // 2, images.shape[3] // 2, generator=generator)
    return images + 0.30 * severity[:, None, None, None] * F.interpolate(noise, scale_factor=2, mode="nearest")


def low_contrast(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Mix with mid-grey: up to 75 % of the contrast is lost."""
    keep = 1 - 0.75 * severity[:, None, None, None]
    return 0.5 + (images - 0.5) * keep


def dct_quantise(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Round 8 x 8 DCT coefficients, as JPEG does, to a step that grows with frequency and severity."""
    basis = _dct_basis()
    blocks = images.unfold(2, 8, 8).unfold(3, 8, 8)
    coefficients = torch.einsum("ui,bcyxij,vj->bcyxuv", basis, blocks, basis)
    frequency = torch.arange(8, dtype=torch.float32)
    growth = 1 + 0.6 * (frequency[:, None] + frequency[None, :])
    step = (0.02 + 0.55 * severity)[:, None, None] * growth
    step = step[:, None, None, None]
    coefficients = torch.round(coefficients / step) * step
    blocks = torch.einsum("ui,bcyxuv,vj->bcyxij", basis, coefficients, basis)
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(images.shape)


def box_blur(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Apply 3 x 3 averaging up to eight times; fractional counts are blended."""
    levels = [images]
    for _ in range(8):
        levels.append(F.avg_pool2d(F.pad(levels[-1], (1, 1, 1, 1), mode="replicate"), 3, stride=1))
    stack = torch.stack(levels)
    position = 8 * severity
    lower = position.floor().clamp(max=7).long()
    rows = torch.arange(images.shape[0])
    fraction = (position - lower)[:, None, None, None]
    return stack[lower, rows] * (1 - fraction) + stack[lower + 1, rows] * fraction


def fine_noise(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Add uniform noise of single pixels, equal in all channels for half of the images."""
    noise = 2 * torch.rand(images.shape, generator=generator) - 1
    grey = torch.rand(images.shape[0], generator=generator)[:, None, None, None] < 0.5
    noise = torch.where(grey, noise[:, :1].expand_as(noise), noise)
    return images + 0.45 * severity[:, None, None, None] * noise


def fade(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Fade colour and contrast towards a random grey level."""
    level = 0.25 + 0.5 * torch.rand(images.shape[0], generator=generator)[:, None, None, None]
    luminance = images.mean(1, keepdim=True)
    amount = severity[:, None, None, None]
    return (1 - 0.7 * amount) * (images + 0.4 * amount * (luminance - images)) + 0.7 * amount * level


def pixelate(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Blend with the 4 x 4 block mean."""
    blocks = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4, mode="nearest")
    return images + severity[:, None, None, None] * (blocks - images)


def blotches(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Add smooth coloured stains of about eight pixels."""
    stains = torch.randn(images.shape[0], 3, 5, 5, generator=generator)
    stains = F.interpolate(stains, size=images.shape[2:], mode="bicubic", align_corners=True)
    return images + 0.30 * severity[:, None, None, None] * stains


def warp(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Warp by a smooth random displacement of up to about five pixels, which keeps edges sharp but deforms shapes."""
    batch, _, height, width = images.shape
    shift = torch.randn(batch, 2, 6, 6, generator=generator)
    shift = F.interpolate(shift, size=(height, width), mode="bicubic", align_corners=True)
    shift = shift * severity[:, None, None, None] * (2 * 2.5 / width)
    rows = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    columns = torch.linspace(-1, 1, width)[None, :].expand(height, width)
    grid = torch.stack([columns, rows], -1) + shift.permute(0, 2, 3, 1)
    bent = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)
    # Sampling at the original pixel positions is the identity only up to rounding.
    return torch.where((severity > 0)[:, None, None, None], bent, images)


def hue_shift(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate all hues by up to 75 degrees in either direction; colours leave the palette, edges stay."""
    side = torch.where(torch.rand(images.shape[0], generator=generator) < 0.5, -1.0, 1.0)
    angle = side * severity * math.radians(75)
    # Rodrigues' rotation about (1, 1, 1) / sqrt 3.
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    turn, mean = torch.eye(3), torch.full((3, 3), 1 / 3)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return torch.einsum("bij,bjhw->bihw", cos * turn + sin * cross + (1 - cos) * mean, images)


def melt(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Round off corners: blur, then sharpen between the background (a corner) and the colour farthest from it."""
    soft = gaussian_blur(images, severity, generator)
    ground = images[:, :, :1, :1]
    distance = (soft - ground).square().sum(1, keepdim=True).sqrt()
    peak = distance.flatten(1).amax(1)[:, None, None, None].clamp(min=1e-3)
    far = (images - ground).square().sum(1).flatten(1).argmax(1)
    colour = images.flatten(2)[torch.arange(len(images)), :, far][:, :, None, None]
    share = torch.sigmoid(12 * (distance / peak - 0.5))
    melted = ground + share * (colour - ground)
    return torch.where((severity > 0)[:, None, None, None], melted, images)


BASE_DAMAGE: dict[str, Damage] = {
    "gaussian_blur": gaussian_blur,
    "grain": grain,
    "low_contrast": low_contrast,
    "dct_quantise": dct_quantise,
}
JUDGE_DAMAGE: dict[str, Damage] = {
    "box_blur": box_blur,
    "fine_noise": fine_noise,
    "fade": fade,
    "pixelate": pixelate,
    "blotches": blotches,
    "warp": warp,
    "hue_shift": hue_shift,
    "melt": melt,
}


def spoil(
    images: Tensor,
    family: dict[str, Damage],
    generator: torch.Generator,
    *,
    clean_share: float = CLEAN_SHARE,
    severity_exponent: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Damage each image with a random kind of the family at a random severity.

    Args:
        images: clean images (B, 3, 32, 32) in [0, 1].
        family: kinds of damage by name.
        generator: random generator.
        clean_share: share of images that stay clean.
        severity_exponent: severities of damaged images are U ** exponent: uniform at 1, mostly severe below.

    Returns:
        (images clipped to [0, 1], severities (B,); 0 for clean images).
    """
    count = images.shape[0]
    kind = torch.randint(len(family), (count,), generator=generator)
    severity = torch.rand(count, generator=generator) ** severity_exponent
    severity = torch.where(torch.rand(count, generator=generator) < clean_share, torch.zeros(()), severity)
    spoiled = images.clone()
    for index, damage in enumerate(family.values()):
        rows = torch.nonzero((kind == index) & (severity > 0)).flatten()
        if rows.numel():
            spoiled[rows] = damage(images[rows], severity[rows], generator)
    return spoiled.clamp(0, 1), severity


def _dct_basis() -> Tensor:
    index = torch.arange(8, dtype=torch.float32)
    basis = torch.cos(math.pi * (2 * index[None] + 1) * index[:, None] / 16) * 0.5
    basis[0] = basis[0] / math.sqrt(2)
    return basis
