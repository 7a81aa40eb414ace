"""Runs that continue from a named checkpoint, or lose learner ranks."""

import shutil
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from acpo_dist.config.load import load_config
from acpo_dist.core.errors import LearnerLostError, ResumeError, WorkerLostError
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.export import read_export_facts
from acpo_dist.training.local import LocalLearner, LocalRewards, learner_spec, open_ports
from acpo_dist.training.run import drive
from acpo_dist.training.run_folder import read_run_config
from acpo_dist.workers.learner.state import serialise, write_serialised
from tests.conftest import TINY
from tests.helpers.runs import PLAIN, results

QUIET = Console(quiet=True)


def losing(at: int):
    """In-process ports whose learner is lost once, in update `at`."""
    state = {"lost": False}

    @contextmanager
    def opened(config, tracker):
        with open_ports(config, tracker) as ports:
            inner, count = ports.learner, [0]

            class Losing:
                def __getattr__(self, name):
                    return getattr(inner, name)

                def train(self, *arguments, **named):
                    count[0] += 1
                    if not state["lost"] and count[0] == at:
                        state["lost"] = True
                        raise WorkerLostError("learner/0 died")
                    return inner.train(*arguments, **named)

            yield replace(ports, learner=Losing())

    return opened


@pytest.fixture
def finished(plain_run, tiny):
    """A run of 3 iterations with a checkpoint of each, and its configuration in another folder."""
    return plain_run.run_dir, lambda folder: tiny(*PLAIN, f"run.dir={folder}")


def weights_of(root):
    return load_file(root / "checkpoints/000003/learner/policy.safetensors")


@pytest.mark.parametrize("where", ["the same folder", "another folder"])
def test_a_run_resumed_from_a_named_checkpoint_continues_from_it_also_after_a_loss(finished, tmp_path, where):
    whole, config = finished
    root = tmp_path / "run"
    if where == "the same folder":
        shutil.copytree(whole, root)
    source = root / "checkpoints/000001" if where == "the same folder" else whole / "checkpoints/000002"
    # Lost before the first checkpoint of its own: neither the later ones of before nor the base model will do.
    drive(config(root), losing(1), QUIET, resume=str(source))
    iterations = [row["iteration"] for row in read_metrics(root / "metrics.jsonl")]
    assert iterations == ([0, 1, 2, 3] if where == "the same folder" else [2, 3])
    assert all(torch.equal(value, weights_of(root)[name]) for name, value in weights_of(whole).items())
    aside = {path.name for path in (root / "checkpoints").glob("superseded.*")}
    assert aside == ({"superseded.000002", "superseded.000003"} if where == "the same folder" else set())


class InMemory:
    """Training state of a learner of this process, as bytes."""

    def __init__(self, learner: LocalLearner, earlier, *, whole: bool) -> None:
        self._files = serialise(learner.worker.state(earlier))
        self._whole = whole

    def write(self, folder):
        if not self._whole:
            raise WorkerLostError("the copy was not complete")
        write_serialised(folder, self._files)


def shape(bound: int, every: int) -> list[str]:
    return ["run.iterations=3", f"checkpoint.every={every}", f"pipeline.max_staleness={bound}"]


@pytest.fixture(scope="module")
def calm(plain_run, tmp_path_factory):
    """Metrics of a run of `shape` that loses nothing."""
    known = {(0, 1): results(plain_run.run_dir)}

    def metrics(bound: int, every: int):
        if (bound, every) not in known:
            root = tmp_path_factory.mktemp("calm") / "run"
            drive(load_config("toy_sdxl", [*TINY, *shape(bound, every), f"run.dir={root}"]), open_ports, QUIET)
            known[bound, every] = results(root)
        return known[bound, every]

    return metrics


@pytest.mark.parametrize(
    ("bound", "every", "incomplete", "repeated"),
    [(0, 1, (), [2]), (1, 9, (), [2]), (0, 9, (2,), [1, 2]), (0, 9, (1, 2), [0, 1, 2])],
    ids=["checkpoint", "kept ahead", "former kept", "none kept"],
)
def test_lost_learner_ranks_are_replaced_and_change_no_metric(bound, every, incomplete, repeated, calm, tiny, tmp_path):
    opened, lost, trained, kept = [], [], [], []

    @contextmanager
    def losing_ranks(config, tracker):
        with open_ports(config, tracker) as ports:
            opened.append(ports)
            learner: Any = ports.learner
            train, rewards = learner.train, cast("LocalRewards", ports.reward)

            def updated(handles, task, advance=None):
                trained.append(task.iteration)
                if task.iteration == 2 and not lost:
                    lost.append(task.sample_ids)
                    train(handles, task)
                    raise LearnerLostError("learner/0 died in `train`")
                return train(handles, task, advance)

            def renewed():
                learner.worker = LocalLearner(learner_spec(config), rewards, device="cpu").worker

            def keep(earlier=()):
                kept.append(len(kept))
                return InMemory(learner, earlier, whole=kept[-1] not in incomplete)

            learner.train, learner.renew = updated, renewed
            if every > 1:
                learner.keep = keep
            yield ports

    drive(tiny(*shape(bound, every), f"run.dir={tmp_path / 'lost'}"), losing_ranks, QUIET)
    assert trained == [0, 1, 2, *repeated] and len(opened) == (2 if repeated[0] == 0 else 1)
    assert results(tmp_path / "lost") == calm(bound, every)


def test_another_runs_checkpoint_does_not_go_into_a_folder_that_holds_a_run(finished, tmp_path):
    whole, config = finished
    root = tmp_path / "run"
    shutil.copytree(whole, root)
    with pytest.raises(ResumeError, match="already holds a run"):
        drive(config(root), open_ports, QUIET, resume=str(whole / "checkpoints/000001"))
    assert {path.name for path in (root / "checkpoints").iterdir()} == {"000001", "000002", "000003"}


def test_the_export_names_its_weights(finished):
    from acpo_dist.core.weights import checksum

    root, _ = finished
    assert read_export_facts(root / "export") == {
        "iteration": 3, "policy_version": 3, "policy_sha256": checksum(weights_of(root)),
        "format": "comfy", "file": f"{read_run_config(root).run.name}.safetensors",
    }  # fmt: skip
