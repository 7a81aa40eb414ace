"""Compare VRG with other searched and fixed sampling trajectories at equal network calls.

    .venv/bin/python benchmarks/schedulers.py --out runs/schedulers [--steps 4 5 8 10 20] [--seeds 0 1 2]

Uniform, quadratic, logSNR, Karras, Align Your Steps' published SDXL timesteps (`ays_like`), GITS, Optimal Stepsize
(OSS), HSO (grid), and what `acpo vrg` adopts in place of uniform: VRG, and HSO (grid) behind the same validation (on 16
samples). All start at the last timestep with the same noise and use DDIM. Measured: mean squared distance of x_0 to a
reference of `--reference` steps, on samples that no search has seen, and the network evaluations of the search for all
`--steps` together (a guided call counts twice).
Results go to cells.jsonl (a study that is started again continues), then to schedulers.json, .md and .png.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import argparse
import json
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch
from _cells import Cells
from _searches import gits, karras_grid, optimal_steps, teacher
from torch import Tensor
from vrg import at, guidance, spacings

from acpo_dist.data.prompts import load_prompts
from acpo_dist.diffusion.prediction import to_noise
from acpo_dist.diffusion.sampling import guide
from acpo_dist.diffusion.trajectory import Trajectory, spaced_trajectory
from acpo_dist.training.open_model import open_rollouts, source_config
from acpo_dist.training.trajectory.measure import measure, single_samples
from acpo_dist.training.trajectory.validate import consider, set_trajectory
from acpo_dist.vrg.hso_grid import search_hso_grid
from acpo_dist.vrg.levels import to_alpha_bars, to_sigmas
from acpo_dist.vrg.timesteps import to_timesteps

SEARCHED = ("GITS", "OSS", "HSO (grid)", "HSO (grid), validated", "VRG")
VRG = ("vrg.gate_samples=16", "vrg.images=128")


def main() -> None:
    """Measure every missing cell, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="toy-sdxl")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 5, 8, 10, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--reference", type=int, default=120)
    parser.add_argument("--grid", type=int, default=32, help="nodes of the searches' fine grid")
    parser.add_argument("--search-samples", type=int, default=16, help="samples of GITS; a quarter for OSS")
    options = parser.parse_args()
    cells = Cells(options.out / "cells.jsonl")
    for seed in options.seeds:
        cells.get(f"seed/{seed}", lambda seed=seed: Study(options, seed).measure())
    report(cells.of("seed"), options)


class Study:
    """One model with the samples of one seed."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        """Open the model and count its network evaluations."""
        overrides = [f"run.seed={seed}", "rollout.batch_size=64", "sampler.t_max=1", *VRG, *guidance(options.model)]
        self._config, run = source_config(options.model, overrides)
        self._options, self._seed = options, seed
        self._pool = open_rollouts(self._config, run)
        self._prompts = load_prompts(self._config.data.prompts, self._config.data.prompt_column)
        self._levels = self._pool.alpha_bars().numpy()
        self._family: Any = self._pool.worker.family
        self._encoded: dict[tuple[str, ...], Any] = {}
        self.evaluations = 0
        predict = self._family.predict

        def counted(state: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
            self.evaluations += len(state)
            return predict(state, timesteps, condition)

        self._family.predict = counted

    @torch.no_grad()
    def measure(self) -> list[dict[str, Any]]:
        """Return one row per method and number of steps."""
        options = self._options
        groups = single_samples(self._config, self._prompts, options.samples, "bench_cells", 0)
        reference: Any = self._pool.final_latents(groups, self._fine(options.reference))
        rows = []
        for method, (trajectories, cost) in self._all().items():
            for count, trajectory in trajectories.items():
                ends: Any = self._pool.final_latents(groups, trajectory)
                errors = (ends - reference).double().square().flatten(1).mean(1)
                rows.append({
                    "method": method, "steps": count, "mse": float(errors.mean()), "median": float(errors.median()),
                    "evaluations": cost, "sigmas": to_sigmas(trajectory.alpha_bars[:-1]).round(5).tolist(),
                })  # fmt: skip
        return rows

    def _all(self) -> dict[str, tuple[dict[int, Trajectory], int]]:
        steps, found = self._options.steps, {}
        for count in steps:
            for name, trajectory in spacings(self._levels, count).items():
                found.setdefault(name, ({}, 0))[0][count] = trajectory
        sigmas = to_sigmas(self._levels)
        grid = karras_grid(float(sigmas[0]), float(sigmas[-1]), self._options.grid)
        plans = self._plans("search", self._options.search_samples)
        prompts, noise = [plan.prompt for plan in plans], self._noise(plans)
        few = max(2, len(plans) // 4)

        def searched(name: str, search: Any) -> None:
            before = self.evaluations
            nodes = search()
            found[name] = ({k: at(s, self._levels) for k, s in nodes.items()}, self.evaluations - before)

        searched("GITS", lambda: gits(self._eps(prompts), noise, grid, steps))
        searched("OSS", lambda: optimal_steps(
            lambda image: self._eps([prompts[image]]), noise[:few],
            teacher(self._eps(prompts[:few]), noise[:few], grid)[0], grid, steps,
        ))  # fmt: skip
        searched("HSO (grid)", lambda: {k: search_hso_grid(float(sigmas[-1]), k, self._levels) for k in steps})
        before = self.evaluations
        sums = measure(
            self._pool, self._config, self._prompts, self._levels, images=self._config.vrg.images, label="bench"
        )
        measured = self.evaluations - before
        # HSO needs no measurement; `acpo vrg` makes it all the same, for its report.
        for name, search, cost in (("VRG", "vrg", measured), ("HSO (grid), validated", "hso_grid", 0)):
            before = self.evaluations
            nodes = {count: self._proven(found["uniform"][0][count], sums, count, search) for count in steps}
            found[name] = (nodes, cost + self.evaluations - before)
        return found

    def _proven(self, start: Trajectory, sums: Any, count: int, search: str) -> Trajectory:
        """Return what `acpo vrg` adopts in place of a trajectory with this search."""
        set_trajectory(self._pool, start)
        sampler = self._config.sampler.model_copy(update={"num_steps": count})
        vrg = self._config.vrg.model_copy(update={"search": search})
        config = self._config.model_copy(update={"sampler": sampler, "vrg": vrg})
        return consider(self._pool, config, self._prompts, sums, start, self._levels, provenance={}).trajectory

    def _plans(self, stream: str, count: int) -> list[Any]:
        return [group.samples[0] for group in single_samples(self._config, self._prompts, count, stream, 0)]

    def _noise(self, plans: list[Any]) -> Tensor:
        shape = self._family.shape_of(plans[0].size)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(plan.seed)) for plan in plans])

    def _fine(self, count: int) -> Trajectory:
        return spaced_trajectory(self._pool.alpha_bars(), count, "trailing")

    def _eps(self, prompts: list[str]) -> Any:
        """Return the guided noise prediction at z = x / sqrt(alpha_bar) for any sigma."""
        family, scale = self._family, self._config.sampler.guidance_for(conditional=self._family.conditional)

        def eps(z: Tensor, sigma: Tensor) -> Tensor:
            texts = prompts * (len(z) // len(prompts))
            alpha_bars = torch.from_numpy(to_alpha_bars(sigma.double().numpy()))
            state = (z.double() * alpha_bars.sqrt()[:, None, None, None]).float()
            inside = np.clip(sigma.double().numpy(), *to_sigmas(self._levels[[0, -1]]))
            timesteps = torch.from_numpy(to_timesteps(inside, self._levels)).float()
            if scale == 1:
                output = family.predict(state, timesteps, self._condition(tuple(texts)))
            else:
                joined = self._condition(("",) * len(texts) + tuple(texts))
                both = family.predict(torch.cat([state, state]), torch.cat([timesteps, timesteps]), joined)
                unconditional, conditional = both.chunk(2)
                output = guide(conditional, unconditional, scale)
            return to_noise(output, state, alpha_bars, family.prediction_type).float()

        return eps

    def _condition(self, texts: tuple[str, ...]) -> Any:
        if texts not in self._encoded:
            self._encoded[texts] = self._family.encode(texts)
        return self._encoded[texts]


def report(seeds: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the table, the JSON and the chart."""
    from matplotlib import pyplot as plt

    cells: dict[tuple[str, int], list[dict]] = {}
    for rows in seeds.values():
        base = {row["steps"]: row["mse"] for row in rows if row["method"] == "uniform"}
        for row in rows:
            cells.setdefault((row["method"], row["steps"]), []).append(
                {**row, "ratio": row["mse"] / base[row["steps"]]}
            )
    methods, steps = list(dict.fromkeys(method for method, _ in cells)), options.steps
    head = " | ".join(map(str, steps))
    lines = [f"| method | {head} | evaluations of the search |", "|---" * (len(steps) + 2) + "|"]
    figure, axis = plt.subplots(figsize=(8, 5.5), constrained_layout=True)
    summary = {}
    for method in methods:
        found = [cells[method, count] for count in steps]
        ratios = [[row["ratio"] for row in rows] for rows in found]
        shown = [f"{fmean(r):.2f} ± {stdev(r) if len(r) > 1 else 0:.2f}" for r in ratios]
        cost = fmean(row["evaluations"] for row in found[0])
        lines.append(f"| {method} | {' | '.join(shown)} | {cost:,.0f} |")
        means = [fmean(row["mse"] for row in rows) for rows in found]
        axis.plot(steps, means, marker="o", ls="-" if method in SEARCHED else ":", label=method)
        summary[method] = {
            "mse": means, "ratio": ratios, "evaluations": cost,
            "median_ratio": [median(r) for r in ratios], "median_error": [fmean(r["median"] for r in f) for f in found],
        }  # fmt: skip
    uniform = " | ".join(f"{value:.4f}" for value in summary["uniform"]["mse"])
    lines.insert(2, f"| uniform, squared distance | {uniform} | |")
    axis.set(yscale="log", xlabel="network calls", ylabel="squared distance to the reference", xticks=steps)
    axis.legend(fontsize=8)
    figure.savefig(options.out / "schedulers.png", dpi=110)
    (options.out / "schedulers.md").write_text("\n".join(lines) + "\n")
    data = {"model": options.model, "seeds": sorted(seeds), "samples": options.samples, "steps": steps}
    (options.out / "schedulers.json").write_text(json.dumps({**data, "methods": summary}, indent=1) + "\n")


if __name__ == "__main__":
    main()
