"""A reward on pixels against its latent critic, on the toy SDXL at the same budget.

    .venv/bin/python benchmarks/latent_critic.py --out runs/latent_critic/study.json [--seeds 0 1 2] [KEY=VALUE ...]

For each seed a critic of TwoStream is distilled on rollouts of the base model (`acpo rewards distil`). Then two runs of
configs/toy_sdxl.yaml start from the same prompts and noise: `pixel` trains on TwoStream through the VAE, `critic` on
the critic. Each is measured on the same evaluation samples: TwoStream, a judge that neither run trains on, the exact
oracle error, template entropy, drift, and the CPU seconds of the reward's gradients. The gap is what the trained reward
gained beyond TwoStream, in standard deviations of the base samples: 0 for `pixel`; for `critic`, how far it is cheated.
The guard only warns, so that both runs use the whole budget.

Prints one JSON line per arm and seed, then a table in Markdown: mean and range over seeds. `--out` holds the same rows
and each critic's error by timestep; finished arms, in FILE.cells.jsonl beside it, are not run again. `--images FOLDER`
writes a grid per seed: base, pixel, critic.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _cells import Cells
from safetensors.torch import load_file, save_file

from acpo_dist.config.load import load_config
from acpo_dist.evaluation.metrics.arm import evaluate_toy_arm
from acpo_dist.rewards.naming import metric_section
from acpo_dist.rewards.training.critic import CriticSettings
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.images import save_grid
from acpo_dist.training.context import fixed_groups
from acpo_dist.training.distil import distil
from acpo_dist.training.local import LocalRollouts, open_ports
from acpo_dist.training.run import drive

METRIC, JUDGE, CRITIC = "two_stream", "strided_judge", "latent_critic"
COLUMNS = ("two_stream", "judge", "oracle_mse", "template_entropy", "drift", "gap", "reward_cpu_s", "cpu_s")


def main() -> None:
    """Distil, run both arms for every seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="JSON file; critics and samples are kept beside it")
    parser.add_argument("--samples", type=int, default=240, help="evaluation samples")
    parser.add_argument("--rollouts", type=int, default=768, help="rollouts that a critic is distilled from")
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps of a critic")
    parser.add_argument("--width", type=int, default=32, help="width of a critic")
    parser.add_argument("--images", type=Path, default=None, help="write a grid per seed into this folder")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    cells = Cells(options.out.with_suffix(".cells.jsonl"))
    rows: dict[str, list[dict[str, float]]] = {"base": [], "pixel": [], "critic": []}
    errors = {}
    for seed in options.seeds:
        critic = options.out.parent / f"critic-{seed}.safetensors"
        errors[seed] = cells.get(f"distil/{seed}", lambda seed=seed, file=critic: distilled(seed, file, options))
        for arm in ("pixel", "critic"):
            found = cells.get(f"{arm}/{seed}", lambda arm=arm, seed=seed, file=critic: run(arm, seed, file, options))
            if arm == "critic":
                # Only this arm measures critic and metric on the base samples.
                rows["base"].append(found["base"])
            rows[arm].append(found["end"])
            sys.stdout.write(json.dumps({"seed": seed, "arm": arm, **found["end"]}) + "\n")
            sys.stdout.flush()
        if options.images:
            grid(seed, options)
    options.out.write_text(json.dumps({"arms": rows, "critics": errors}, indent=2) + "\n")
    table(rows)


def distilled(seed: int, file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Distil the critic of a seed and return its report."""
    config = load_config("toy_sdxl", [f"run.seed={seed}", *options.overrides])
    report = distil(
        metric_section(METRIC, "METRIC"), config, LocalRollouts(config, device="cpu"), file,
        CriticSettings(width=options.width, steps=options.steps, seed=seed), count=options.rollouts,
        console=Console(quiet=True),
    )  # fmt: skip
    return asdict(report)


def run(arm: str, seed: int, critic: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run one arm and return its metrics at the start and at the end."""
    train: dict[str, Any] = {"type": METRIC}
    judges = [{"type": JUDGE}]
    if arm == "critic":
        train, judges = {"type": CRITIC, "weights": str(critic)}, [{"type": METRIC}, *judges]
    spent = [0.0]
    found: dict[str, dict[str, float]] = {}
    spread: dict[str, float] = {}

    def measure(label: str, config, ports, prompts) -> None:
        groups = fixed_groups(config, prompts, options.samples, stream="evaluation")
        names = [entry.name for entry in (*config.rewards.train, *config.rewards.judges)]
        report = evaluate_toy_arm(ports.rollout, ports.reward, ports.learner, groups, names)
        if label == "base":
            scores = ports.reward.score(ports.rollout.generate(groups), names)
            spread.update({name: statistics.stdev(scores[name].values()) for name in names})
        found[label] = {
            **report.scores, **report.oracle, "judge": report.scores[JUDGE], "drift": report.drift,
            **{f"std/{name}": value for name, value in spread.items()},
        }  # fmt: skip
        save_file({"images": report.images[:12]}, shown(options, seed, label if label == "base" else arm))

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            "toy_sdxl",
            [f"run.seed={seed}", f"run.dir={folder}/run", "tracking.mlflow=false", "guard.action=warn",
             f"rewards.train={json.dumps([train])}", f"rewards.judges={json.dumps(judges)}", *options.overrides],
        )  # fmt: skip
        started = time.process_time()
        drive(
            config, lambda config, tracker: timed_ports(config, tracker, spent), Console(quiet=True),
            at_start=lambda c, p, t: measure("base", c, p, t), at_end=lambda c, p, t: measure("end", c, p, t),
        )  # fmt: skip
    end, base = found["end"], found["base"]
    gained = {name: (end[name] - base[name]) / spread[name] for name in spread}
    # Both measurements included, which are the same in both arms.
    end |= {"cpu_s": time.process_time() - started, "reward_cpu_s": spent[0]}
    end["gap"] = gained[train["type"]] - gained[METRIC]
    end |= {f"gain/{name}": value for name, value in gained.items()}
    return found


@contextmanager
def timed_ports(config: Any, tracker: Any, spent: list[float]) -> Iterator[Any]:
    """Open the ports in this process, and add the CPU seconds of the reward's gradients to `spent`."""
    with open_ports(config, tracker) as ports:
        reward: Any = ports.reward
        submit = reward.submit

        def timed(*arguments: Any) -> Any:
            started = time.process_time()
            future = submit(*arguments)
            spent[0] += time.process_time() - started
            return future

        reward.submit = timed
        yield ports


def shown(options: argparse.Namespace, seed: int, label: str) -> Path:
    """File of the samples that a grid shows."""
    return options.out.parent / f"samples-{seed}-{label}.safetensors"


def grid(seed: int, options: argparse.Namespace) -> None:
    """Write the same samples of base, pixel and critic, one row each."""
    arms = ["base", "pixel", "critic"]
    images = [load_file(shown(options, seed, arm))["images"] for arm in arms]
    save_grid(torch.cat(images), options.images / f"seed{seed}.png", columns=12, labels=arms, scale=2)


def table(rows: dict[str, list[dict[str, float]]]) -> None:
    """Print mean and range over seeds."""
    sys.stdout.write(f"| arm | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}\n")
    for arm, found in rows.items():
        cells = []
        for name in COLUMNS:
            values = [row[name] for row in found if name in row]
            cell = f"{statistics.fmean(values):.3g} ({min(values):.3g}..{max(values):.3g})" if values else "-"
            cells.append(cell)
        sys.stdout.write(f"| {arm} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
