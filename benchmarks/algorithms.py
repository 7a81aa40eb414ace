"""Gain and cost of each algorithm on the toy SDXL, over several seeds.

    .venv/bin/python benchmarks/algorithms.py [--seeds 0 1 2] [--only acpo nft ...] [--every 10] [KEY=VALUE ...]

Each arm is `acpo train configs/toy_<name>.yaml` with the overrides in `ARMS`. Every `--every` iterations the same
evaluation samples are drawn, scored by reward and judge, and judged exactly by the oracle, which nothing trains on.
Cost is counted until the oracle error first falls to `--goal` times the base's: CPU seconds of training (evaluation
left out) and network calls per sample (a forward of one sample is 1, a forward with its backward 3). One JSON line per
evaluation; the table is in Markdown, mean and range over seeds; `gain in spreads` is the mean gain of judge and of
oracle error as a multiple of its standard deviation over seeds. `--at cpu_seconds=40` and `--at drift=0.1` interpolate
between the evaluations instead, for a comparison at equal compute or equal drift. Seeds can be spread over processes:
`--table FILE...` reads lines. `--images FOLDER` writes a grid per evaluation.
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
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from acpo_dist.config.load import load_config
from acpo_dist.evaluation.metrics.arm import evaluate_toy_arm
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.images import save_grid
from acpo_dist.training.context import fixed_groups
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive

_CHAIN = (
    "sampler.late_per_sample=12",
    "run.iterations=15",
    "learner.micro_batch=32",
    "learner.global_batch=32",
    "algorithm.anchor={start: 0.006, budget: 0.5, uniform: false}",
    "guard.drift_budget=0.5",
)
"""Fewer, larger optimiser steps through the sampler, from a lower anchor weight."""
ARMS: dict[str, tuple[str, ...]] = {
    "acpo": ("toy_sdxl",),
    "acpo_sd15": ("toy_sd15",),
    "acpo_4": ("toy_sdxl", "algorithm.gradient_steps=4", *_CHAIN),
    "acpo_random": ("toy_sdxl", "algorithm.gradient_steps=random", *_CHAIN),
    "alignprop": ("toy_draft", "algorithm.gradient_steps=random"),
    **{
        name: (f"toy_{name}",)
        for name in ("draft", "refl", "nft", "rwr", "ddpo", "dpo", "ncp_dpo", "cpo", "ncp_cpo", "sft", "ncp_sft")
    },
}
"""Name -> configuration and overrides."""
METRICS = ("judge", "oracle_mse", "drift", "template_entropy", "caption_accuracy")


def main() -> None:
    """Run the arms, or read what runs have written, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--samples", type=int, default=240)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--goal", type=float, default=0.7, help="oracle error, as a share of the base's")
    parser.add_argument("--table", type=Path, nargs="+", default=None, help="only read these files of JSON lines")
    parser.add_argument("--at", default=None, metavar="KEY=VALUE", help="cpu_seconds=S or drift=D: interpolate there")
    parser.add_argument("--images", type=Path, default=None)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    if options.table:
        lines = [
            json.loads(line) for path in options.table for line in path.read_text().splitlines() if line[:1] == "{"
        ]
    else:
        lines = [row for seed in options.seeds for name in options.only for row in run_arm(name, seed, options)]
    sys.stdout.write(compare_at(lines, *options.at.split("=")) if options.at else make_table(lines, options.goal))


class Meter:
    """CPU seconds and network calls of training, excluding evaluation."""

    def __init__(self, networks) -> None:
        """Count the calls of these networks."""
        self.calls, self.seconds, self._since = 0, 0.0, time.process_time()
        self.running = True
        for network in networks:
            network.register_forward_hook(self._count)

    def _count(self, _module, inputs, _output) -> None:
        if self.running:
            self.calls += len(inputs[0]) * (3 if torch.is_grad_enabled() else 1)

    @contextmanager
    def paused(self):
        """Exclude the calls in this block."""
        self.seconds += time.process_time() - self._since
        self.running = False
        yield
        self.running, self._since = True, time.process_time()


class Watched:
    """A weight channel that evaluates at regular versions."""

    def __init__(self, inner, evaluate, every: int) -> None:
        """Wrap the channel."""
        self._inner, self._evaluate, self._every = inner, evaluate, every

    def publish(self, version: int) -> str:
        """Publish the weights, and evaluate every `every` versions; returns the checksum."""
        checksum = self._inner.publish(version)
        if version % self._every == 0:
            self._evaluate(version)
        return checksum


def run_arm(name: str, seed: int, options) -> list[dict]:
    """Execute one run and return its evaluations, the base model's first."""
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            ARMS[name][0],
            [f"run.seed={seed}", f"run.dir={folder}/run", "tracking.mlflow=false", *ARMS[name][1:], *options.overrides],
        )
        prompts: list[str] = []

        @contextmanager
        def opened(config, tracker):
            with open_ports(config, tracker) as ports:
                meter = Meter([ports.rollout.worker.family.network, ports.learner.worker.family.network])

                def evaluate(version: int) -> None:
                    with meter.paused():
                        groups = fixed_groups(config, prompts, options.samples, stream="evaluation")
                        names = [entry.name for entry in (*config.rewards.train, *config.rewards.judges)]
                        report = evaluate_toy_arm(ports.rollout, ports.reward, ports.learner, groups, names)
                        row = {
                            "arm": name, "seed": seed, "iteration": version, "cpu_seconds": round(meter.seconds, 2),
                            "calls": meter.calls, "reward": report.scores[names[0]],
                            "judge": report.scores["strided_judge"],
                            **report.oracle, "drift": report.drift,
                        }  # fmt: skip
                    if options.images:
                        save_grid(
                            report.images[:32], options.images / f"{name}-{seed}-{version}.png", columns=8, scale=2
                        )
                    rows.append(row)
                    sys.stdout.write(json.dumps(row) + "\n")
                    sys.stdout.flush()

                yield replace(ports, weights=Watched(ports.weights, evaluate, options.every))

        from acpo_dist.data.prompts import load_prompts

        prompts.extend(load_prompts(config.data.prompts, config.data.prompt_column))
        drive(config, opened, Console(quiet=True))
    return rows


def make_table(lines: list[dict], goal: float) -> str:
    """Return Markdown: the last evaluation of every arm relative to the base model of the same seed, and the cost."""
    rows = [
        f"| algorithm | seeds | judge / base | oracle error / base | gain in spreads | entropy / base | "
        f"caption / base | drift | CPU s | CPU s to {goal:g} | calls to {goal:g} |",
        "|---" * 11 + "|",
    ]
    for name, seeds in by_arm(lines).items():
        ends, costs = [], []
        for evaluations in seeds.values():
            base, end = evaluations[0], evaluations[-1]
            # Calibration is the same for all of them, and is left out.
            for row in evaluations[1:]:
                row["cpu_seconds"] -= base["cpu_seconds"]
                row["calls"] -= base["calls"]
            ends.append(
                {key: end[key] / base[key] if base[key] else end[key] for key in METRICS} | {"cpu": end["cpu_seconds"]}
            )
            costs.append(next((row for row in evaluations if row["oracle_mse"] <= goal * base["oracle_mse"]), None))
        cells = [
            spread([end[key] for end in ends])
            for key in ("judge", "oracle_mse", "template_entropy", "caption_accuracy", "drift", "cpu")
        ]
        cells.insert(2, f"{in_spreads(ends, 'judge')}, {in_spreads(ends, 'oracle_mse')}")
        reached = [cost for cost in costs if cost is not None]
        if len(reached) == len(costs):
            cells += [
                f"{statistics.fmean(c['cpu_seconds'] for c in reached):.0f}",
                f"{statistics.fmean(c['calls'] for c in reached) / 1000:.0f} k",
            ]
        else:
            cells += [f"reached by {len(reached)} of {len(costs)}", "-"]
        rows.append(f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def compare_at(lines: list[dict], key: str, value: str) -> str:
    """Return Markdown: metrics relative to the base model where `key` first reaches `value`, interpolated."""
    keys = ("judge", "oracle_mse", "template_entropy", "caption_accuracy", "drift", "cpu_seconds")
    rows = ["| algorithm | seeds | " + " | ".join(keys) + " |", "|---" * (len(keys) + 2) + "|"]
    for name, seeds in by_arm(lines).items():
        found = []
        for evaluations in seeds.values():
            base = evaluations[0]
            points = [
                {k: row[k] / base[k] if base[k] and k != "cpu_seconds" else row[k] - base[k] for k in keys}
                for row in evaluations
            ]
            for before, after in pairwise(points):
                if before[key] < float(value) <= after[key]:
                    share = (float(value) - before[key]) / (after[key] - before[key])
                    found.append({k: before[k] + share * (after[k] - before[k]) for k in keys})
                    break
        cells = [spread([point[k] for point in found]) if found else "-" for k in keys]
        rows.append(f"| {name} | {len(found)} of {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def by_arm(lines: list[dict]) -> dict[str, dict[int, list[dict]]]:
    """Return the evaluations by arm and seed, in the order of their iterations."""
    runs: dict[str, dict[int, list[dict]]] = {}
    for line in sorted(lines, key=lambda line: line["iteration"]):
        runs.setdefault(line["arm"], {}).setdefault(line["seed"], []).append(line)
    return runs


def in_spreads(ends: list[dict[str, float]], key: str) -> str:
    """Return the mean change of a ratio as a multiple of its standard deviation over seeds; - for one seed."""
    ratios = [end[key] for end in ends]
    if len(ratios) < 2:
        return "-"
    gain = statistics.fmean(ratios) - 1 if key == "judge" else 1 - statistics.fmean(ratios)
    return f"{gain / statistics.stdev(ratios):.1f}"


def spread(values: list[float]) -> str:
    """Format the mean, with the range if there is one."""
    mean = statistics.fmean(values)
    digits = 0 if mean >= 20 else 3 if mean < 1 else 2
    text = f"{mean:.{digits}f}"
    return text if len(values) == 1 or digits == 0 else f"{text} [{min(values):.{digits}f}..{max(values):.{digits}f}]"


if __name__ == "__main__":
    main()
