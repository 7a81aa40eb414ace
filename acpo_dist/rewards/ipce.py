"""IPCE: correspondence of an image to its prompt, from five levels of agreement of patches and whole image.

Source: Peng et al. (CVPRW 2024, NTIRE challenge on AI-generated images), implemented from the formulas:
level k of 1 to 5 has the text `a photo that {badly|poorly|fairly|well|perfectly} matches '{prompt}'`, a view its logits
e^s cos. Local: logits averaged over patches, then softmax; global: softmax of the whole image's; p is their mean,
and q = 5/4 (sum over k of k p_k - 1), from 0 to 5.

Lengths are given for CLIP's 224 pixels and scale with the model's own size S: the shorter side is brought to at least
512 S/224, patches of S x S lie on a grid of 32 S/224 pixels (48 S/224 where a side reaches 1024 S/224). The patches
are drawn from a seed, the same in every call, so that a score is a function of the image.

Shapes: B images, P patches, V = P + 1 views (the whole image last), S x S pixels, D embedding width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from acpo_dist.rewards.clip_backbone import resize
from acpo_dist.rewards.clip_metrics import ClipTextMetric
from acpo_dist.rewards.config import IpceConfig

LEVELS = ("badly", "poorly", "fairly", "well", "perfectly")
_STANDARD_SIZE = 224


def level_texts(prompt: str) -> list[str]:
    """Return the five texts of a prompt, from no agreement to full agreement."""
    return [f"a photo that {level} matches '{prompt}'" for level in LEVELS]


def patch_corners(
    height: int, width: int, *, size: int, count: int, generator: torch.Generator | None
) -> list[tuple[int, int]]:
    """Upper left corners (top, left) of at most `count` patches of `size` x `size` pixels on IPCE's grid.

    Args:
        height: height of the upscaled image in pixels, at least `size`.
        width: width of the upscaled image in pixels, at least `size`.
        generator: draws corners without repetition; None takes them evenly spaced along the grid.
    """
    wide = max(height, width) * _STANDARD_SIZE >= 1024 * size
    step = max(1, round((48 if wide else 32) * size / _STANDARD_SIZE))
    grid = [
        (top, left) for top in range(0, height - size + 1, step) for left in range(0, width - size + 1, step)
    ]  # fmt: skip
    count = min(count, len(grid))
    if generator is not None:
        return [grid[index] for index in torch.randperm(len(grid), generator=generator)[:count].tolist()]
    return [grid[round(index * (len(grid) - 1) / max(1, count - 1))] for index in range(count)]


def ipce_views(images: Tensor, *, size: int, short_side: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Return patches and whole image: (B, 3, H, W) in [0, 1] -> (B, V, 3, S, S), differentiable.

    Args:
        images: (B, 3, H, W) in [0, 1].
        size: S.
        short_side: minimum length of the shorter side, for a model of 224 pixels; smaller images are upscaled.
        count: P, or fewer if the grid has fewer.
        generator: draws patch corners without repetition; None spaces them evenly.
    """
    height, width = images.shape[2:]
    least = max(size, round(short_side * size / _STANDARD_SIZE))
    upscaled = images
    if min(height, width) < least:
        factor = least / min(height, width)
        upscaled = resize(images, (round(height * factor), round(width * factor)), "bilinear")
    corners = patch_corners(*upscaled.shape[2:], size=size, count=count, generator=generator)
    patches = [upscaled[..., top : top + size, left : left + size] for top, left in corners]
    return torch.stack([*patches, resize(images, (size, size), "bilinear")], 1)


def ipce_quality(view_vectors_BVD: Tensor, level_vectors_BLD: Tensor, scale: Tensor | float) -> Tensor:
    """Return the quality (B,) in [0, 5] from unit vectors of the views (whole image last) and of the five level texts.

    Args:
        views: unit vectors (B, V, D).
        texts: unit vectors of the level texts.
        scale: e to the power of CLIP's logit scale.
    """
    logits = scale * view_vectors_BVD @ level_vectors_BLD.transpose(1, 2)
    share = (logits[:, :-1].mean(1).softmax(-1) + logits[:, -1].softmax(-1)) / 2
    level = torch.arange(1, len(LEVELS) + 1, dtype=share.dtype, device=share.device)
    return 1.25 * ((share * level).sum(-1) - 1)


class Ipce(ClipTextMetric):
    """IPCE as a metric, 0 to 5; weights fine-tuned for it (`acpo rewards train ipce`), or zero-shot."""

    Config = IpceConfig

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        config = self._config
        assert isinstance(config, self.Config)
        generator = torch.Generator().manual_seed(config.seed) if config.positions == "seeded" else None
        views = ipce_views(
            images, size=self._clip.image_size, short_side=config.short_side, count=config.patches,
            generator=generator,
        )  # fmt: skip
        vectors = self._clip.image_vectors(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        texts = [text for prompt in prompts for text in level_texts(prompt)]
        levels = self._clip.text_vectors(texts).unflatten(0, (len(prompts), len(LEVELS)))
        return ipce_quality(vectors, levels, self._clip.scale)
