"""Compare VRG with its initial trajectories and with the published procedure.

    .venv/bin/python benchmarks/vrg.py            # both
    .venv/bin/python benchmarks/vrg.py time [--table FILE --trajectory FILE]
    .venv/bin/python benchmarks/vrg.py quality [--model toy-sdxl] [--model FOLDER] [--steps 5 8 10] [--seeds 0 1 2] \
        [--images FOLDER]

`time`: J and CPU seconds of `paper_box` and of a gradient descent written from the publication's description (tanh box,
momentum 0.9, 3,000 steps, no network round it), on the same table and objective, side by side.
`quality`: samples of every spacing and of the trajectory that VRG makes of it, from the same noise, at equal network
calls: mean squared distance to a long reference, and KID of low-pass images against fresh samples of that reference.
VRG is gated as in training, on samples of its own. One JSON line per cell, then a table; a ratio below 1 favours VRG.
`--images` writes one grid per model, seed and number of steps: the reference, and each spacing without and with VRG.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acpo_dist.data.prompts import load_prompts
from acpo_dist.diffusion.trajectory import Trajectory, spaced_trajectory
from acpo_dist.tracking.images import save_grid
from acpo_dist.training.open_model import open_rollouts, source_config
from acpo_dist.training.trajectory.artefact import LINEAR_DDPM, read_schedule, read_table
from acpo_dist.training.trajectory.measure import measure, single_samples
from acpo_dist.training.trajectory.validate import consider, set_trajectory
from acpo_dist.vrg.levels import to_alpha_bars, to_sigmas
from acpo_dist.vrg.optimize import optimize
from acpo_dist.vrg.timesteps import to_timesteps

SHOWN = 12
"""Samples of one row of an image grid."""
SHARED = Path(__file__).resolve().parents[2] / "shared/data/vrg"
AYS_SDXL = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13)
"""Published timesteps of Align Your Steps for SDXL (Sabour et al. 2024); log-linear between them for other lengths."""


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    timing = kinds.add_parser("time")
    timing.add_argument("--table", type=Path, default=SHARED / "cifar10_error_table.txt")
    timing.add_argument("--trajectory", type=Path, action="append", default=None)
    timing.add_argument("--epochs", type=int, default=3000)
    quality = kinds.add_parser("quality")
    quality.add_argument("--model", action="append", default=None)
    quality.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 15, 20])
    quality.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    quality.add_argument("--samples", type=int, default=64)
    quality.add_argument("--images", type=Path, default=None)
    arguments = sys.argv[1:]
    for line in [arguments] if arguments else [["time"], ["quality"]]:
        run(parser.parse_args(line))


def run(options: argparse.Namespace) -> None:
    """Run one of the two comparisons."""
    if options.kind == "time":
        for path in options.trajectory or sorted(SHARED.glob("trajectory_*.txt")):
            compare_optimisers(options.table, path, options.epochs)
        return
    rows = [
        row
        for model in options.model or ["toy-sdxl", "toy-ddpm"]
        for seed in options.seeds
        for row in compare_spacings(model, seed, options)
    ]
    summarise(rows)


def compare_optimisers(table_path: Path, trajectory_path: Path, epochs: int) -> None:
    """Return one row: ours and momentum descent, with the same start, table, box and objective."""
    table = read_table(table_path)
    start = to_sigmas(read_schedule(trajectory_path, LINEAR_DDPM).alpha_bars[:-1])
    ours = optimize(start, table, mode="paper_box", lp=0.01, reg_lambda=100)
    trusted = optimize(start, table)
    began = time.process_time()
    theirs = descend(start, table.with_interpolation("linear_alpha_bar"), epochs)
    seconds = time.process_time() - began
    say(
        {
            "trajectory": trajectory_path.stem, "j0": ours.j0, "paper_box": ours.j1, "descent": theirs,
            "cpu_seconds": ours.cpu_seconds, "descent_cpu_seconds": seconds,
            "times_faster": seconds / ours.cpu_seconds, "log_trust_gain": trusted.gain,
        }
    )  # fmt: skip


def descend(sigmas: np.ndarray, table, epochs: int) -> float:
    """The publication's parameters and loss under plain momentum descent; returns J of the best loss."""
    ab0 = torch.from_numpy(to_alpha_bars(sigmas)[::-1].copy())
    alpha0 = torch.cat([ab0[:1], ab0[1:] / ab0[:-1]])
    width = torch.minimum(torch.minimum(torch.full_like(alpha0, 0.01), 1 - alpha0), alpha0)
    nodes = torch.from_numpy(table.alpha_bars[::-1].copy())
    values = torch.from_numpy(table.v[::-1].copy())
    free = torch.zeros_like(alpha0, requires_grad=True)
    optimiser = torch.optim.SGD([free], lr=0.5, momentum=0.9)
    best, best_j = float("inf"), float("inf")
    for _ in range(epochs):
        ab = torch.cumprod(alpha0 + width * torch.tanh(free), 0)
        s = (1 / ab - 1).sqrt()
        at = torch.searchsorted(nodes, ab.detach()).clamp(1, len(nodes) - 1)
        share = (ab - nodes[at - 1]) / (nodes[at] - nodes[at - 1])
        v = values[at - 1] + share * (values[at] - values[at - 1])
        j = ((s - torch.cat([torch.zeros(1), s[:-1]])) ** 2 * v).sum()
        loss = j + 100 * (ab[-1] - ab0[-1]) ** 2
        if loss.item() < best:
            best, best_j = loss.item(), j.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return best_j


def compare_spacings(model: str, seed: int, options: argparse.Namespace):
    """Return one row per spacing and number of steps."""
    config, run = source_config(
        model, [f"run.seed={seed}", "rollout.batch_size=64", "vrg.search=vrg", *guidance(model)]
    )
    pool: Any = Remembered(open_rollouts(config, run))
    prompts = load_prompts(config.data.prompts, config.data.prompt_column)
    alpha_bars = pool.alpha_bars().numpy()
    sums = measure(pool, config, prompts, alpha_bars, images=config.vrg.images, label="bench")
    groups = single_samples(config, prompts, options.samples, "bench_cells", 0)
    fresh = single_samples(config, prompts, options.samples, "bench_fresh", 0)
    long = spaced_trajectory(pool.alpha_bars(), 200, "trailing")
    reference, others = pool.final_latents(groups, long), pool.final_latents(fresh, long)
    for count in options.steps:
        drawn = {"reference": reference}
        named = spacings(alpha_bars, count) if alpha_bars[-1] > 0 else flow_spacings(pool, count)
        for name, base in named.items():
            set_trajectory(pool, base)
            gate_config = config.model_copy(update={"sampler": config.sampler.model_copy(update={"num_steps": count})})
            update = consider(pool, gate_config, prompts, sums, base, alpha_bars, provenance={})
            row = {"model": Path(model).name, "seed": seed, "steps": count, "spacing": name, "adopted": update.adopted}
            row |= {"gain_j": 1 - update.j1 / update.j0, "trust": update.gate.trust if update.gate else 0.0}
            row |= {"clipped_steps": update.gate.clipped_steps if update.gate else None}
            for label, trajectory in (("start", base), ("vrg", update.trajectory)):
                ends = drawn[f"{name} {label}"] = pool.final_latents(groups, trajectory)
                row[f"mse_{label}"] = float((ends - reference).double().square().mean())
                row[f"kid_{label}"] = kid_of(ends, others)
            say(row)
            yield row
        if options.images:
            with torch.no_grad():
                shown = torch.cat([pool.worker.family.decode(ends[:SHOWN]) for ends in drawn.values()]).clamp(0, 1)
            path = options.images / f"{Path(model).name}-{seed}-{count}.png"
            columns = min(SHOWN, options.samples)
            save_grid((shown * 255).round().to(torch.uint8), path, columns=columns, scale=2, labels=list(drawn))


class Remembered:
    """A rollout pool that draws the same samples along the same trajectory once; the model does not change here."""

    def __init__(self, pool) -> None:
        """Wrap a pool."""
        self._pool, self._drawn = pool, {}

    def __getattr__(self, name: str):
        """Return everything else from the pool."""
        return getattr(self._pool, name)

    def final_latents(self, groups, trajectory: Trajectory) -> Tensor:
        """As `RolloutPool.final_latents`."""
        key = trajectory.schedule_id, str(groups)
        if key not in self._drawn:
            self._drawn[key] = self._pool.final_latents(groups, trajectory)
        return self._drawn[key]


def guidance(model: str) -> list[str]:
    """Return the override of the toy's guidance scale; none for an unconditional model."""
    return ["sampler.guidance_scale=1.5"] if model in ("toy-sdxl", "toy-flow") else []


def flow_spacings(pool, count: int) -> dict[str, Trajectory]:
    """Return initial trajectories of a flow model: even sigmas, and the shift of its scheduler."""
    schedule = pool.worker.family.schedule
    return {
        name: schedule.trajectory(count, "trailing", shift) for name, shift in (("uniform", 1.0), ("shifted", None))
    }


def spacings(alpha_bars: np.ndarray, count: int) -> dict[str, Trajectory]:
    """Return named initial trajectories, all from the last timestep."""
    total, sigmas = len(alpha_bars), to_sigmas(alpha_bars)
    low, high = sigmas[0], sigmas[-1]
    ramp = np.linspace(0, 1, count)
    ays = np.exp(np.interp(ramp, np.linspace(0, 1, len(AYS_SDXL)), np.log(sigmas[list(AYS_SDXL)])))
    ays[0] = high
    uniform = sigmas[[round(total - index * total / count) - 1 for index in range(count)]]
    # Quadratic in time ends where uniform does, so that the last step is of the same kind.
    quadratic = np.interp(((1 - ramp) * 0.97 + 0.03) ** 2 * (total - 1), np.arange(total), sigmas)
    return {
        "uniform": at(uniform, alpha_bars),
        "quadratic": at(quadratic, alpha_bars),
        "logSNR": at(np.exp(np.log(high) * (1 - ramp) + np.log(low) * ramp), alpha_bars),
        "karras": at((high ** (1 / 7) * (1 - ramp) + low ** (1 / 7) * ramp) ** 7, alpha_bars),
        "ays_like": at(ays, alpha_bars),
    }


def at(sigmas: np.ndarray, alpha_bars: np.ndarray) -> Trajectory:
    """Return a trajectory through decreasing sigmas to a clean end."""
    inside = np.clip(sigmas, *to_sigmas(alpha_bars[[0, -1]]))
    levels = to_alpha_bars(inside)
    levels[0] = alpha_bars[-1]
    return Trajectory(
        timesteps=tuple(map(float, to_timesteps(inside, alpha_bars))), alpha_bars=(*map(float, levels), 1.0)
    )


def kid_of(ends: Tensor, others: Tensor) -> float:
    """Unbiased squared MMD with KID's cubic kernel, on 4x4 means of the samples, which ignore fine noise."""
    x, y = (torch.nn.functional.adaptive_avg_pool2d(part.double(), 4).flatten(1).numpy() for part in (ends, others))
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    n, m = len(x), len(y)
    return float((xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean())


def summarise(rows: list[dict]) -> None:
    """Print a table of VRG relative to its start, with all seeds, and the number of better, equal and worse cells."""
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["steps"], row["spacing"]), []).append(row)
    counts = {"better": 0, "kept": 0, "worse": 0}
    for (model, steps, spacing), found in cells.items():
        ratios = [row["mse_vrg"] / row["mse_start"] for row in found]
        mean, spread = fmean(ratios), stdev(ratios) if len(ratios) > 1 else 0.0
        verdict = "kept" if not any(row["adopted"] for row in found) else "better" if mean < 1 else "worse"
        counts[verdict] += 1
        kid = fmean(row["kid_vrg"] for row in found) - fmean(row["kid_start"] for row in found)
        start = fmean(row["mse_start"] for row in found)
        print_line(
            f"| {model} | {steps} | {spacing} | {start:.3g} | {mean:.3f} ± {spread:.3f} | {kid:+.4f} | {verdict} |"
        )
    say({"cells": len(cells), **counts})


def say(row: dict) -> None:
    """One JSON line."""
    print_line(json.dumps(row))


def print_line(text: str) -> None:
    """Flushed, so that a pipe shows progress."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
