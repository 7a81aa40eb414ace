"""The optimiser in the host's memory takes the same steps, and its state survives a checkpoint."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.helpers.config import refusal

pytest.importorskip("deepspeed")

# One rank in a process of its own: DeepSpeed keeps its process group and its hooks for the life of a process.
PROGRAM = """
import json, sys, torch
from torch import nn
from acpo_dist.config.schema import LearnerConfig
from acpo_dist.workers.learner.engine import TorchEngine
from acpo_dist.workers.learner.zero import ZeroEngine

def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))

def steps(engine, network, first, last):
    for step in range(first, last):
        for part in range(2):
            inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + part))
            engine.backward((network(inputs) - inputs[:, :3].sin()).square().mean())
        engine.step()

def config(**more):
    return LearnerConfig(learning_rate=0.02, max_grad_norm=0.5, micro_batch=4, global_batch=8, **more)

plain = layers()
wanted = TorchEngine(plain, config(), accumulation=2)
steps(wanted, plain, 0, 4)
first, second = layers(), layers()
engine = ZeroEngine(first, config(zero_stage=2, offload_optimizer="cpu"), accumulation=2)
steps(engine, first, 0, 2)
weights, moments = engine.weights(), engine.optimiser_state()
with torch.no_grad():
    for name, value in second.named_parameters():
        value.copy_(weights[name])
again = ZeroEngine(second, config(zero_stage=2, offload_optimizer="cpu"), accumulation=2)
again.load(weights, moments)
steps(engine, first, 2, 4)
steps(again, second, 2, 4)
far = lambda left, right: max(float((left[name] - right[name]).abs().max()) for name in right)
print(json.dumps({
    "plain": far(engine.weights(), wanted.weights()),
    "moments": far(engine.optimiser_state(), wanted.optimiser_state()),
    "resumed": far(again.weights(), engine.weights()), "offloaded": bool(engine._engine.optimizer.cpu_offload),
}), file=sys.stderr)
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_an_offloaded_optimiser_takes_the_plain_ones_steps_and_resumes():
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **place}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **variables}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stderr.strip().splitlines()[-1])
    assert found["offloaded"]
    # float32, with the gradient summed in a flat buffer; Adam's step divides by a gradient's size, its moments do not.
    assert found["plain"] < 1e-4 and found["moments"] < 1e-5 and found["resumed"] < 1e-5


def test_offloading_without_sharding_is_refused():
    assert "learner.offload_optimizer is cpu and learner.zero_stage is None" in refusal(
        "toy_sdxl", "learner.offload_optimizer=cpu"
    )
