"""Published BRISQUE as the reward of a run on photographs: does another published metric fall, and is it caught?

    .venv/bin/python benchmarks/brisque_reward.py --data ../shared/data --out runs/brisque [--seeds 0] [...]

Trains a DDPM of 64 pixels on windows of the photographs (shorter side scaled to 256, so that BRISQUE sees pixels that
were not enlarged), then the arms of `real_images.py` on it: ACPO, and the reward alone. Judges: NIQE on mirrored
images, because it needs 96 pixels; PIQE; TwoStream, trained on damaged windows. The guard only warns, so that runs go
on. The data folder holds photos/ and iqa/. Further arguments are those of `real_images.py`; `--samples` is at least 12.
BRISQUE, NIQE and PIQE: lower is better.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
from pathlib import Path

import numpy as np
import real_images
from PIL import Image

SIDE, SCALED, WINDOWS = 64, 256, 1500
BASE = {
    "image_size": SIDE, "channels": [32, 32, 64, 64], "prediction_type": "v_prediction",
    "timestep_sampling": "log_normal", "steps": 1000, "batch_size": 16,
}  # fmt: skip


def main() -> None:
    """Cut the windows, then train, run and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared/data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", default=["0"])
    options, rest = parser.parse_known_args()
    windows = cut_windows(options.data / "photos", options.out / "windows")
    iqa = options.data / "iqa"
    judges = [
        {"type": "_mirrored:Mirrored", "metric": "niqe", "weights": str(iqa / "niqe_original.mat")},
        {"type": "pyiqa", "metric": "piqe"},
        {"type": "two_stream", "weights": "train", "train_steps": 400},
    ]
    reward = {"type": "pyiqa", "metric": "brisque", "weights": str(iqa / "brisque_live.pth")}
    real_images.main(
        ["--data", str(windows), "--features", str(iqa / "efficientnet_lite0.safetensors"), "--out", str(options.out),
         "--seeds", *options.seeds, *[text for text in rest if "=" not in text],
         f"model.base={json.dumps(BASE)}", f"rewards.train={json.dumps([reward])}",
         f"rewards.judges={json.dumps(judges)}", "rewards.calibration_samples=96", "rollout.prompts_per_iteration=32",
         "sampler.late_per_sample=2", "learner.global_batch=16", *[text for text in rest if "=" in text]]
    )  # fmt: skip


def cut_windows(photos: Path, folder: Path) -> Path:
    """Write the same random windows of all photographs as PNG unless they are there; return the folder."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        draw = np.random.default_rng(0)
        paths = sorted(photos.glob("*.webp"))
        images = []
        for path in paths:
            image = Image.open(path).convert("RGB")
            scale = SCALED / min(image.size)
            images.append(image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS))
        for index in range(WINDOWS):
            image = images[index % len(images)]
            left, top = (int(draw.integers(side - SIDE + 1)) for side in image.size)
            image.crop((left, top, left + SIDE, top + SIDE)).save(folder / f"{index:05d}.png")
    return folder


if __name__ == "__main__":
    main()
