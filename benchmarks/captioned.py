"""Held-out denoising error against the judge's gain on captioned images: toy SDXL, with and without the data terms.

    .venv/bin/python benchmarks/captioned.py --images 240 --out FOLDER [--arm NAME=KEY=VALUE,...] [KEY=VALUE ...]

Writes a folder of damaged toy scenes with captions, trains every arm with the same held-out images, and prints one JSON
line per arm: the judge's gain in standard deviations of base samples, drift, and the ratio of the denoising errors.
"""

import os

# Before torch is imported: two torch threads on contended cores are tens of times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from acpo_dist.config.load import load_config
from acpo_dist.data.toy.damage import BASE_DAMAGE, spoil
from acpo_dist.data.toy.world import caption_index, captions, templates
from acpo_dist.evaluation.suites.denoising import held_out_denoising
from acpo_dist.evaluation.suites.subject import open_model
from acpo_dist.tracking.console import Console
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive

DATA = "algorithm.anchor.source=data"
ARMS = {
    "reward only": "algorithm.anchor.weight=0",
    "anchor on rollouts": "",
    "anchor on data": DATA,
    "and data_weight": f"{DATA},algorithm.data_weight=20",
    "and reward on data": f"{DATA},algorithm.data_weight=20,algorithm.data_reward_weight=1",
}


def main() -> None:
    """Train the arms and print their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=OVERRIDES")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    folder = options.out / "images"
    if not folder.is_dir():
        write_images(folder, options.images)
    for name, overrides in (dict(text.split("=", 1) for text in options.arm) or ARMS).items():
        root = options.out / name.replace(" ", "-")
        config = load_config(
            "toy_sdxl",
            [f"data.path={folder}", "data.held_out=0.25", f"data.latent_cache={options.out / 'latents'}",
             f"run.dir={root}", "tracking.mlflow=false", *options.overrides, *filter(None, overrides.split(","))],
        )  # fmt: skip
        started = time.process_time()
        result = drive(config, open_ports, Console(quiet=True))
        found = held_out_denoising(open_model(str(root), [], checkpoint="newest", prompted=True))
        assert found is not None, "the runs hold images out"
        row = {
            "arm": name, "judge_gain": result.metrics["gain/strided_judge"],
            "reward_gain": result.metrics["gain/two_stream"], "drift_rms": result.metrics["drift/rms"],
            "denoising_ratio": found["ratio"], "denoising_base": found["base"], "held_out": found["num_images"],
            "by_timestep": {t: round(found["by_timestep"]["model"][t] / e, 4)
                            for t, e in found["by_timestep"]["base"].items()},
            "iterations": result.iterations, "cpu_seconds": time.process_time() - started,
        }  # fmt: skip
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


def write_images(folder: Path, count: int) -> None:
    """Write damaged scenes, as the toy base model has seen them, with a caption beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = torch.randperm(len(templates()), generator=torch.Generator().manual_seed(1))[:count]
    images, _ = spoil(templates()[chosen], BASE_DAMAGE, torch.Generator().manual_seed(2))
    for number, (index, image) in enumerate(zip(chosen.tolist(), images, strict=True)):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(captions()[int(caption_index()[index])])


if __name__ == "__main__":
    main()
