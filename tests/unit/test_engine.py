"""The torch engine: exact accumulation, bit-exact state round trip, and no change by non-finite gradients."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from acpo_dist.config.schema import LearnerConfig
from acpo_dist.core.errors import CheckpointError
from acpo_dist.workers.learner.engine import TorchEngine
from tests.helpers.config import refusal

CONFIG = LearnerConfig(learning_rate=0.02, weight_decay=0.01, max_grad_norm=0.5)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Three layers, of which the first does not train."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    layers[0].requires_grad_(False)
    return layers


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(12, 5, generator=rng(100 + step)).to(dtype)
    return inputs, torch.sin(3 * inputs[:, :2])


def losses(layers: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return (layers(inputs) - targets).square().mean(1)


def run(engine: TorchEngine, layers: nn.Module, steps: range) -> list[float]:
    norms = []
    for step in steps:
        engine.backward(losses(layers, *batch(step)).mean())
        norms.append(engine.step())
    return norms


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("pieces", [2, 3, 12])
def test_accumulated_micro_batches_are_the_big_batch(pieces: int):
    whole, parted = network(dtype=torch.float64), network(dtype=torch.float64)
    big = TorchEngine(whole, CONFIG, accumulation=1)
    small = TorchEngine(parted, CONFIG, accumulation=pieces)
    for step in range(5):
        inputs, targets = batch(step, torch.float64)
        big.backward(losses(whole, inputs, targets).mean())
        for part in zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True):
            small.backward(losses(parted, *part).mean())
        # float64 sums in another order.
        assert small.step() == pytest.approx(big.step(), rel=1e-12)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parted.state_dict()[name], value, rtol=0, atol=1e-11)


def test_the_update_is_clipped_adamw():
    # Adam's own formulas (Loshchilov and Hutter 2019), on one number whose gradient is known.
    layer = nn.Linear(1, 1, bias=False).double()
    layer.weight.data.fill_(2.0)
    engine = TorchEngine(layer, CONFIG, accumulation=1)
    weight, first, second = 2.0, 0.0, 0.0
    for step, slope in enumerate((0.3, -4.0, 1.0), start=1):
        engine.backward(slope * layer.weight.sum())
        assert engine.step() == pytest.approx(abs(slope), rel=1e-12)
        # torch divides by norm + 1e-6.
        gradient = slope * min(1.0, 0.5 / (abs(slope) + 1e-6))
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        weight *= 1 - 0.02 * 0.01
        weight -= 0.02 * (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.999**step)) + 1e-8)
        assert layer.weight.item() == pytest.approx(weight, rel=1e-12)


def test_only_parameters_that_require_gradients_are_optimised_and_reported():
    layers = network()
    before = layers[0].weight.detach().clone()
    engine = TorchEngine(layers, CONFIG, accumulation=1)
    run(engine, layers, range(2))
    assert torch.equal(layers[0].weight, before)
    assert set(engine.weights()) == {"2.weight", "2.bias", "4.weight", "4.bias"}


@pytest.mark.parametrize("saved_after", [0, 3])
def test_a_run_continues_to_the_bit_from_its_weights_and_optimiser_state(saved_after: int):
    layers = network()
    engine = TorchEngine(layers, CONFIG, accumulation=1)
    run(engine, layers, range(saved_after))
    weights, state = engine.weights(), engine.optimiser_state()
    norms = run(engine, layers, range(saved_after, 6))

    # Same frozen part, other trainable values: all of them must come from what was saved.
    others = network()
    for parameter in others[2:].parameters():
        parameter.data.add_(1)
    fresh = TorchEngine(others, CONFIG, accumulation=1)
    fresh.load(weights, state)
    assert run(fresh, others, range(saved_after, 6)) == norms
    assert same(fresh.weights(), engine.weights())
    assert same(fresh.optimiser_state(), engine.optimiser_state())


def test_optimiser_state_names_a_moment_pair_for_every_weight_and_counts_steps():
    layers = network()
    engine = TorchEngine(layers, CONFIG, accumulation=1)
    run(engine, layers, range(3))
    state = engine.optimiser_state()
    assert set(state) == {"step"} | {f"{m}.{n}" for m in ("exp_avg", "exp_avg_sq") for n in engine.weights()}
    assert state["step"].item() == 3


def test_weights_handed_out_are_copies():
    layers = network()
    engine = TorchEngine(layers, CONFIG, accumulation=1)
    handed = engine.weights()
    kept = {name: value.clone() for name, value in handed.items()}
    run(engine, layers, range(1))
    assert same(handed, kept) and not same(engine.weights(), kept)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_refuses_the_step_and_changes_nothing(bad: float):
    layers = network()
    engine = TorchEngine(layers, CONFIG, accumulation=2)
    run(engine, layers, range(2))
    weights, state = engine.weights(), engine.optimiser_state()
    engine.backward(losses(layers, *batch(2)).mean())
    engine.backward(bad * losses(layers, *batch(3)).mean())
    assert not math.isfinite(engine.step())
    assert same(engine.weights(), weights) and same(engine.optimiser_state(), state)


def test_after_a_refused_step_the_next_one_is_as_if_nothing_had_been():
    layers, untroubled = network(), network()
    engine, wanted = (TorchEngine(each, CONFIG, accumulation=1) for each in (layers, untroubled))
    engine.backward(math.nan * losses(layers, *batch(0)).mean())
    assert math.isnan(engine.step())
    run(engine, layers, range(2))
    run(wanted, untroubled, range(2))
    assert same(engine.weights(), wanted.weights())


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_precision_applies_to_the_forward_pass_and_weights_stay_float32(precision: str, dtype: torch.dtype):
    layers = network()
    engine = TorchEngine(layers, CONFIG.model_copy(update={"precision": precision}), accumulation=1)
    with engine.autocast():
        assert layers(batch(0)[0]).dtype == dtype
    assert {value.dtype for value in engine.weights().values()} == {torch.float32}


# Moments of 8 bits

NARROW = CONFIG.model_copy(update={"optimizer": "adamw_8bit"})


def wide_network() -> nn.Sequential:
    """Large enough for 8-bit moments: bitsandbytes keeps fewer than 4096 elements in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 512), nn.Tanh(), nn.Linear(512, 16), nn.Tanh(), nn.Linear(16, 2))


def test_8_bit_moments_take_a_quarter_and_learn_as_well():
    ends, sizes = [], []
    for config in (CONFIG, NARROW):
        layers = wide_network()
        engine = TorchEngine(layers, config.model_copy(update={"learning_rate": 2e-3}), accumulation=1)
        seen = []
        for _ in range(60):
            loss = losses(layers, *batch(0)).mean()
            seen.append(loss.item())
            engine.backward(loss)
            engine.step()
        ends.append(seen[-1] / seen[0])
        state = engine.optimiser_state()
        sizes.append(sum(value.nbytes for name, value in state.items() if name.endswith(".2.weight")))
    assert max(ends) < 0.3 and ends[1] == pytest.approx(ends[0], abs=0.05)
    # Two bytes and two scales of 4 bytes per 256 elements, instead of eight bytes.
    assert sizes[1] / sizes[0] == pytest.approx((2 + 8 / 256) / 8, rel=1e-6)


def test_8_bit_moments_survive_a_checkpoint_to_the_bit():
    whole, stopped, resumed = wide_network(), wide_network(), wide_network()
    first, second, third = (TorchEngine(layers, NARROW, accumulation=1) for layers in (whole, stopped, resumed))
    run(first, whole, range(6))
    run(second, stopped, range(3))
    third.load(second.weights(), second.optimiser_state())
    run(third, resumed, range(3, 6))
    assert same(third.weights(), first.weights()) and same(third.optimiser_state(), first.optimiser_state())


def test_8_bit_moments_are_not_put_back_from_a_checkpoint_that_has_none():
    layers = wide_network()
    wide = TorchEngine(layers, CONFIG, accumulation=1)
    run(wide, layers, range(1))
    with pytest.raises(CheckpointError, match=r"no 8-bit moments of `0\.weight`.*learner\.optimizer=adamw"):
        TorchEngine(layers, NARROW, accumulation=1).load(wide.weights(), wide.optimiser_state())


def test_8_bit_moments_under_deepspeed_are_refused():
    assert "learner.zero_stage" in refusal(
        "toy_sdxl", "learner.optimizer=adamw_8bit", "learner.zero_stage=2", "cluster.backend=ray"
    )


def test_bitsandbytes_is_left_out_of_a_process_until_the_optimiser_needs_it():
    code = (
        "from acpo_dist.core.packages import import_bitsandbytes, leave_out_bitsandbytes; leave_out_bitsandbytes();"
        "import importlib.util as u; assert u.find_spec('bitsandbytes') is None;"
        "from acpo_dist.config.load import load_config;"
        "load_config('toy_sdxl', ['learner.optimizer=adamw_8bit']);"
        "assert import_bitsandbytes().optim.AdamW8bit"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
