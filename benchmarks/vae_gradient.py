"""Error of a reward's gradient through a VAE in bfloat16, relative to float32.

    .venv/bin/python benchmarks/vae_gradient.py [--images 8] [--size 128] [--data ../shared/data] [--seeds 0 1 2]

Windows of photographs are encoded in float32; the gradient of a score of the decoded image with respect to x_0 is
compared between the two types of the decoder. VAEs: toy-sdxl's with its trained weights and with random ones
(PyTorch's initialisation), at its own resolution, and the published architecture of SDXL with random weights, at
`--size`, since no trained weights are at hand. `score` is TwoStream's, whose network is in float32 either way;
`decoder alone` multiplies the decoder's Jacobian with one fixed gradient of the pixels. Per row, over images and seeds:
median and largest |g - g32| / |g32|, median cosine, and the share of latent elements whose sign agrees.

Prints one JSON line per VAE and a table.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

import acpo_dist.data.toy
from acpo_dist.data.images import read_images
from acpo_dist.models.architectures import PUBLISHED
from acpo_dist.models.loading import cast
from acpo_dist.models.vae import VaeDecoder
from acpo_dist.objective.perceptual import clip_pixels
from acpo_dist.rewards.metrics import TwoStreamMetric

TOY_PIXELS = 32
_ASSETS = Path(acpo_dist.data.toy.__file__).parent / "assets"


def main() -> None:
    """Measure every VAE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="photographs per seed")
    parser.add_argument("--size", type=int, default=128, help="pixels of a window for the full-size VAE")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared/data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    rows = []
    for name, size in _sizes(options.size).items():
        found = [
            _errors(_vae(name, seed), window)
            for seed in options.seeds
            for window in _windows(options.data, options.images, size, seed)
        ]
        for kind in ("score", "decoder alone"):
            rows.append({"vae": name, "pixels": size, "gradient": kind, **_summary([one[kind] for one in found])})
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    sys.stdout.write(_table(rows) + "\n")


def _sizes(full: int) -> dict[str, int]:
    return {"toy-sdxl, trained": TOY_PIXELS, "toy-sdxl, random": TOY_PIXELS, "SDXL, random": full}


def _vae(name: str, seed: int) -> AutoencoderKL:
    kind, weights = name.split(", ")
    if weights == "trained":
        vae: Any = AutoencoderKL.from_pretrained(_ASSETS / kind / "vae", dtype=torch.float32)
    else:
        torch.manual_seed(seed)
        config: Any = PUBLISHED["sdxl"].vae if kind == "SDXL" else AutoencoderKL.load_config(_ASSETS / kind / "vae")
        vae = AutoencoderKL.from_config(config)
    return vae.requires_grad_(False).eval()


def _windows(data: Path, count: int, size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    windows = []
    for _, image in list(read_images([data / "photos"]))[:count]:
        height, width = image.shape[-2:]
        side = min(height, width)
        top, left = (int(torch.randint(0, length - side + 1, (), generator=generator)) for length in (height, width))
        square = image[None, :, top : top + side, left : left + side].float() / 255
        windows.append(interpolate(square, size=(size, size), mode="bilinear", antialias=True))
    return windows


def _errors(vae: AutoencoderKL, image: Tensor) -> dict[str, dict[str, float]]:
    """Compare the gradients of one image of shape (1, 3, H, W). The VAE's weights are rounded to bfloat16 after it."""
    metric = TwoStreamMetric(TwoStreamMetric.Config())
    clean = VaeDecoder(vae).encode(image)

    def gradients(dtype: torch.dtype, direction: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        latents = clean.clone().requires_grad_(True)
        cast(vae, dtype)
        pixels = VaeDecoder(vae).decode(latents)
        score = metric(clip_pixels(pixels, ascend=True), [""]).sum()
        of_pixels, of_score = torch.autograd.grad(score, [pixels, latents], retain_graph=True)
        fixed = of_pixels if direction is None else direction
        (alone,) = torch.autograd.grad(pixels, latents, fixed)
        return of_score, alone, fixed

    score, alone, direction = gradients(torch.float32, None)
    half_score, half_alone, _ = gradients(torch.bfloat16, direction)
    return {"score": _compare(half_score, score), "decoder alone": _compare(half_alone, alone)}


def _compare(found: Tensor, wanted: Tensor) -> dict[str, float]:
    return {
        "error": float((found - wanted).norm() / wanted.norm()),
        "cosine": float(cosine_similarity(found.flatten(), wanted.flatten(), dim=0)),
        "signs": float((found.sign() == wanted.sign()).float().mean()),
    }


def _summary(values: list[dict[str, float]]) -> dict[str, float]:
    columns = {key: torch.tensor([one[key] for one in values]) for key in values[0]}
    return {
        "images": len(values), "median": float(columns["error"].median()), "largest": float(columns["error"].max()),
        "cosine": float(columns["cosine"].median()), "signs": float(columns["signs"].median()),
    }  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| VAE | pixels | gradient of | median error | largest | cosine | signs |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['vae']} | {row['pixels']} | {row['gradient']} | {row['median']:.1%} | {row['largest']:.1%} "
        f"| {row['cosine']:.4f} | {row['signs']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
