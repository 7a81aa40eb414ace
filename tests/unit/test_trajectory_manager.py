"""The trajectory of a run: measured, validated before it is adopted, kept across a restart."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from acpo_dist.config.load import load_config
from acpo_dist.core.errors import ConfigError, VrgError, WeightSyncError
from acpo_dist.data.prompts import load_prompts
from acpo_dist.diffusion.trajectory import Trajectory
from acpo_dist.tracking.console import Console
from acpo_dist.training.local import LocalRollouts, open_ports
from acpo_dist.training.open_model import open_rollouts, source_config
from acpo_dist.training.run import drive
from acpo_dist.training.trajectory.artefact import LINEAR_DDPM, optimise_files, read_schedule, trajectory_to_mapping
from acpo_dist.training.trajectory.measure import measure, table_drift
from acpo_dist.training.trajectory.validate import Validation, consider, set_trajectory
from acpo_dist.vrg.levels import to_sigmas
from acpo_dist.vrg.timesteps import to_timesteps
from tests.conftest import TINY
from tests.helpers.runs import copy_run, results

QUIET = Console(quiet=True)
SMALL = [
    "sampler.num_steps=6",
    "vrg.enabled=true",
    "vrg.search=vrg",
    "vrg.images=32",
    "vrg.batch=16",
    "vrg.gate_samples=8",
    "vrg.nodes=10",
]
QUICK = ["vrg.images=16", "vrg.gate_samples=4", "vrg.nodes=8", "vrg.reference_steps=24", "vrg.halvings=0"]
"""For runs that must do the same twice, whatever the validation says."""
PROMPTS = load_prompts("toy", "prompt")


@pytest.fixture(scope="module")
def measured():
    """A toy pool of 6 steps, its configuration and its error sums."""
    config = load_config("toy_sdxl", [*TINY, *SMALL])
    pool = LocalRollouts(config, device="cpu")
    return config, pool, measure(pool, config, PROMPTS, pool.alpha_bars().numpy(), images=32, label="test")


def test_a_trajectory_that_helps_is_adopted_by_every_worker_and_on_every_sample(measured):
    config, pool, sums = measured
    base = pool.trajectory()
    update = consider(pool, config, PROMPTS, sums, base, pool.alpha_bars().numpy(), provenance={})
    assert update.adopted and update.gates[-1].ratio <= 1
    assert update.j1 < update.j0 and pool.trajectory() == update.trajectory != base
    # The noisy end is where the starting noise is, bit for bit; the clean end too.
    assert update.trajectory.alpha_bars[0] == base.alpha_bars[0] and update.trajectory.alpha_bars[-1] == 1
    from acpo_dist.training.trajectory.measure import single_samples

    (handle,) = pool.generate(single_samples(config, PROMPTS, 4, "test", 0))
    assert handle.schedule_id == update.trajectory.schedule_id
    set_trajectory(pool, base)


def globally_best(table, grid, num_steps):
    """Exact least J over a grid (falling), the first level fixed: dynamic programming, no trust region."""
    v, best, choice = table.value(grid), np.full(len(grid), np.inf), []
    best[0] = 0.0
    for _ in range(num_steps - 1):
        cost = best[:, None] + np.where(grid[:, None] > grid, (grid[:, None] - grid) ** 2 * v[:, None], np.inf)
        choice.append(cost.argmin(0))
        best = cost.min(0)
    at = int((best + grid**2 * v).argmin())
    path = [at]
    for step in reversed(choice):
        path.append(int(step[path[-1]]))
    return grid[path[::-1]]


def test_a_globally_optimal_but_bad_schedule_fails_the_proof():
    # The linear DDPM schedule starts at sigma 157, far above any data: there J is furthest from the truth. (From SDXL's
    # sigma of 15 the toy's global optimum is even good.)
    config, _ = source_config("toy-ddpm", [*SMALL, "sampler.num_steps=10", "rollout.batch_size=16"])
    pool = open_rollouts(config, None)
    sums = measure(pool, config, ("",), pool.alpha_bars().numpy(), images=32, label="test")
    base = pool.trajectory()
    # Without a trust region the least cumulative error saves its steps for the noisy end and jumps from there to clean.
    table, sigmas_T = sums.table({}), to_sigmas(pool.alpha_bars().numpy())
    grid = np.geomspace(sigmas_T[-1], sigmas_T[0], 120)
    levels = globally_best(table, grid, base.num_steps)
    spent = [
        sum(float((s - t) ** 2 * table.value(s)) for s, t in zip(x, [*x[1:], 0.0], strict=True))
        for x in (to_sigmas(base.alpha_bars[:-1]), levels)
    ]
    assert spent[1] < 0.9 * spent[0], "to J the schedule must look much better than the base"
    crowded = Trajectory(
        timesteps=tuple(np.interp(np.log(levels), np.log(sigmas_T), np.arange(len(sigmas_T)))),
        alpha_bars=(base.alpha_bars[0], *(1 / (1 + s * s) for s in levels[1:]), 1.0),
    )
    validation = Validation(pool, config, ("",), base, pool.alpha_bars().numpy(), sums)
    result = validation.judge(crowded, "vrg", trust=float("nan"))
    assert result.ratio > 1.5
    assert pool.trajectory() == base


class Ends:
    """A pool whose samples end at given squared distances from the reference: on the trajectory in use, on others."""

    def __init__(self, in_use: Trajectory, old: list[float], new: list[float]) -> None:
        self._in_use, self._old, self._new = in_use, old, new

    def trajectory(self) -> Trajectory:
        return self._in_use

    def final_latents(self, groups, trajectory: Trajectory) -> torch.Tensor:
        if trajectory.num_steps != self._in_use.num_steps:
            return torch.zeros(len(self._old), 1)
        return torch.tensor(self._old if trajectory == self._in_use else self._new)[:, None] ** 0.5


def test_refused_candidates_halve_the_trust_region_and_then_the_old_trajectory_stays(measured):
    config, pool, sums = measured
    base = pool.trajectory()
    ends = Ends(base, old=[1.0, 1.0], new=[2.0, 2.0])
    update = consider(ends, config, PROMPTS, sums, base, pool.alpha_bars().numpy(), provenance={})  # pyright: ignore
    assert not update.adopted and update.trajectory == base
    tried = [gate.trust for gate in update.gates]
    assert tried == [0.25, 0.125, 0.0625][: len(tried)] and len(tried) >= 2
    assert update.metrics()["vrg/adopted"] == 0.0 and update.metrics()["vrg/gate_ratio"] == pytest.approx(2.0)


def test_a_worker_that_follows_another_trajectory_stops_the_run(measured):
    _, pool, _ = measured

    class Deaf:
        def set_trajectory(self, trajectory):
            return [trajectory.schedule_id, "another"]

    with pytest.raises(WeightSyncError, match="another"):
        set_trajectory(Deaf(), pool.trajectory())  # pyright: ignore[reportArgumentType]


def test_a_common_factor_of_the_table_is_no_drift_but_a_change_of_shape_is(measured):
    from dataclasses import replace

    _, _, sums = measured
    table = sums.table({})
    assert table_drift(table, replace(sums, square_K=3 * sums.square_K, square2_K=9 * sums.square2_K)) < 1e-9
    bent = sums.square_K.copy()
    bent[-3:] *= 4
    assert table_drift(table, replace(sums, square_K=bent)) > 0.1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two iterations that measures first, and its configuration for another folder."""

    def config(root: Path):
        options = ["checkpoint.every=1", "vrg.probe_every=2", "vrg.probe_images=8", "vrg.max_drift=1e-9"]
        return load_config("toy_sdxl", [*TINY, *SMALL, *QUICK, *options, "run.iterations=2", f"run.dir={root}"])

    root = tmp_path_factory.mktemp("whole") / "run"
    drive(config(root), open_ports, QUIET)
    return root, config


def test_a_run_measures_first_records_the_result_and_resumes_with_the_same_trajectory(whole, tmp_path):
    root, config = whole
    parts = copy_run(root, tmp_path / "parts", newest=1)
    drive(config(parts), open_ports, QUIET, resume="auto")
    rows = results(root)
    assert {"vrg/j0", "vrg/j1", "vrg/adopted", "vrg/standard_error", "vrg/bias_ratio"} <= rows[0].keys()
    assert "vrg/table_drift" in rows[1]
    assert rows == results(parts)
    artefact = json.loads((root / "vrg/000000.json").read_text())
    assert artefact["trajectory"]["schedule_id"] and (root / "vrg/000000.png").stat().st_size > 1000
    states = [json.loads((each / "checkpoints/000002/state.json").read_text()) for each in (root, parts)]
    assert states[0]["trajectory"] == states[1]["trajectory"]


def test_a_trajectory_from_a_file_is_the_start_needed_once_and_must_have_as_many_steps(tiny, tmp_path, measured):
    _, pool, _ = measured
    schedule = pool.alpha_bars().numpy()
    levels = [float(schedule[t]) for t in (999, 850, 600, 300, 120, 20)]
    source = tmp_path / "start.txt"
    lines = [repr(level) for level in (*levels, 0.9995)]
    source.write_text("\n".join(["# steps: 6", *reversed(lines)]) + "\n")
    options = ["sampler.num_steps=6", f"run.dir={tmp_path / 'run'}", f"sampler.trajectory={source}"]
    drive(tiny("run.iterations=1", *options), open_ports, QUIET)
    moved = source.rename(tmp_path / "moved.txt")
    # A resumed run keeps what was read.
    drive(tiny("run.iterations=2", *options), open_ports, QUIET, resume="auto")
    for iteration in (1, 2):
        state = json.loads((tmp_path / f"run/checkpoints/{iteration:06d}/state.json").read_text())
        assert state["trajectory"]["alpha_bars"] == [*levels, 1.0]
        assert state["trajectory"]["integer_timesteps"] == [999, 850, 600, 300, 120, 20]
    with pytest.raises(ConfigError, match=r"sampler.num_steps=6"):
        other = tiny(f"run.dir={tmp_path / 'other'}", f"sampler.trajectory={moved}", "sampler.num_steps=8")
        drive(other, open_ports, QUIET)


@pytest.mark.parametrize(
    ("new", "passes"),
    [([0.9, 0.9, 0.9], True), ([1.1, 1.1, 0.1], False), ([0.9, 0.9, 9.0], False), ([1.0, 1.0, 1.0], True)],
)
def test_a_candidate_must_be_nearer_on_average_and_for_most_samples(measured, new, passes):
    config, pool, sums = measured
    base, levels = pool.trajectory(), pool.alpha_bars().numpy()
    other = Trajectory(timesteps=base.timesteps, alpha_bars=(*base.alpha_bars[:-2], 0.99 * base.alpha_bars[-2], 1.0))
    ends = Ends(base, old=[1.0, 1.0, 1.0], new=new)
    validation = Validation(ends, config, PROMPTS, base, levels, sums)  # pyright: ignore[reportArgumentType]
    assert validation.judge(other, "vrg", 0.25).passed == passes


def test_the_artefact_of_a_run_is_optimised_on_the_runs_own_noise_schedule(whole, measured, tmp_path):
    root, _ = whole
    report, _ = optimise_files(root, root, mode="log_trust")
    levels = measured[1].alpha_bars().numpy()
    wanted = to_timesteps(to_sigmas(report["alpha_bars"]), levels)
    assert np.abs(np.asarray(report["timesteps"]) - wanted).max() < 1e-6
    # One that names no schedule is not guessed at.
    artefact = json.loads((root / "vrg/000000.json").read_text())
    del artefact["table"]["provenance"]["alpha_bars"]
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(artefact))
    with pytest.raises(VrgError, match=r"table\.provenance\.alpha_bars"):
        optimise_files(bare, bare, mode="log_trust")


def test_a_trajectory_of_another_noise_schedule_is_refused(measured, tmp_path):
    _, pool, _ = measured
    own = pool.alpha_bars().numpy()
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"trajectory": trajectory_to_mapping(pool.trajectory(), own)}))
    assert read_schedule(path, own) == pool.trajectory()
    with pytest.raises(VrgError, match="another noise schedule"):
        read_schedule(path, LINEAR_DDPM)


def test_measuring_follows_the_trajectory_that_is_configured(measured, tmp_path):
    _, pool, _ = measured
    levels = pool.alpha_bars().numpy()
    path = tmp_path / "start.json"
    wanted = Trajectory(timesteps=(999.0, 300.0), alpha_bars=(float(levels[999]), float(levels[300]), 1.0))
    path.write_text(json.dumps({"trajectory": trajectory_to_mapping(wanted, levels)}))
    config, run = source_config("toy-sdxl", ["sampler.num_steps=2", f"sampler.trajectory={path}", "sampler.t_max=0.4"])
    assert open_rollouts(config, run).trajectory() == wanted
    config, run = source_config("toy-sdxl", [f"sampler.trajectory={path}"])
    with pytest.raises(ConfigError, match=r"sampler.num_steps=2"):
        open_rollouts(config, run)


def test_a_candidate_without_a_late_step_is_no_candidate(measured):
    config, pool, sums = measured
    base = pool.trajectory()
    levels = pool.alpha_bars().numpy()
    # The last step lies exactly at t_max, and the optimum moves it up.
    free = consider(pool, config, PROMPTS, sums, base, levels, provenance={}, prove=False).trajectory
    set_trajectory(pool, base)
    assert free.timesteps[-1] > base.timesteps[-1]
    sampler = config.sampler.model_copy(update={"t_max": base.timesteps[-1] / len(levels)})
    for halvings, adopted in ((0, False), (1, True)):
        vrg = config.vrg.model_copy(update={"halvings": halvings})
        held = consider(
            pool, config.model_copy(update={"sampler": sampler, "vrg": vrg}), PROMPTS, sums, base, levels,
            provenance={}, prove=False,
        )  # fmt: skip
        assert held.adopted == adopted and pool.trajectory().timesteps[-1] <= base.timesteps[-1]
        set_trajectory(pool, base)
