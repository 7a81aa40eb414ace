"""Several processes of one machine without Ray: `accelerate launch -m acpo_dist train CONFIG`."""

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from acpo_dist.core.errors import ConfigError
from acpo_dist.tracking.console import Console
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive
from tests.conftest import TINY
from tests.helpers.runs import results

SMALL = [
    *TINY, "sampler.num_steps=4", "learner.micro_batch=2", "run.iterations=2", "tracking.images_every=9",
    "rewards.calibration_samples=8",
]  # fmt: skip


def test_two_launched_processes_have_the_metrics_and_weights_of_one(tiny, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "acpo_dist", "train"]
    done = subprocess.run(
        [*command, "toy_sdxl", *SMALL, f"run.dir={tmp_path / 'two'}"], capture_output=True, text=True, timeout=540,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    drive(tiny(*SMALL, f"run.dir={tmp_path / 'one'}"), open_ports, Console(quiet=True))
    one, two = (results(tmp_path / name) for name in ("one", "two"))
    # Ranks sum their gradients in another order.
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert theirs[name] == pytest.approx(value, rel=2e-3, abs=5e-4), (mine["iteration"], name)
    first, second = (load_file(tmp_path / f"{n}/checkpoints/000002/learner/policy.safetensors") for n in ("one", "two"))
    # Adapters' second factors start at zero. Adam moves an element whose gradient is at rounding by a full step of
    # arbitrary sign, so single elements are not compared.
    moved = {name: value for name, value in first.items() if "lora_B" in name}
    norm = sum(float(value.square().sum()) for value in moved.values()) ** 0.5
    error = sum(float((value - second[name]).square().sum()) for name, value in moved.items()) ** 0.5
    assert 0 < norm and error <= 0.05 * norm, (error, norm)


def test_several_ranks_in_one_process_are_refused_with_the_command_that_starts_them(tiny):
    with (
        pytest.raises(ConfigError, match="accelerate launch --num_processes 2"),
        open_ports(tiny("learner.num_ranks=2", "learner.micro_batch=2", "cluster.backend=local"), None),
    ):
        raise AssertionError("nothing may start")
