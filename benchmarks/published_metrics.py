"""Measure published no-reference metrics and TwoStream on photographs and Stable Diffusion images.

    .venv/bin/python benchmarks/published_metrics.py --out runs/published [--data ../shared/data] [--seeds 0 1 2]

BRISQUE, NIQE and PIQE (pyiqa with local weights) and TwoStream with three sets of weights: `toy` (shipped), `cifar`
and `sd` (`acpo rewards train two_stream` on CIFAR-10 and on the Stable Diffusion images, once per seed). Four parts:

- damage: Spearman correlation of each score with the severity of blur, noise and JPEG, over windows of `--window`
  pixels of photographs and of a share of the Stable Diffusion images, another window, share and noise for every seed;
- agreement: Spearman correlation between metrics on the undamaged Stable Diffusion images;
- gradient: share of images whose score improves after one signed gradient step, by step size;
- cheating: score gained by repeated signed steps, against LPIPS moved, and what the other metrics say of it.

The data folder holds photos/, iqa/, drawbench_sd14_512px.parquet and cifar10_train.parquet. Results go to cells.jsonl
(a study that is started again continues), then to published_metrics.json, .md and .png, and cheated.png.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import io
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _cells import Cells
from _lpips import Lpips
from _published_report import STEPS, report
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from acpo_dist.core.errors import RewardError
from acpo_dist.data.decoding import fit
from acpo_dist.data.images import real_images
from acpo_dist.rewards.metrics import TwoStreamMetric
from acpo_dist.rewards.pyiqa_metric import PyiqaMetric
from acpo_dist.rewards.training.quality import QualitySettings, train_two_stream

DAMAGE = {"blur": (0.5, 1.0, 2.0, 4.0), "noise": (4.0, 8.0, 16.0, 32.0), "jpeg": (70.0, 40.0, 20.0, 10.0)}
"""Levels by increasing severity: standard deviation in pixels, standard deviation of 255, quality of Pillow."""
LOOKS = (1, 2, 4, 8)
"""Repeated steps after which a cheated image is measured."""
CHEAT_STEPS = {"niqe": 0.1}
"""Size of a repeated step, in units of 1/255, where 0.25 would overshoot."""


def main() -> None:
    """Measure every cell that is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared/data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--window", type=int, default=288)
    parser.add_argument("--generated", type=int, default=4, help="Stable Diffusion images per seed that are damaged")
    parser.add_argument("--photos", type=int, default=5, help="photographs per seed")
    parser.add_argument("--undamaged", type=int, default=100, help="Stable Diffusion images for the agreement")
    parser.add_argument("--gradients", type=int, default=3, help="images of each kind per seed for the gradients")
    parser.add_argument("--cheated", type=int, default=3, help="images per seed that are cheated")
    parser.add_argument("--training-steps", type=int, default=400, help="steps of TwoStream")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    study = Study(options)
    for seed in options.seeds:
        study.damage(seed)
        study.gradient(seed)
        study.cheat(seed)
    study.agreement()
    report(study.cells, options)


class Study:
    """Images, metrics and cells of one run of the script."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Read the images and open the metrics that need no training."""
        self._options, self._lpips = options, Lpips(options.data / "iqa/lpips_alexnet.safetensors")
        self.cells = Cells(options.out / "cells.jsonl")
        self._sd = real_images(options.data / "drawbench_sd14_512px.parquet")
        self._photos = [_scaled(image) for image in real_images(options.data / "photos")]
        self._metrics: dict[str, Any] = {
            name: PyiqaMetric(PyiqaMetric.Config(metric=name, weights=weights and str(options.data / "iqa" / weights)))
            for name, weights in (("brisque", "brisque_live.pth"), ("niqe", "niqe_original.mat"), ("piqe", None))
        }
        self._metrics["two_stream:toy"] = TwoStreamMetric(TwoStreamMetric.Config())

    def damage(self, seed: int) -> None:
        """Score every damaged version of the images of a seed."""
        options, metrics = self._options, self._with_trained(seed)
        for name, image in self._images(seed, options.photos, options.generated):
            self.cells.get(f"score/{seed}/{name}/none/0", lambda image=image: _scores(metrics, image))
            for kind, levels in DAMAGE.items():
                for severity, level in enumerate(levels, 1):
                    self.cells.get(
                        f"score/{seed}/{name}/{kind}/{severity}",
                        lambda image=image, kind=kind, level=level: _scores(
                            metrics, _damaged(image, kind, level, seed)
                        ),
                    )

    def agreement(self) -> None:
        """Score all undamaged Stable Diffusion images."""
        seed = self._options.seeds[0]
        metrics = self._with_trained(seed)
        for row, image in enumerate(self._sd[: self._options.undamaged]):
            window = _window(image, self._options.window, 0.5, 0.5)
            self.cells.get(f"whole/{row}", lambda window=window: _scores(metrics, window))

    def gradient(self, seed: int) -> None:
        """Take one signed step of every size on every metric."""
        metrics = self._with_trained(seed)
        for name, image in self._images(seed, self._options.gradients, self._options.gradients):
            for metric in metrics:
                self.cells.get(
                    f"gradient/{seed}/{name}/{metric}",
                    lambda image=image, metric=metric: _one_step(metrics[metric], metric, image),
                )

    def cheat(self, seed: int) -> None:
        """Take many signed steps on every metric with a gradient, and measure with all."""
        metrics = self._with_trained(seed)
        generated = self._options.cheated // 3
        for name, image in self._images(seed, self._options.cheated - generated, generated):
            for metric in metrics:
                # PIQE has no gradient; one network of its kind is enough beside the shipped one.
                if metric not in ("piqe", "two_stream:sd"):
                    self.cells.get(
                        f"cheat/{seed}/{name}/{metric}",
                        lambda name=name, image=image, metric=metric: self._cheat(seed, name, image, metric, metrics),
                    )

    def _cheat(self, seed: int, name: str, image: Tensor, metric: str, metrics: dict[str, Any]) -> list[dict[str, Any]]:
        rows, current = [{"steps": 0, "lpips": 0.0, "scores": _scores(metrics, image)}], image
        size = CHEAT_STEPS.get(metric, 0.25) / 255
        for step in range(1, max(LOOKS) + 1):
            _, gradient = _gradient(metrics[metric], metric, current)
            current = (current + size * _direction(metric) * gradient.sign()).clamp(0, 1)
            if step in LOOKS:
                moved = float(self._lpips(image[None], current[None]))
                rows.append({"steps": step, "lpips": moved, "scores": _scores(metrics, current)})
        folder = self._options.out / "cheated"
        folder.mkdir(parents=True, exist_ok=True)
        for label, shown in (("before", image), (metric.replace(":", "_"), current)):
            Image.fromarray(_bytes(shown)).save(folder / f"{seed}_{name}_{label}.png")
        return rows

    def _images(self, seed: int, photos: int, generated: int) -> list[tuple[str, Tensor]]:
        """Return windows of a seed, from photographs and from generated images."""
        rng = np.random.default_rng(seed)
        places = rng.random((len(self._photos), 2))
        order, rows = rng.permutation(len(self._photos)), rng.permutation(len(self._sd))
        side = self._options.window
        found = [
            *((f"photo{row}", _window(self._photos[row], side, *places[row])) for row in order[:photos]),
            *((f"sd{row}", _window(self._sd[row], side, 0.5, 0.5)) for row in rows[:generated]),
        ]
        return [(name, image) for name, image in found if image.std() > 0]

    def _with_trained(self, seed: int) -> dict[str, Any]:
        """Return all metrics, with the TwoStream networks trained with this seed."""
        trained = {}
        for name in ("cifar", "sd"):
            file = self._options.out / "weights" / f"{name}_{seed}.safetensors"
            self.cells.get(f"trained/{name}/{seed}", lambda name=name, file=file: self._train(name, file, seed))
            trained[f"two_stream:{name}"] = TwoStreamMetric(TwoStreamMetric.Config(weights=str(file)))
        return self._metrics | trained

    def _train(self, name: str, file: Path, seed: int) -> dict[str, Any]:
        images = self._sd if name == "sd" else real_images(self._options.data / "cifar10_train.parquet", most=5000)
        found = train_two_stream(images, file, QualitySettings(steps=self._options.training_steps, seed=seed))
        return {"srcc": found.srcc, "plcc": found.plcc, "held_out_references": found.held_out_references}


def _scaled(image: Tensor) -> Tensor:
    """Scale a photograph so that its shorter side is 576 pixels, which hides its own compression."""
    height, width = image.shape[1:]
    scale = 576 / min(height, width)
    size = (round(width * scale), round(height * scale))
    return torch.from_numpy(np.ascontiguousarray(fit(Image.fromarray(image.permute(1, 2, 0).numpy()), size)))


def _window(image: Tensor, side: int, down: float, right: float) -> Tensor:
    top, left = (int(at * (length - side)) for at, length in ((down, image.shape[1]), (right, image.shape[2])))
    return image[:, top : top + side, left : left + side].float() / 255


def _damaged(image: Tensor, kind: str, level: float, seed: int) -> Tensor:
    if kind == "blur":
        return gaussian_blur(image, 2 * int(3 * level + 0.5) + 1, level).clamp(0, 1)
    if kind == "noise":
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
        return (image + level / 255 * noise).clamp(0, 1)
    file = io.BytesIO()
    Image.fromarray(_bytes(image)).save(file, "JPEG", quality=int(level))
    return torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1).float() / 255


def _bytes(image: Tensor) -> np.ndarray:
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


@torch.no_grad()
def _scores(metrics: dict[str, Any], image: Tensor) -> dict[str, float | None]:
    """Return every score; None where a metric rejects the image (BRISQUE: a single colour) or is not finite."""
    found: dict[str, float | None] = {}
    for name, metric in metrics.items():
        try:
            score = float(metric(image[None], [""]))
        except RewardError:
            score = math.nan
        found[name] = score if math.isfinite(score) else None
    return found


def _direction(metric: str) -> int:
    return 1 if metric.startswith("two_stream") else -1


def _gradient(metric: Any, name: str, image: Tensor) -> tuple[float, Tensor]:
    """Return score and gradient; pyiqa's network itself, since the table decides about the metric's own gradient."""
    leaf = image[None].clone().requires_grad_(True)
    score = metric(leaf, [""]) if name.startswith("two_stream") else metric.network(leaf.clone())
    (gradient,) = torch.autograd.grad(score.sum(), leaf)
    return float(score), gradient[0]


def _one_step(metric: Any, name: str, image: Tensor) -> dict[str, Any]:
    """Measure the gradient, and the score after one signed step of every size."""
    score, gradient = _gradient(metric, name, image)
    row: dict[str, Any] = {"score": score, "finite": bool(gradient.isfinite().all()), "zero": not bool(gradient.any())}
    if row["finite"] and not row["zero"]:
        ascent = _direction(name) * gradient.sign()
        stepped = [(image + size / 255 * ascent).clamp(0, 1) for size in STEPS]
        row["after"] = [_scores({name: metric}, part)[name] for part in stepped]
        # A random signed step of the same size: what the score does without the gradient.
        signs = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).sign()
        row["random"] = [_scores({name: metric}, (image + size / 255 * signs).clamp(0, 1))[name] for size in STEPS[:4]]
    return row


if __name__ == "__main__":
    sys.exit(main())
