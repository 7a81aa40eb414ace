"""Shared by all tests: one torch thread, no telemetry, small configurations."""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray starts its workers at niceness 15: on a machine with other work they would hardly run, and tests would time out.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from acpo_dist.core.packages import leave_out_bitsandbytes

# As every process of the product does; before anything imports diffusers.
leave_out_bitsandbytes()
torch.set_num_threads(1)

_COUNTS = [
    "sampler.num_steps=4", "sampler.t_max=0.5", "rollout.prompts_per_iteration=8", "rollout.batch_size=4",
    "learner.micro_batch=4", "learner.global_batch=8", "rewards.calibration_samples=8", "tracking.mlflow=false",
    "tracking.num_images=4", "model.tuning.targets=[to_q, to_v]",
]  # fmt: skip
TINY = [*_COUNTS, f"model.path={Path(__file__).parent / 'assets/small-sdxl'}"]
"""Overrides that make configs/toy_sdxl.yaml small: 8 samples of 4 steps per iteration, adapters on attention only, and
the model of tests/helpers/small_sdxl.py."""


@pytest.fixture
def tiny():
    """Load configs/toy_sdxl.yaml, or another `source`, at the smallest useful size, with more overrides."""
    from acpo_dist.config.load import load_config

    def load(*overrides: str, source: str = "toy_sdxl"):
        sdxl = load_config(source).model.path == "toy-sdxl"
        return load_config(source, [*(TINY if sdxl else _COUNTS), *overrides])

    return load


@pytest.fixture
def acpo(monkeypatch, capsys):
    """Run `acpo ARGUMENTS` in this process: exit code, standard output and standard error."""
    from acpo_dist.cli.app import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["acpo", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def done(acpo):
    """Run `acpo ARGUMENTS`, which must succeed; returns what it printed."""

    def finished(*arguments: str) -> str:
        code, out, err = acpo(*arguments)
        assert code == 0, err
        return out + err

    return finished


FIRST = (
    "unit/test_algorithms.py", "unit/test_planning.py", "unit/test_run.py", "unit/test_trajectory_manager.py",
    "unit/test_guard_monitor.py", "unit/test_report_page.py",
    "ray/test_nodes.py", "ray/test_learner.py", "ray/test_reward_pool.py", "ray/test_sizes_and_images.py",
    "ray/test_pipeline.py", "ray/test_reward_load.py", "ray/test_launch.py", "ray/test_restart.py", "ray/test_start.py",
    "ray/test_two_users.py", "ray/test_secrets.py", "ray/test_loading.py", "ray/test_evaluation.py",
    "ray/test_signals.py", "ray/test_doctor.py", "ray/test_latent_critic.py", "ray/test_software.py",
    "ray/test_reward_plugins.py", "ray/test_reward_gateway.py",
)  # fmt: skip
"""Test files that take longest, tests that wait beside tests that compute: no process is left with a long file at the
end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order test files by `FIRST`; the order within a file stays."""
    rank = {name: index for index, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get("/".join(item.path.parts[-2:]), len(FIRST)))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Import test files without garbage collections, which would visit all imported objects again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    """Let extensions free their objects at the end, or they report leaks."""
    gc.unfreeze()


def poison(batch, rows):
    """A rollout batch with NaN in some rows, as an overflow makes them."""
    from dataclasses import replace

    def spoilt(values):
        values = values.clone()
        values[rows] = float("nan")
        return values

    late = tuple(replace(one, latents_BCHW=spoilt(one.latents_BCHW)) for one in batch.late)
    return replace(batch, latents_BCHW=spoilt(batch.latents_BCHW), late=late)
