"""ACPO and reward only on real images: base model, both arms and real images side by side, over several seeds.

    .venv/bin/python benchmarks/real_images.py --data cifar10_train.parquet --features efficientnet_lite0.safetensors \
        --out runs/real [--seeds 0 1 2] [--iterations 20] [--samples 512] [KEY=VALUE ...]

Trains the base model and the metrics of `configs/cifar10_ddpm.yaml` once, then each arm and seed. Images are drawn by
plain diffusers (`DDIMScheduler` under the model's own configuration) from the same noise for all arms. Finished runs
are kept, so the command can be repeated after an interruption. Writes results.json and images.png. With
`data.max_images=N`, models and metrics are trained on the first N images of the file, and real images are others.

Columns: `std` and `saturated` describe x_0 in [-1, 1]. `frechet` (covariances shrunk by 0.1, because there are fewer
images than features) and `kid` are distances to real images on EfficientNet-Lite0 features. `denoising` is the error of
the noise prediction on real images, and `drift` the root mean square of its change, both on the same noised images.
`diversity` is the mean distance of two images on the features.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline
from torch import Tensor

from acpo_dist.config.load import load_config
from acpo_dist.data.images import load_images
from acpo_dist.diffusion.prediction import to_noise
from acpo_dist.evaluation.metrics.distances import frechet_distance, kid
from acpo_dist.evaluation.metrics.diversity import mean_pairwise_distance
from acpo_dist.evaluation.suites.set_metrics import open_extractor
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.images import save_grid
from acpo_dist.training.local import open_ports
from acpo_dist.training.prepare import prepare
from acpo_dist.training.run import drive
from acpo_dist.workers.reward.worker import RewardWorker

ARMS = {
    "reward_only": ["algorithm.anchor.weight=0", "algorithm.anchor.budget=null", "learner.lr_decay_ratio=0"],
    "acpo": [],
}
COLUMNS = ("std", "saturated", "frechet", "kid", "denoising", "drift", "diversity")
STEPS = 16
SHOWN = 12


def main(arguments: list[str] | None = None, source: str = "cifar10_ddpm") -> None:
    """Run what is missing of a configuration, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--features", type=Path, required=True, help="EfficientNet-Lite0 weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--train-only", action="store_true", help="stop after the runs")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    common = [f"data.path={options.data}", "tracking.mlflow=false", f"run.iterations={options.iterations}"]
    common += options.overrides
    parts = prepare(load_config(source, common), options.out / "base", Console())
    fixed = [*common, f"model.path={parts.model.path}", *_weights(parts, "train"), *_weights(parts, "judges")]
    for seed in options.seeds:
        for arm in options.arms:
            folder = options.out / f"{arm}-{seed}"
            overrides = [*fixed, f"run.seed={seed}", f"run.dir={folder}", *ARMS[arm]]
            drive(load_config(source, overrides), open_ports, Console(), resume="auto")
    if options.train_only:
        return
    study = Study(options, parts)
    rows = {"real": [study.real()], "base": [study.model("base", Path(parts.model.path))]}
    for arm in options.arms:
        rows[arm] = [study.model(f"{arm}-{seed}", options.out / f"{arm}-{seed}/export") for seed in options.seeds]
    save_grid(torch.cat(study.shown), options.out / "images.png", columns=SHOWN, labels=study.labels, scale=2)
    (options.out / "results.json").write_text(json.dumps(rows, indent=1))
    columns = (*study.scorers, *COLUMNS)
    sys.stdout.write("| images | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|\n")
    for name, measured in rows.items():
        cells = [_spread([row[key] for row in measured if key in row]) for key in columns]
        sys.stdout.write(f"| {name} | " + " | ".join(cells) + " |\n")


class Study:
    """Measures sets of images against the same real images, noise and features."""

    def __init__(self, options: argparse.Namespace, parts: Any) -> None:
        """Load metrics, features and real images."""
        self._samples = options.samples
        self.scorers = {
            entry.name: RewardWorker(entry, model=None, cut="image", wire_dtype="float32")
            for entry in (*parts.rewards.train, *parts.rewards.judges)
        }
        self._extract = open_extractor(f"efficientnet-lite0:{options.features}")
        images = load_images(options.data, parts.data.image_column, None, parts.model.base.image_size)
        trained = parts.data.max_images or 0
        if len(images) - trained < 5 * options.samples:
            raise SystemExit(
                f"{options.data} leaves {len(images) - trained} images; --samples takes five times as many."
            )
        order = trained + torch.randperm(len(images) - trained, generator=torch.Generator().manual_seed(0))
        self._real = images.batch(order[: options.samples])
        self._reference = self._extract(images.batch(order[options.samples : 5 * options.samples])).values
        self._noised: dict[str, Tensor] = {}
        self.shown: list[Tensor] = []
        self.labels: list[str] = []

    def real(self) -> dict[str, float]:
        """Measure real images, disjoint from the reference set."""
        return self._images("real", self._real, 2 * self._real - 1)

    @torch.no_grad()
    def model(self, name: str, folder: Path) -> dict[str, float]:
        """Measure a `DDPMPipeline` folder; the first one is the base model."""
        pipeline: Any = DDPMPipeline.from_pretrained(folder)
        unet = pipeline.unet.eval()
        scheduler: Any = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
        scheduler.set_timesteps(STEPS)
        sample = torch.randn(self._samples, *self._real.shape[1:], generator=torch.Generator().manual_seed(1))
        for timestep in scheduler.timesteps:
            output = torch.cat([unet(part, timestep).sample for part in sample.split(32)])
            sample = scheduler.step(output, timestep, sample).prev_sample
        return self._images(name, (sample / 2 + 0.5).clamp(0, 1), sample) | self._denoising(unet, scheduler)

    def _images(self, name: str, images: Tensor, clean: Tensor) -> dict[str, float]:
        images = (images * 255).round().to(torch.uint8)
        self.shown.append(images[:SHOWN])
        self.labels.append(name)
        features = self._extract(images).values
        prompts = ("",) * len(images)
        return {
            **{name: statistics.fmean(worker.score(images, prompts)) for name, worker in self.scorers.items()},
            "std": clean.std().item(),
            "saturated": (clean.abs() >= 0.999).double().mean().item(),
            "frechet": frechet_distance(features, self._reference, shrinkage=0.1).value,
            "kid": kid(features, self._reference, subset_size=min(256, len(images))).mean,
            "diversity": mean_pairwise_distance(features),
        }  # fmt: skip

    def _denoising(self, unet: Any, scheduler: Any) -> dict[str, float]:
        generator = torch.Generator().manual_seed(2)
        clean = 2 * self._real - 1
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        parts = zip(noisy.split(32), timesteps.split(32), strict=True)
        output = torch.cat([unet(part, times).sample for part, times in parts])
        predicted = to_noise(output, noisy, scheduler.alphas_cumprod[timesteps], scheduler.config.prediction_type)
        base = self._noised.setdefault("base", predicted)
        return {
            "denoising": (predicted - noise).square().mean().item(),
            "drift": (predicted - base).square().mean().sqrt().item(),
        }


def _weights(parts: Any, role: str) -> list[str]:
    entries = [
        entry.model_dump(mode="json", exclude_defaults=True) | {"type": entry.type}
        for entry in getattr(parts.rewards, role)
    ]
    return [f"rewards.{role}={json.dumps(entries)}"]


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.4f}"
    return text if len(values) == 1 else f"{text} [{min(values):.4f}..{max(values):.4f}]"


if __name__ == "__main__":
    main()
