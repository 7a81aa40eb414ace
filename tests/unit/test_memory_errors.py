"""An out-of-memory error ends a run with a remedy, and its checkpoints are intact."""

from pathlib import Path

import pytest
import torch

from acpo_dist.config.load import load_config
from acpo_dist.config.schema import SamplerConfig
from acpo_dist.core.errors import DeviceMemoryError
from acpo_dist.core.memory import within_memory
from acpo_dist.core.types import SamplePlan
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.local import learner_spec, open_ports
from acpo_dist.training.run import drive
from acpo_dist.workers.learner.batches import memory_remedy
from acpo_dist.workers.learner.checkpoint import CheckpointStore
from acpo_dist.workers.rollout.worker import RolloutWorker

QUIET = Console(quiet=True)


def allocate_too_much(*_args, **_options):
    """A real allocation that no machine can satisfy."""
    return torch.empty(1 << 50)


def refuse_on_the_device():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("fail", [allocate_too_much, refuse_on_the_device, lambda: bytearray(1 << 60)])
def test_an_out_of_memory_error_names_the_phase_and_the_keys_to_lower(fail):
    with pytest.raises(DeviceMemoryError, match=r"out of memory in the loft .*Lower the ladder\."):
        with within_memory("the loft", "Lower the ladder."):
            fail()


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="shapes"), within_memory("the loft", ""):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(("part", "advice"), [("predict", "sampling 2 at once"), ("decode", "vae_slicing=true")])
def test_a_rollout_error_names_sampling_or_decoding(part, advice, monkeypatch):
    worker = RolloutWorker(SdxlFamily.Config(path="toy-sdxl"), SamplerConfig(num_steps=2, t_max=0.9), name="rollout/3")
    monkeypatch.setattr(worker.family, part, allocate_too_much)
    plans = [SamplePlan(sample_id=f"s{seed}", prompt_id=0, prompt="a red circle", seed=seed) for seed in (0, 1)]
    with pytest.raises(
        DeviceMemoryError, match=rf"rollout/3, .*{advice}.*rollout\.batch_size \(2\)|rollout/3, {advice}"
    ):
        worker.generate(plans)


def test_the_learners_advice_names_what_is_not_done_yet():
    config = load_config("toy_sdxl", ["model.memory.gradient_checkpointing=true", "learner.optimizer=adamw_8bit"])
    text = memory_remedy(learner_spec(config))
    assert f"learner.micro_batch ({config.learner.micro_batch})" in text
    assert "gradient_checkpointing" not in text and "8bit" not in text and "LoRA" not in text
    full = load_config("toy_sdxl", ["model.tuning.method=full", "learner.micro_batch=1"])
    assert memory_remedy(learner_spec(full)).startswith("Set model.memory.gradient_checkpointing=true; ")
    assert "tune with LoRA" in memory_remedy(learner_spec(full))


def test_a_run_whose_learner_runs_out_of_memory_resumes_from_its_checkpoint(tiny, tmp_path: Path, monkeypatch):
    from acpo_dist.workers.learner.engine import TorchEngine

    cut = tmp_path / "cut"
    options = ("run.iterations=2", f"run.dir={cut}", "checkpoint.every=1")
    backward, calls = TorchEngine.backward, []

    def fail_in_the_second_iteration(self, loss):
        calls.append(None)
        if (cut / "checkpoints" / "000001").is_dir():
            allocate_too_much()
        backward(self, loss)

    monkeypatch.setattr(TorchEngine, "backward", fail_in_the_second_iteration)
    with pytest.raises(DeviceMemoryError, match=r"the learner, micro-batches of .*learner\.micro_batch"):
        drive(tiny(*options), open_ports, QUIET)
    monkeypatch.setattr(TorchEngine, "backward", backward)
    newest = CheckpointStore(cut / "checkpoints", keep=3).newest()
    assert calls and newest is not None and newest.iteration == 1
    # With the smaller micro-batch that the message asks for.
    drive(tiny(*options, "learner.micro_batch=1"), open_ports, QUIET, resume="auto")
    assert [row["iteration"] for row in read_metrics(cut / "metrics.jsonl")] == [0, 1, 2]
