"""A step with a non-finite loss or gradient is skipped, recorded and counted; it changes no weight."""

import json
from dataclasses import replace

import pytest
import torch

from acpo_dist.config.load import load_config
from acpo_dist.core.errors import NonFiniteError
from acpo_dist.core.types import Normaliser, RewardTerm, TrainTask
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.context import fixed_groups
from acpo_dist.training.local import LocalLearner, LocalRewards, LocalRollouts, learner_spec, open_ports
from acpo_dist.training.run import drive
from tests.conftest import TINY, poison
from tests.helpers.runs import CLOCKS


def of_this_process(row):
    return {name: value for name, value in row.items() if name.startswith(CLOCKS)}


PROMPTS = ["a red circle on a white background", "a blue cross on a black background"]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def drawn():
    """24 samples of the base model, which no option of a learner changes: three optimiser steps of eight."""
    config = load_config("toy_sdxl", TINY)
    return LocalRollouts(config, device="cpu").generate(fixed_groups(config, PROMPTS, 24, stream="test"))


@pytest.fixture
def learner_of(tiny, drawn):
    """A learner in its first state, and the 24 samples."""

    def make(*overrides: str):
        config = tiny("learner.micro_batch=2", *overrides)
        learner = LocalLearner(learner_spec(config), LocalRewards(config, device="cpu"), device="cpu")
        learner.start(None)
        return learner, list(drawn)

    return make


def task_of(ids, iteration=0) -> TrainTask:
    return TrainTask(
        iteration=iteration, policy_version=0, sample_ids=tuple(ids), weights=dict.fromkeys(ids, 1.0),
        anchor_weight=2.0, learning_rate=1e-3,
        rewards=(RewardTerm(name="two_stream", weight=1.0, normaliser=Normaliser(mean=0.4, std=0.2, sign=1)),),
    )  # fmt: skip


def ids_of(handles) -> list[str]:
    return [name for handle in handles for name in handle.sample_ids]


@pytest.mark.parametrize("how", [["rewards.cut=latent"], ["rewards.cut=image"], ["learner.optimizer=adamw_8bit"]])
def test_a_refused_step_leaves_weights_averages_and_moments_as_if_it_had_not_been(how, learner_of, tmp_path):
    from safetensors.torch import load_file

    learner, handles = learner_of(*how)
    ids = ids_of(handles)
    # In the second micro-batch of the last step, when the first has left its gradient.
    handles[-1] = replace(handles[-1], payload=poison(handles[-1].payload, [0]))
    report = learner.train(handles, task_of(ids))
    assert report.optim_steps == 2 and [(one.step, one.sample_ids) for one in report.skipped] == [(2, (ids[20],))]
    assert all(value == value for value in report.metrics.values()), "figures of the steps that were taken"
    other, same = learner_of(*how)
    other.train(same, task_of(ids[:16]))
    for folder, one in (("a", learner), ("b", other)):
        one.save(tmp_path / folder)
    for name in ("policy", "ema", "optimizer"):
        found, wanted = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in "ab")
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], value) for key, value in wanted.items())


def test_a_gradient_that_is_not_finite_is_refused_though_every_loss_is(learner_of, monkeypatch):
    learner, handles = learner_of()
    before = learner.export(0).tensors
    submit = LocalRewards.submit

    def infinite(self, *arguments):
        future = submit(self, *arguments)
        future.result().gradient.data[:] = float("inf")
        return future

    monkeypatch.setattr(LocalRewards, "submit", infinite)
    report = learner.train(handles, task_of(ids_of(handles)))
    assert report.optim_steps == 0 and len(report.skipped) == 3
    assert all(torch.equal(value, before[name]) for name, value in learner.export(1).tensors.items())


def test_skipped_steps_in_a_row_are_bounded_across_iterations_and_a_good_one_starts_the_count_again(learner_of):
    learner, handles = learner_of("learner.max_skipped_steps=2")
    ids, bad = ids_of(handles), [replace(h, payload=poison(h.payload, [0])) for h in handles]
    assert not learner.train(bad, task_of(ids[:16])).too_many
    assert learner.train(handles, task_of(ids[:8])).optim_steps == 1
    assert not learner.train(bad, task_of(ids[:16])).too_many
    last = learner.train(bad, task_of(ids, iteration=7))
    assert last.too_many and [one.step for one in last.skipped] == [0], "the two after it are not tried"


def test_too_many_skipped_steps_end_a_run_with_all_of_them_recorded(tiny, tmp_path, monkeypatch):
    root, generate = tmp_path / "run", LocalRollouts.generate

    def always(self, groups, advance=None):
        handles = generate(self, groups, advance)
        training = groups[0].samples[0].sample_id.startswith("0")
        return [replace(h, payload=poison(h.payload, [1])) for h in handles] if training else handles

    monkeypatch.setattr(LocalRollouts, "generate", always)
    config = tiny("run.iterations=9", f"run.dir={root}", "learner.max_skipped_steps=1")
    with pytest.raises(NonFiniteError, match=r"max_skipped_steps=1 .*skipped_steps\.jsonl"):
        drive(config, open_ports, QUIET)
    lines = [json.loads(text) for text in (root / "skipped_steps.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1] and all(line["samples"] for line in lines)


def test_a_run_continues_past_a_skipped_step_and_reports_it(tiny, tmp_path, monkeypatch):
    root = tmp_path / "run"
    drawn = []
    generate = LocalRollouts.generate

    def sometimes(self, groups, advance=None):
        handles = generate(self, groups, advance)
        if any(group.samples[0].sample_id.startswith("000001-") for group in groups):
            drawn.append(handles[0].sample_ids[1])
            handles[0] = replace(handles[0], payload=poison(handles[0].payload, [1]))
        return handles

    monkeypatch.setattr(LocalRollouts, "generate", sometimes)
    config = tiny("run.iterations=3", f"run.dir={root}", "checkpoint.every=1")
    drive(config, open_ports, QUIET)
    rows = read_metrics(root / "metrics.jsonl")
    assert [row.get("learner/skipped_steps") for row in rows[:3]] == [0.0, 1.0, 0.0]
    # The weights did not move, so neither did what is known of their drift, nor the weight that follows it.
    assert rows[1]["drift/rms"] == rows[0]["drift/rms"] != rows[2]["drift/rms"]
    assert rows[2]["anchor/weight"] == rows[1]["anchor/weight"] != rows[0]["anchor/weight"]
    # What was not finite is gone with its iteration, from figures as from what the guard remembers.
    assert None not in rows[2].values()
    assert "NaN" not in (root / "checkpoints/000003/state.json").read_text()
    (line,) = [json.loads(text) for text in (root / "skipped_steps.jsonl").read_text().splitlines()]
    assert (line["iteration"], line["step"], line["gradient_norm"]) == (1, 0, "nan")
    assert [one["sample_id"] for one in line["samples"]] == drawn and line["samples"][0]["prompt"]

    whole = (root / "metrics.jsonl").read_bytes()
    again = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path / "again"})})
    drive(again, open_ports, QUIET, resume=str(root / "checkpoints/000002"))
    resumed = read_metrics(tmp_path / "again" / "metrics.jsonl")[-2:]
    for found, wanted in zip(resumed, [json.loads(text) for text in whole.splitlines()][-2:], strict=True):
        assert found | of_this_process(wanted) == wanted
