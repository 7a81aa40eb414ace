"""Published BRISQUE as the reward of a run on CIFAR-10: do other published metrics follow, and is it caught?

    .venv/bin/python benchmarks/brisque_reward.py --data ../shared/data --out runs/brisque [--seeds 0 1 2] [...]

Trains the base model of `real_images.py` (3,000 steps on 48,000 images) unless it is there, then its arms: ACPO, and
the reward alone. Metrics score the images enlarged twofold (bicubic), because BRISQUE's windows are larger than what
32 pixels allow. Judges: NIQE, with reflections because it needs 96 pixels; PIQE; TwoStream, trained on damaged images.
The guard only warns, so that runs go on. The data folder holds cifar10_train.parquet and iqa/. Further arguments are
those of `real_images.py`; `--samples` is at least 12. BRISQUE, NIQE and PIQE: lower is better.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
from pathlib import Path

import real_images

RUN = [
    "data.max_images=48000", "model.base.steps=3000", "rewards.calibration_samples=96",
    "rollout.prompts_per_iteration=32", "sampler.late_per_sample=4", "learner.global_batch=32",
]  # fmt: skip


def main() -> None:
    """Run `real_images.py` with BRISQUE as the reward."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared/data")
    options, rest = parser.parse_known_args()
    iqa = options.data / "iqa"
    pyiqa = {"type": "_resampled:Resampled"}
    reward = {**pyiqa, "metric": "brisque", "weights": str(iqa / "brisque_live.pth")}
    judges = [
        {**pyiqa, "metric": "niqe", "weights": str(iqa / "niqe_original.mat"), "mirror": True},
        {**pyiqa, "metric": "piqe"},
        {"type": "two_stream", "weights": "train"},
    ]
    real_images.main([
        "--data", str(options.data / "cifar10_train.parquet"),
        "--features", str(iqa / "efficientnet_lite0.safetensors"),
        *[text for text in rest if "=" not in text],
        f"rewards.train={json.dumps([reward])}", f"rewards.judges={json.dumps(judges)}", *RUN,
        *[text for text in rest if "=" in text],
    ])  # fmt: skip


if __name__ == "__main__":
    main()
