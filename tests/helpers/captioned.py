"""Folders of captioned images of the toy world, as trainers keep them."""

from pathlib import Path

import torch
from PIL import Image

from acpo_dist.data.toy.damage import BASE_DAMAGE, spoil
from acpo_dist.data.toy.world import caption_index, captions, templates


def write_captioned(folder: Path, count: int, *, shapes: tuple[tuple[int, int], ...] = ((32, 32),)) -> Path:
    """Write damaged scenes with a caption beside each.

    Args:
        count: number of images.
        shapes: (width, height) of the images, in turn; scenes are enlarged and cropped to them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = torch.arange(count) * 864 // count
    pixels, _ = spoil(templates()[chosen], BASE_DAMAGE, torch.Generator().manual_seed(0))
    for number, (index, image) in enumerate(zip(chosen.tolist(), pixels, strict=True)):
        width, height = shapes[number % len(shapes)]
        side = max(width, height)
        whole = Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()).resize((side, side))
        left, top = (side - width) // 2, (side - height) // 2
        whole.crop((left, top, left + width, top + height)).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(captions()[int(caption_index()[index])])
    return folder
