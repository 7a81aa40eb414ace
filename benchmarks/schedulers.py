"""Compare VRG with other searched and fixed sampling trajectories at equal network calls.

    .venv/bin/python benchmarks/schedulers.py --out runs/schedulers [--model toy-sdxl] [--steps 4 5 8 10 20] \
        [--features efficientnet-lite0:FILE] [--seeds 0 1 2]

Uniform, quadratic, logSNR, Karras, Align Your Steps' published SDXL timesteps (`ays_like`), GITS, Optimal Stepsize
(OSS), HSO (grid), and what `acpo vrg` adopts in place of uniform: VRG, HSO (grid) behind the same validation (on 16
samples), and the better one of both. Of a flow model, which starts at pure noise: uniform, its scheduler's shift, GITS,
OSS and VRG. All start at the last timestep with the same noise and use DDIM. Measured: mean squared distance of x_0 to
a reference of `--reference` steps, on samples that no search has seen; with `--features`, Frechet distance (covariances
shrunk by 0.1) and KID to samples of the reference trajectory from other noise; and the network evaluations of the
search for all `--steps` together (a guided call counts twice).
Results go to cells.jsonl (a study that is started again continues), then to schedulers.json, .md and .png, and a grid
of images per seed and number of steps to images/.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from _cells import Cells
from _searches import gits, karras_grid, optimal_steps, teacher
from torch import Tensor
from vrg import at, flow_spacings, guidance, spacings

from acpo_dist.data.prompts import load_prompts
from acpo_dist.diffusion.flow import flow_sigma, flow_trajectory
from acpo_dist.diffusion.prediction import flow_scale, to_noise
from acpo_dist.diffusion.sampling import guide
from acpo_dist.diffusion.trajectory import Trajectory, spaced_trajectory
from acpo_dist.evaluation.metrics.distances import frechet_distance, kid
from acpo_dist.evaluation.suites.set_metrics import open_extractor
from acpo_dist.tracking.images import save_grid
from acpo_dist.training.open_model import open_rollouts, source_config
from acpo_dist.training.trajectory.measure import measure, single_samples
from acpo_dist.training.trajectory.validate import consider, set_trajectory
from acpo_dist.vrg.hso_grid import search_hso_grid
from acpo_dist.vrg.levels import to_alpha_bars, to_sigmas
from acpo_dist.vrg.timesteps import to_timesteps

PROVEN = {"VRG": "vrg", "HSO (grid), validated": "hso_grid", "better of both": "best"}
"""Arms of `acpo vrg`, by name, with `vrg.search`."""
SEARCHED = ("GITS", "OSS", "HSO (grid)", *PROVEN)
VRG = ("vrg.gate_samples=16", "vrg.images=128")
DISTANCES = {
    "mse": "squared distance to the reference", "frechet": "Frechet distance to reference samples", "kid": "KID",
}  # fmt: skip
SHOWN = 12


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
    parser.add_argument("--features", default=None, help="extractor of `acpo eval --features`")
    parser.add_argument(
        "--searches", nargs="+", default=SEARCHED, choices=SEARCHED, help="beside the fixed trajectories"
    )
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
        self._flow = self._family.prediction_type == "flow_prediction"
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
        options, seed = self._options, self._seed
        groups = single_samples(self._config, self._prompts, options.samples, "bench_cells", 0)
        reference: Any = self._pool.final_latents(groups, self._fine(options.reference))
        distances = self._distances()
        rows = []
        shown: dict[int, dict[str, Tensor]] = {count: {"reference": reference[:SHOWN]} for count in options.steps}
        for method, (trajectories, cost) in self._all().items():
            for count, trajectory in trajectories.items():
                ends: Any = self._pool.final_latents(groups, trajectory)
                errors = (ends - reference).double().square().flatten(1).mean(1)
                shown[count][method] = ends[:SHOWN]
                rows.append({
                    "method": method, "steps": count, "mse": float(errors.mean()), "median": float(errors.median()),
                    **distances(ends), "evaluations": cost, "alpha_bars": list(trajectory.alpha_bars),
                })  # fmt: skip
        for count, images in shown.items():
            pixels = torch.cat([self._decode(ends) for ends in images.values()])
            path, columns = options.out / "images" / f"{seed}-{count}.png", min(SHOWN, options.samples)
            save_grid((pixels * 255).round().to(torch.uint8), path, columns=columns, scale=2, labels=list(images))
        return rows

    def _distances(self) -> Any:
        """Return a function from x_0 to its distances to the reference trajectory's samples from other noise."""
        if not self._options.features:
            return lambda ends: {}
        extract = open_extractor(self._options.features)

        def features(ends: Tensor) -> Tensor:
            return extract((self._decode(ends) * 255).round().to(torch.uint8)).values

        groups = single_samples(self._config, self._prompts, self._options.samples, "bench_fresh", 0)
        other = features(self._pool.final_latents(groups, self._fine(self._options.reference)))

        def distances(ends: Tensor) -> dict[str, float]:
            own = features(ends)
            return {
                "frechet": frechet_distance(own, other, shrinkage=0.1).value,
                "kid": kid(own, other, subset_size=len(own)).mean,
            }

        return distances

    def _decode(self, ends: Tensor) -> Tensor:
        return torch.cat([self._family.decode(part) for part in ends.split(64)]).clamp(0, 1)

    def _all(self) -> dict[str, tuple[dict[int, Trajectory], int]]:
        steps, found = self._options.steps, {}
        for count in steps:
            named = flow_spacings(self._pool, count) if self._flow else spacings(self._levels, count)
            for name, trajectory in named.items():
                found.setdefault(name, ({}, 0))[0][count] = trajectory
        plans = self._plans("search", self._options.search_samples)
        prompts, start = [plan.prompt for plan in plans], self._noise(plans)
        few = max(2, len(plans) // 4)
        if self._flow:
            # The network's velocity is the slope of x in sigma, which starts at 1.
            fine = self._family.schedule.trajectory(self._options.grid, "trailing", None)
            grid = np.array([flow_sigma(level) for level in fine.alpha_bars[:-1]])
        else:
            sigmas = to_sigmas(self._levels)
            grid = karras_grid(float(sigmas[0]), float(sigmas[-1]), self._options.grid)
            start = start * float(np.sqrt(1 + grid[0] ** 2))

        wanted = self._options.searches

        def searched(name: str, search: Any) -> None:
            if name not in wanted:
                return
            before = self.evaluations
            nodes = search()
            found[name] = ({k: self._through(s) for k, s in nodes.items()}, self.evaluations - before)

        searched("GITS", lambda: gits(self._slope(prompts), start, grid, steps))
        searched("OSS", lambda: optimal_steps(
            lambda image: self._slope([prompts[image]]),
            teacher(self._slope(prompts[:few]), start[:few], grid)[0], grid, steps,
        ))  # fmt: skip
        if not self._flow:
            last = float(to_sigmas(self._levels)[-1])
            searched("HSO (grid)", lambda: {k: search_hso_grid(last, k, self._levels) for k in steps})
        before = self.evaluations
        sums = measure(
            self._pool, self._config, self._prompts, self._levels, images=self._config.vrg.images, label="bench"
        )
        measured = self.evaluations - before
        # HSO needs no measurement; `acpo vrg` makes it all the same, for its report.
        proven = {name: search for name, search in PROVEN.items() if name in wanted}
        for name, search in list(proven.items())[:1] if self._flow else proven.items():
            before = self.evaluations
            nodes = {count: self._proven(found["uniform"][0][count], sums, count, search) for count in steps}
            found[name] = (nodes, self.evaluations - before + (0 if search == "hso_grid" else measured))
        return found

    def _through(self, sigmas: np.ndarray) -> Trajectory:
        if self._flow:
            return flow_trajectory([*map(float, sigmas), 0.0], len(self._levels))
        return at(sigmas, self._levels)

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
        if self._flow:
            return flow_spacings(self._pool, count)["uniform"]
        return spaced_trajectory(self._pool.alpha_bars(), count, "trailing")

    def _slope(self, prompts: list[str]) -> Any:
        """Return the slope of the sampler's state in sigma, with guidance and the scheduler's x_0 rule.

        The state is z = x / sqrt(alpha_bar) with the predicted noise as its slope, or the flow's own state with the
        velocity.
        """
        family, scale = self._family, self._config.sampler.guidance_for(conditional=self._family.conditional)

        def slope(z: Tensor, sigma: Tensor) -> Tensor:
            texts = prompts * (len(z) // len(prompts))
            if self._flow:
                nodes = [flow_trajectory([float(value), 0.0], len(self._levels)) for value in sigma]
                alpha_bars = torch.tensor([node.alpha_bars[0] for node in nodes], dtype=torch.float64)
                timesteps = torch.tensor([node.timesteps[0] for node in nodes])
                state = z / flow_scale(alpha_bars, z)
            else:
                alpha_bars = torch.from_numpy(to_alpha_bars(sigma.double().numpy()))
                inside = np.clip(sigma.double().numpy(), *to_sigmas(self._levels[[0, -1]]))
                timesteps = torch.from_numpy(to_timesteps(inside, self._levels)).float()
                state = (z.double() * alpha_bars.sqrt()[:, None, None, None]).float()
            if scale == 1:
                output = family.predict(state, timesteps, self._condition(tuple(texts)))
            else:
                joined = self._condition(("",) * len(texts) + tuple(texts))
                both = family.predict(torch.cat([state, state]), torch.cat([timesteps, timesteps]), joined)
                unconditional, conditional = both.chunk(2)
                output = guide(conditional, unconditional, scale)
            output = family.clean_rule.apply(output, state, alpha_bars, family.prediction_type)
            return output if self._flow else to_noise(output, state, alpha_bars, family.prediction_type).float()

        return slope

    def _condition(self, texts: tuple[str, ...]) -> Any:
        if texts not in self._encoded:
            self._encoded[texts] = self._family.encode(texts)
        return self._encoded[texts]


def report(seeds: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the tables, the JSON and the chart."""
    from matplotlib import pyplot as plt

    steps = options.steps
    cells: dict[tuple[str, int], list[dict]] = {}
    for rows in seeds.values():
        base = {row["steps"]: row["mse"] for row in rows if row["method"] == "uniform"}
        for row in rows:
            cells.setdefault((row["method"], row["steps"]), []).append(
                {**row, "ratio": row["mse"] / base[row["steps"]]}
            )
    methods = list(dict.fromkeys(method for method, _ in cells))
    measured = [key for key in DISTANCES if key in cells[methods[0], steps[0]][0]]
    head = " | ".join(map(str, steps))
    lines = [f"| method | {head} | evaluations of the search |", "|---" * (len(steps) + 2) + "|"]
    uniform = " | ".join(f"{fmean(row['mse'] for row in cells['uniform', count]):.4f}" for count in steps)
    lines.append(f"| uniform, squared distance | {uniform} | |")
    summary = {}
    for method in methods:
        found = [cells[method, count] for count in steps]
        cost = fmean(row["evaluations"] for row in found[0])
        lines.append(f"| {method} | {' | '.join(_spread(rows, 'ratio', 2) for rows in found)} | {cost:,.0f} |")
        keys = ("mse", "median", "ratio", "frechet", "kid")
        values = {key: [[row[key] for row in rows] for rows in found] for key in keys if key in found[0][0]}
        summary[method] = {**values, "evaluations": cost}
    for key in measured[1:]:
        lines += ["", f"| {DISTANCES[key]} | {head} |", "|---" * (len(steps) + 1) + "|"]
        digits = 1 if key == "frechet" else 4
        lines += [
            f"| {method} | {' | '.join(_spread(cells[method, count], key, digits) for count in steps)} |"
            for method in methods
        ]
    figure, axes = plt.subplots(
        1, len(measured), figsize=(1 + 6 * len(measured), 5.5), constrained_layout=True, squeeze=False
    )
    for key, axis in zip(measured, axes[0], strict=True):
        axis.set_prop_cycle(color=[*plt.get_cmap("tab10").colors, "black"])
        for method in methods:
            means = [fmean(values) for values in summary[method][key]]
            axis.plot(steps, means, marker="o", ls="-" if method in SEARCHED else ":", label=method)
        axis.set(xlabel="network calls", ylabel=DISTANCES[key], xticks=steps)
        if key == "mse":
            axis.set_yscale("log")
    axes[0][0].legend(fontsize=8)
    figure.savefig(options.out / "schedulers.png", dpi=100)
    (options.out / "schedulers.md").write_text("\n".join(lines) + "\n")
    data = {"model": options.model, "seeds": sorted(seeds), "samples": options.samples, "steps": steps}
    (options.out / "schedulers.json").write_text(json.dumps({**data, "methods": summary}, indent=1) + "\n")


def _spread(rows: list[dict], key: str, digits: int) -> str:
    values = [row[key] for row in rows]
    return f"{fmean(values):.{digits}f} ± {stdev(values) if len(values) > 1 else 0:.{digits}f}"


if __name__ == "__main__":
    main()
