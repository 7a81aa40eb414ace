"""Quality gained per unit of drift on a toy model, in process: base, reward only and ACPO over several seeds.

    .venv/bin/python benchmarks/toy_arms.py --seeds 0 1 2 [--arm NAME=KEY=VALUE,KEY=VALUE ...] [KEY=VALUE ...]
    .venv/bin/python benchmarks/toy_arms.py --source toy_flow

Prints one JSON line per arm and seed, then each figure's mean and range over seeds as a ratio to the base of the same
seed: both are measured in one run, from the same prompts and noise.
"""

import os

# Before torch is imported: two torch threads on contended cores are tens of times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from acpo_dist.cli import demo
from acpo_dist.config.load import load_config
from acpo_dist.evaluation.metrics.arm import evaluate_toy_arm
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.images import save_grid
from acpo_dist.training.context import fixed_groups
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive

ARMS = {name: ",".join(overrides) for name, overrides in demo.ARMS.items()}


def main() -> None:
    """Run the arms and print their metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--source", default="toy_sdxl", help="configuration of all arms")
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=OVERRIDES")
    parser.add_argument("--samples", type=int, default=480)
    parser.add_argument("--images", type=Path, default=None, help="write a grid per seed into this folder")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    arms = dict(text.split("=", 1) for text in options.arm) or ARMS
    ratios: dict[str, dict[str, list[float]]] = {}
    for seed in options.seeds:
        rows = run_seed(seed, arms, options)
        for name, row in rows.items():
            for key, value in row.items():
                if rows["base"].get(key):
                    ratios.setdefault(name, {}).setdefault(key, []).append(value / rows["base"][key])
    for name, metrics in ratios.items():
        cells = [
            f"{k} {statistics.fmean(v):.3f} [{min(v):.3f}..{max(v):.3f}]"
            for k, v in metrics.items()
            if k != "cpu_seconds"
        ]
        sys.stdout.write(f"{name} / base over {len(options.seeds)} seeds: {'  '.join(cells)}\n")


def run_seed(seed: int, arms: dict[str, str], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run all arms of one seed and return metrics by arm, the base model first."""
    rows: dict[str, dict[str, float]] = {}
    shown: list[torch.Tensor] = []

    def measure(label: str, config, ports, prompts) -> None:
        groups = fixed_groups(config, prompts, options.samples, stream="evaluation")
        names = [entry.name for entry in (*config.rewards.train, *config.rewards.judges)]
        report = evaluate_toy_arm(ports.rollout, ports.reward, ports.learner, groups, names)
        rows[label] = {
            "reward": report.scores[names[0]],
            "judge": report.scores[names[1]],
            **report.oracle,
            "drift": report.drift,
        }
        shown.append(report.images[:12])

    for name, overrides in arms.items():
        with tempfile.TemporaryDirectory() as folder:
            config = load_config(
                options.source,
                [f"run.seed={seed}", f"run.dir={folder}/run", "tracking.mlflow=false", *options.overrides,
                 *filter(None, overrides.split(","))],
            )  # fmt: skip
            started = time.process_time()
            drive(
                config, open_ports, Console(quiet=True),
                at_start=None if rows else lambda c, p, t: measure("base", c, p, t),
                at_end=lambda c, p, t, label=name: measure(label, c, p, t),
            )  # fmt: skip
            fresh = ["base", name] if len(rows) == 2 else [name]
            rows[name]["cpu_seconds"] = time.process_time() - started
            for label in fresh:
                sys.stdout.write(json.dumps({"seed": seed, "arm": label, **rows[label]}) + "\n")
            sys.stdout.flush()
    if options.images:
        save_grid(torch.cat(shown), options.images / f"seed{seed}.png", columns=12, labels=["base", *arms], scale=2)
    return rows


if __name__ == "__main__":
    main()
