"""Gain and cost of each algorithm on the toy SDXL, over several seeds.

    .venv/bin/python benchmarks/algorithms.py [--seeds 0 1 2] [--only acpo nft ...] [--every 10] [KEY=VALUE ...]

Each arm is `acpo train configs/toy_<name>.yaml` with the overrides in `ARMS`. Every `--every` iterations and after the
last, the same evaluation samples are drawn, scored by reward and judge, and judged exactly by the oracle, which nothing
trains on. `scenes kept` is the share of them that show what the base model drew from the same noise. Cost is counted
until the oracle error first falls to `--goal` times the base's: network calls per sample (a forward of one sample is 1,
a forward with its backward 3), which do not depend on the machine, and CPU seconds of training without evaluation. One
JSON line per evaluation; the table is in Markdown, mean and range over seeds; `gain in spreads` is the mean gain of
judge and of oracle error as a multiple of its standard deviation over seeds. `--at cpu_seconds=40`, `--at calls=30000`
and `--at drift=0.1` interpolate between the evaluations instead, for a comparison at equal compute or equal drift.
Seeds can be spread over processes: `--table FILE...` reads lines, or the JSON files of earlier `--out`. `--out FOLDER`
writes all evaluations and a chart, algorithms.json and algorithms.png, and continues after the last finished run when
started again. `--images FOLDER` writes a grid per evaluation.
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
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from _cells import Cells
from torch import Tensor

from acpo_dist.config.load import load_config
from acpo_dist.data.toy.oracle import kept_scenes
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
_RANDOM = (
    "algorithm.gradient_steps=random",
    "run.iterations=25",
    "sampler.late_per_sample=12",
    "algorithm.anchor={start: auto, budget: 0.16, rate: 0.3}",
    "guard.drift_budget=0.16",
    "learner={micro_batch: 32, global_batch: 32, inner_epochs: 1}",
)
"""What `toy_sdxl_random.yaml` sets, for other toys."""
_WIDER = ("algorithm.anchor.budget=0.23", "guard.drift_budget=0.23")
ARMS: dict[str, tuple[str, ...]] = {
    "acpo": ("toy_sdxl",),
    "acpo_sd15": ("toy_sd15",),
    "acpo_4": ("toy_sdxl", "algorithm.gradient_steps=4", *_CHAIN),
    "acpo_random": ("toy_sdxl", "algorithm.gradient_steps=random", *_CHAIN),
    "acpo_random_16": ("toy_sdxl_random",),
    "acpo_random_near": ("toy_sdxl_random", *_WIDER),
    "acpo_sd15_16": ("toy_sd15", *_RANDOM),
    "acpo_sd15_near": ("toy_sd15", *_RANDOM, *_WIDER),
    "acpo_flow": ("toy_flow",),
    "acpo_flow_16": ("toy_flow", *_RANDOM),
    "alignprop": ("toy_draft", "algorithm.gradient_steps=random"),
    "draft_lv": ("toy_draft", "algorithm.low_variance_samples=2"),
    # Near DRaFT+ (NeMo-Aligner), which penalises one prediction per sampler step; here each branch is penalised.
    "draft_anchored": ("toy_draft", "algorithm.anchor={space: eps, weight: 10, uniform: false}"),
    **{
        name: (f"toy_{name}",)
        for name in ("draft", "refl", "nft", "crd", "rwr", "ddpo", "dpo", "ncp_dpo", "cpo", "ncp_cpo", "sft", "ncp_sft")
    },
}
"""Name -> configuration and overrides."""
RATIOS = ("judge", "oracle_mse", "template_entropy", "caption_accuracy", "kept")
DIFFERENCES = ("drift", "cpu_seconds", "calls")
OTHER = {"calls": "network calls", "drift": "drift"}


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
    parser.add_argument("--out", type=Path, default=None, help="folder of algorithms.json and algorithms.png")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    if options.table:
        lines = [row for path in options.table for row in read_lines(path)]
    else:
        lines = [row for seed in options.seeds for name in options.only for row in finished_or_run(name, seed, options)]
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(map(json.dumps, lines))
        (options.out / "algorithms.json").write_text(f'{{"evaluations": [\n{rows}\n]}}\n')
        draw(lines, options.out / "algorithms.png")
    sys.stdout.write(compare_at(lines, *options.at.split("=")) if options.at else make_table(lines, options.goal))


def finished_or_run(name: str, seed: int, options) -> list[dict]:
    """Return the evaluations of a run; with `--out` from runs.jsonl there, if the same run has finished before.

    Overrides of the command line become part of the arm's name.
    """
    key = " ".join(["run", name, str(seed), str(options.samples), str(options.every), *options.overrides])
    rows = (
        Cells(options.out / "runs.jsonl").get(key, lambda: run_arm(name, seed, options))
        if options.out
        else run_arm(name, seed, options)
    )
    return [{**row, "arm": " ".join([name, *options.overrides])} for row in rows]


def read_lines(path: Path) -> list[dict]:
    """Return the evaluations of a file of JSON lines, or of the JSON file that `--out` writes."""
    if path.suffix == ".json":
        return json.loads(path.read_text())["evaluations"]
    return [json.loads(line) for line in path.read_text().splitlines() if line[:1] == "{"]


class Meter:
    """CPU seconds and network calls of training, excluding evaluation."""

    def __init__(self, networks) -> None:
        """Count the calls of these networks."""
        self.calls, self.seconds, self._since = 0, 0.0, time.process_time()
        self.running = True
        for network in networks:
            network.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, _module, inputs, named, _output) -> None:
        if self.running:
            samples = len(inputs[0] if inputs else named["hidden_states"])
            self.calls += samples * (3 if torch.is_grad_enabled() else 1)

    @contextmanager
    def paused(self):
        """Exclude the calls in this block."""
        self.seconds += time.process_time() - self._since
        self.running = False
        yield
        self.running, self._since = True, time.process_time()


class Watched:
    """A weight channel that evaluates at regular versions and at the last one."""

    def __init__(self, inner, evaluate, every: int, last: int) -> None:
        """Wrap the channel."""
        self._inner, self._evaluate, self._every, self._last = inner, evaluate, every, last

    def publish(self, version: int) -> str:
        """Publish the weights, and evaluate every `every` versions and after the last; returns the checksum."""
        checksum = self._inner.publish(version)
        if version % self._every == 0 or version == self._last:
            self._evaluate(version)
        return checksum


def run_arm(name: str, seed: int, options) -> list[dict]:
    """Execute one run and return its evaluations, the base model's first."""
    rows: list[dict] = []
    base: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            ARMS[name][0],
            [f"run.seed={seed}", f"run.dir={folder}/run", "tracking.mlflow=false", *ARMS[name][1:], *options.overrides],
        )
        prompts: list[str] = []

        @contextmanager
        def opened(config, tracker):
            with open_ports(config, tracker) as opened_ports:
                # The local ones, which hold their worker.
                ports: Any = opened_ports
                meter = Meter([ports.rollout.worker.family.network, ports.learner.worker.family.network])

                def evaluate(version: int) -> None:
                    with meter.paused():
                        groups = fixed_groups(config, prompts, options.samples, stream="evaluation")
                        names = [entry.name for entry in (*config.rewards.train, *config.rewards.judges)]
                        report = evaluate_toy_arm(ports.rollout, ports.reward, ports.learner, groups, names)
                        images = report.images.float() / 255
                        if not base:
                            base.append(images)
                        row = {
                            "arm": name, "seed": seed, "iteration": version, "cpu_seconds": round(meter.seconds, 2),
                            "calls": meter.calls, "reward": report.scores[names[0]],
                            "judge": report.scores["strided_judge"],
                            **report.oracle, "drift": report.drift, "kept": kept_scenes(images, base[0]),
                        }  # fmt: skip
                    if options.images:
                        save_grid(
                            report.images[:32], options.images / f"{name}-{seed}-{version}.png", columns=8, scale=2
                        )
                    rows.append(row)
                    sys.stdout.write(json.dumps(row) + "\n")
                    sys.stdout.flush()

                yield replace(ports, weights=Watched(ports.weights, evaluate, options.every, config.run.iterations))

        from acpo_dist.data.prompts import load_prompts

        prompts.extend(load_prompts(config.data.prompts, config.data.prompt_column))
        drive(config, opened, Console(quiet=True))
    return rows


def make_table(lines: list[dict], goal: float) -> str:
    """Return Markdown: the last evaluation of every arm relative to the base model of the same seed, and the cost."""
    quality = [
        head("algorithm", "seeds", "judge / base", "oracle error / base", "gain in spreads", "drift", "scenes kept")
    ]
    rest = [head("algorithm", "entropy / base", "caption / base", "network calls", f"calls to {goal:g}")]
    for name, seeds in by_arm(lines).items():
        paths = [relative(evaluations) for evaluations in seeds.values()]
        ends = [path[-1] for path in paths]
        gain = f"{in_spreads(ends, 'judge')}, {in_spreads(ends, 'oracle_mse')}"
        judge, oracle, drift, kept = (cell(ends, key) for key in ("judge", "oracle_mse", "drift", "kept"))
        quality.append(row(name, len(seeds), judge, oracle, gain, drift, kept))
        costs = [next((point for point in path if point["oracle_mse"] <= goal), None) for path in paths]
        reached = [cost for cost in costs if cost is not None]
        first = thousands(reached) if len(reached) == len(costs) else f"reached by {len(reached)} of {len(costs)}"
        rest.append(row(name, *(cell(ends, key) for key in ("template_entropy", "caption_accuracy", "calls")), first))
    return "\n".join([*quality, "", *rest]) + "\n"


def cell(points: list[dict[str, float]], key: str) -> str:
    """Format one metric of the points, which older evaluations may lack."""
    if not points or not all(key in point for point in points):
        return "-"
    return thousands(points) if key == "calls" else spread([point[key] for point in points])


def thousands(points: list[dict[str, float]]) -> str:
    """Format the mean number of network calls in thousands."""
    return f"{statistics.fmean(point['calls'] for point in points) / 1000:.0f} k"


def compare_at(lines: list[dict], key: str, value: str) -> str:
    """Return Markdown: metrics relative to the base model where `key` first reaches `value`, interpolated."""
    other = "calls" if key == "drift" else "drift"
    keys = ("judge", "oracle_mse", "caption_accuracy", "kept", other)
    rows = [
        head("algorithm", "seeds", "judge / base", "oracle error / base", "caption / base", "scenes kept", OTHER[other])
    ]
    for name, seeds in by_arm(lines).items():
        found = []
        for evaluations in seeds.values():
            for before, after in pairwise(relative(evaluations)):
                if before[key] < float(value) <= after[key]:
                    share = (float(value) - before[key]) / (after[key] - before[key])
                    found.append(
                        {k: before[k] + share * (after[k] - before[k]) for k in keys if k in before and k in after}
                    )
                    break
        rows.append(row(name, f"{len(found)} of {len(seeds)}", *(cell(found, k) for k in keys)))
    return "\n".join(rows) + "\n"


def relative(evaluations: list[dict]) -> list[dict[str, float]]:
    """Return the evaluations of one run as ratios to the first, the base model's; cost and drift as differences.

    Calibration is the same for all arms, and is left out of the cost.
    """
    base = evaluations[0]
    return [
        # Older evaluations have no `kept`.
        {key: point[key] / base[key] for key in RATIOS if key in point and key in base}
        | {key: point[key] - base[key] for key in DIFFERENCES}
        for point in evaluations
    ]


def head(*cells: str) -> str:
    """Return the two lines that start a Markdown table."""
    return f"{row(*cells)}\n{'|---' * len(cells)}|"


def row(*cells: object) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def draw(lines: list[dict], path: Path) -> None:
    """Draw oracle error and judge, relative to the base model, against network calls and drift; mean over seeds."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 9), sharey="row", constrained_layout=True)
    for index, (name, seeds) in enumerate(by_arm(lines).items()):
        # Only iterations at which all seeds were evaluated.
        shared = set.intersection(*({point["iteration"] for point in path} for path in seeds.values()))
        paths = [relative([point for point in path if point["iteration"] in shared]) for path in seeds.values()]
        keys = ("oracle_mse", "judge", *OTHER)
        rounds = list(zip(*paths, strict=True))
        mean = {key: [statistics.fmean(point[key] for point in points) for points in rounds] for key in keys}
        for axis, (metric, cost) in zip(axes.flat, product(("oracle_mse", "judge"), OTHER), strict=True):
            color = plt.get_cmap("tab20")(index % 20)
            axis.plot(mean[cost], mean[metric], marker="osv^D"[index % 5], ms=4, color=color, label=name)
    for axis, (metric, cost) in zip(axes.flat, product(("oracle error", "judge"), OTHER), strict=True):
        axis.set(xlabel=OTHER[cost], ylabel=f"{metric} / base")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=90)


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
