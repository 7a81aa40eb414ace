"""A complete run in one process: its output, and stopping and resuming it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from acpo_dist.core.errors import NonFiniteError, ResumeError
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.local import LocalRollouts, open_ports
from acpo_dist.training.run import drive
from acpo_dist.training.run_folder import open_run, read_run_config
from acpo_dist.workers.learner.checkpoint import CheckpointStore

QUIET = Console(quiet=True)


def _metrics(root):
    """Metrics by iteration without durations."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "idle/"))}
        for row in read_metrics(root / "metrics.jsonl")
    ]


@pytest.mark.parametrize("source", ["toy_sdxl", "toy_flow"])
def test_a_run_that_is_stopped_and_resumed_gives_the_same_metrics_and_weights_bit_for_bit(tiny, tmp_path, source):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    drive(tiny("run.iterations=4", f"run.dir={whole}", "checkpoint.every=2", source=source), open_ports, QUIET)
    # As a machine leaves it that dies in iteration 4: a whole checkpoint of iteration 2 and rows of later ones.
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints/000004")
    (parts / "samples/000004.png").unlink()
    again = tiny("run.iterations=4", f"run.dir={parts}", "checkpoint.every=2", source=source)
    drive(again, open_ports, QUIET, resume="auto")
    without_requests = [
        [{k: v for k, v in row.items() if "requests" not in k} for row in _metrics(r)] for r in (whole, parts)
    ]
    assert without_requests[0] == without_requests[1]
    for name in ("policy", "optimizer", "ema"):
        files = [load_file(root / f"checkpoints/000004/learner/{name}.safetensors") for root in (whole, parts)]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert (whole / "samples/000004.png").read_bytes() == (parts / "samples/000004.png").read_bytes()


def test_a_run_writes_its_resolved_configuration_metrics_images_checkpoint_and_lora(tiny, tmp_path):
    root = tmp_path / "run"
    result = drive(tiny("run.iterations=1", f"run.dir={root}"), open_ports, QUIET)
    assert result.run_dir == root and result.iterations == 1
    names = {path.name for path in root.iterdir()}
    assert {"resolved.yaml", "metrics.jsonl", "samples", "checkpoints", "curves.png", "export"} <= names
    row, gain = read_metrics(root / "metrics.jsonl")
    assert row["iteration"] == 0 and gain.keys() == {"iteration", "gain/two_stream", "gain/strided_judge"}
    # At the start policy and anchor are the same network, so the drift is exactly nothing.
    assert row["drift/rms"] == 0.0 and row["anchor/uniform"] == 0.0
    assert {"time/rollout", "time/reward", "time/learn", "time/sync", "time/iteration"} <= row.keys()
    # A LoRA run exports its LoRA and the trajectory, and no copy of the base model.
    exported = {path.name for path in (root / "export").iterdir()}
    assert exported == {f"{read_run_config(root).run.name}.safetensors", "acpo.json", "schedule.json", "sigmas.txt"}


def test_the_anchor_alone_never_moves_the_policy(tiny, tmp_path):
    config = tiny(
        "run.iterations=2", f"run.dir={tmp_path / 'run'}", "algorithm.reward_weight=0", "algorithm.anchor.weight=1.0"
    )
    drive(config, open_ports, QUIET)
    *rows, gain = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["drift/rms"] for row in rows] == [0.0, 0.0]
    # The same prompts, seeds and weights as at calibration, whose mean is 0 by definition.
    assert gain["gain/two_stream"] == pytest.approx(0, abs=1e-9)


def test_latent_cut_and_image_cut_take_the_same_step(tiny, tmp_path):
    weights = {}
    for cut in ("latent", "image"):
        root = tmp_path / cut
        drive(
            tiny("run.iterations=1", f"run.dir={root}", f"rewards.cut={cut}", "rewards.wire_dtype=float32"),
            open_ports,
            QUIET,
        )
        weights[cut] = load_file(root / "checkpoints/000001/learner/optimizer.safetensors")
    moments = [name for name in weights["latent"] if name.startswith("exp_avg.") and "lora_B" in name]
    for name in moments:
        # First moments are the gradients: equal up to the order of float32 sums, relative to the largest entry.
        scale = weights["latent"][name].abs().max()
        assert (weights["latent"][name] - weights["image"][name]).abs().max() <= 1e-4 * scale


def test_a_full_fine_tuning_run_keeps_a_frozen_anchor(tiny, tmp_path):
    root = tmp_path / "run"
    drive(
        tiny("run.iterations=2", f"run.dir={root}", "model.tuning={method: full}", "learner.learning_rate=1e-4"),
        open_ports,
        QUIET,
    )
    drift = [row["drift/rms"] for row in read_metrics(root / "metrics.jsonl")[:-1]]
    assert drift[0] == 0.0 and drift[1] > 0.0


def test_an_unconditional_pixel_model_trains_with_the_same_loop(tiny, tmp_path):
    root = tmp_path / "run"
    config = tiny(
        "run.iterations=1",
        f"run.dir={root}",
        "model={type: ddpm, path: toy-ddpm}",
        "data.prompts=none",
        "rewards.cut=image",
    )
    drive(config, open_ports, QUIET)
    from diffusers import DDPMPipeline

    assert DDPMPipeline.from_pretrained(root / "export").unet.config["in_channels"] == 3


def test_a_non_finite_loss_stops_before_any_weight_changes(tiny, tmp_path):
    config = tiny("run.iterations=2", f"run.dir={tmp_path / 'run'}", "learner.max_skipped_steps=0")
    checked = {}

    def poison(config, ports, prompts):
        worker = ports.learner.worker
        before = {name: value.clone() for name, value in worker.export(0).tensors.items()}
        checked["before"], checked["worker"] = before, worker
        with torch.no_grad():
            next(iter(worker.family.network.parameters())).fill_(float("nan"))

    with pytest.raises(NonFiniteError, match="non-finite"):
        drive(config, open_ports, QUIET, at_start=poison)
    held = {name: p for name, p in checked["worker"].family.network.named_parameters() if name in checked["before"]}
    assert all(torch.equal(held[name], value) for name, value in checked["before"].items())


def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(tiny, tmp_path, caplog):
    root = tmp_path / "run"
    drive(tiny("run.iterations=2", f"run.dir={root}", "checkpoint.every=1"), open_ports, QUIET)
    file = root / "checkpoints/000002/learner/policy.safetensors"
    tensors = load_file(file)
    save_file({name: value + 1 for name, value in tensors.items()}, file)
    newest = CheckpointStore(root / "checkpoints", keep=3).newest()
    assert newest is not None and newest.iteration == 1
    assert "000002 is damaged" in caplog.text


def test_an_unfinished_checkpoint_is_never_read(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    partial = store.prepare(5)
    (partial / "learner/policy.safetensors").write_bytes(b"half")
    assert store.newest() is None


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for iteration in (1, 2, 3):
        store.commit(store.prepare(iteration), iteration, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002", "000003"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sampler.num_steps=7"], "sampler.num_steps was 6, is 7"),
        (["run.seed=5"], "run.seed was 0, is 5"),
        (["learner.learning_rate=0.5"], "learner.learning_rate was"),
    ],
)
def test_resuming_with_another_configuration_is_refused_with_the_difference(tiny, tmp_path, overrides, words):
    open_run(tiny(f"run.dir={tmp_path / 'run'}"), None)
    with pytest.raises(ResumeError, match=words):
        open_run(tiny(f"run.dir={tmp_path / 'run'}", *overrides), "auto")


def test_resuming_with_more_iterations_or_other_placement_is_allowed(tiny, tmp_path):
    open_run(tiny(f"run.dir={tmp_path / 'run'}"), None)
    longer = tiny(f"run.dir={tmp_path / 'run'}", "run.iterations=7", "rollout.num_workers=3", "checkpoint.every=1")
    assert open_run(longer, "auto")[1] is None


def test_a_folder_that_holds_a_run_is_not_overwritten(tiny, tmp_path):
    folder, _ = open_run(tiny(f"run.dir={tmp_path / 'run'}"), None)
    folder.metrics.write_text('{"iteration": 0}\n')
    with pytest.raises(ResumeError, match="already holds a run"):
        open_run(tiny(f"run.dir={tmp_path / 'run'}"), None)


def test_resuming_from_a_folder_that_is_no_run_is_refused(tiny, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(ResumeError, match="is not a run"):
        open_run(tiny(f"run.dir={tmp_path / 'run'}"), str(tmp_path / "other"))


def test_a_sample_does_not_depend_on_its_chunk(tiny):
    from acpo_dist.data.prompts import sample_prompts

    config = tiny()
    groups = sample_prompts(
        ("a red circle on a white background",), iteration=3, run_seed=0, num_prompts=8, samples_per_prompt=1
    )
    pool = LocalRollouts(config, device="cpu")
    first, again = pool.generate(groups), pool.generate(groups[4:])
    whole = pool.images(first, [g.samples[0].sample_id for g in groups[4:]])
    assert torch.equal(whole, pool.images(again, [g.samples[0].sample_id for g in groups[4:]]))


def test_metrics_lines_are_json_objects_with_their_iteration(tiny, tmp_path):
    root = tmp_path / "run"
    drive(tiny("run.iterations=2", f"run.dir={root}"), open_ports, QUIET)
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert "gain/two_stream" in rows[-1]


def test_a_run_that_ran_out_of_memory_may_go_on_with_checkpointing(tiny, tmp_path):
    root = tmp_path / "run"
    drive(tiny("run.iterations=1", f"run.dir={root}"), open_ports, QUIET)
    thrifty = tiny("run.iterations=2", f"run.dir={root}", "model.memory.gradient_checkpointing=true")
    assert drive(thrifty, open_ports, QUIET, resume="auto").iterations == 2


def test_a_bfloat16_run_that_is_resumed_gives_the_same_weights_bit_for_bit(tiny, tmp_path):
    """Embeddings must not depend on the call that encoded a prompt first: in calibration, or within the update."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["run.iterations=2", "learner.precision=bfloat16", "checkpoint.every=1", "guard.drift_timesteps=0"]
    drive(tiny(*options, f"run.dir={whole}"), open_ports, QUIET)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints/000002")
    drive(tiny(*options, f"run.dir={parts}"), open_ports, QUIET, resume="auto")
    files = [load_file(root / "checkpoints/000002/learner/policy.safetensors") for root in (whole, parts)]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_only_the_network_computes_in_bfloat16(tiny, tmp_path, monkeypatch):
    from acpo_dist.models.text import PromptEmbeddings
    from acpo_dist.workers.reward.worker import RewardWorker

    seen: dict[str, set[bool]] = {}

    def noting(name, wrapped):
        def call(*arguments, **named):
            seen.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))
            return wrapped(*arguments, **named)

        return call

    for owner, name in ((RewardWorker, "value_and_grad"), (PromptEmbeddings, "_make")):
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
    from diffusers import UNet2DConditionModel

    monkeypatch.setattr(UNet2DConditionModel, "forward", noting("network", UNet2DConditionModel.forward))
    config = tiny("run.iterations=1", "learner.precision=bfloat16", f"run.dir={tmp_path / 'run'}")
    drive(config, open_ports, QUIET)
    assert seen["value_and_grad"] == seen["_make"] == {False}
    assert True in seen["network"]


def test_an_anchor_may_train_alone(tiny, tmp_path):
    config = tiny("run.iterations=1", "algorithm.reward_weight=0", f"run.dir={tmp_path / 'run'}")
    drive(config, open_ports, QUIET)
    row, _ = read_metrics(tmp_path / "run/metrics.jsonl")
    assert row["anchor/weight"] > 0 and "reward/quality" not in row
