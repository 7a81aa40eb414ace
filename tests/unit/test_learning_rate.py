"""The learning rate from the configuration to the optimiser step."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.run_folder import read_run_config
from acpo_dist.workers.learner.engine import TorchEngine
from acpo_dist.workers.learner.rates import learning_rate


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_the_rate_falls_as_transformers_schedule_does(schedule, reference, tiny):
    config = tiny(
        f"learner.lr_decay_type={schedule}",
        "learner.lr_decay_ratio=1",
        "run.iterations=20",
        "learner.learning_rate=0.5",
    )
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = reference(optimiser, num_warmup_steps=0, num_training_steps=20)
    for iteration in range(20):
        assert learning_rate(config, iteration) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimiser.step()
        scheduler.step()


def test_a_fall_over_the_last_quarter_leaves_the_rest_at_its_height(tiny):
    config = tiny("learner.lr_decay_ratio=0.25", "run.iterations=20", "learner.learning_rate=0.5")
    rates = [learning_rate(config, iteration) for iteration in range(20)]
    assert rates[:16] == [0.5] * 16
    assert rates[16:] == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_warm_up_reaches_the_height_and_multiplies_the_fall(tiny):
    config = tiny("learner.lr_warmup=3", "learner.lr_decay_ratio=0", "run.iterations=20", "learner.learning_rate=0.4")
    assert [learning_rate(config, i) for i in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


def test_the_length_of_a_step_follows_the_rate_of_the_task(tiny):
    layer = torch.nn.Linear(3, 3)
    engine = TorchEngine(layer, tiny("learner.learning_rate=1e-3").learner, accumulation=1)
    before = engine.weights()
    engine.set_learning_rate(0.25)
    engine.backward(layer(torch.ones(1, 3)).square().sum() * 1e3)
    engine.step()
    # Adam's first step is the rate itself, whatever the gradient.
    moved = max(float((value - before[name]).abs().max()) for name, value in engine.weights().items())
    assert moved == pytest.approx(0.25, rel=1e-4)


def test_a_run_records_the_rate_of_every_iteration(plain_run):
    config = read_run_config(plain_run.run_dir)
    *rows, _ = read_metrics(plain_run.run_dir / "metrics.jsonl")
    rates = [row.get("learner/learning_rate") for row in rows]
    whole = config.learner.learning_rate
    assert rates == [learning_rate(config, iteration) for iteration in range(3)]
    assert rates == pytest.approx([whole, whole * 2 / 3, whole / 3])
