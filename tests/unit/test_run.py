"""A complete run in one process: its output, and stopping and resuming it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from acpo_dist.core.errors import ResumeError
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.context import fixed_groups
from acpo_dist.training.local import LocalLearner, LocalRewards, LocalRollouts, learner_spec, open_ports
from acpo_dist.training.run import drive
from acpo_dist.training.run_folder import open_run, read_run_config
from acpo_dist.workers.learner.checkpoint import CheckpointStore
from tests.helpers.runs import PLAIN, copy_run, require_drift
from tests.unit.test_skipped_steps import ids_of, task_of

QUIET = Console(quiet=True)


def _metrics(root):
    """Metrics by iteration without durations."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "idle/"))}
        for row in read_metrics(root / "metrics.jsonl")
    ]


@pytest.mark.parametrize("source", ["toy_sdxl", "toy_flow"])
def test_a_run_that_is_stopped_and_resumed_gives_the_same_metrics_and_weights_bit_for_bit(
    request, tiny, tmp_path, source
):
    parts, options, last = tmp_path / "parts", PLAIN, 3
    if source == "toy_sdxl":
        whole = request.getfixturevalue("plain_run").run_dir
    else:
        whole, options, last = tmp_path / "whole", ["run.iterations=2", "checkpoint.every=1"], 2
        drive(tiny(*options, f"run.dir={whole}", source=source), open_ports, QUIET)
    # As a machine leaves it that dies in the last iteration: the checkpoint before it, and rows of later ones.
    copy_run(whole, parts, newest=last - 1)
    (parts / f"samples/{last:06d}.png").unlink()
    drive(tiny(*options, f"run.dir={parts}", source=source), open_ports, QUIET, resume="auto")
    without_requests = [
        [{k: v for k, v in row.items() if "requests" not in k} for row in _metrics(r)] for r in (whole, parts)
    ]
    assert without_requests[0] == without_requests[1]
    checkpoints = [root / f"checkpoints/{last:06d}" for root in (whole, parts)]
    for name in ("policy", "optimizer", "ema"):
        files = [load_file(checkpoint / f"learner/{name}.safetensors") for checkpoint in checkpoints]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    # What later iterations would go on from.
    assert checkpoints[0].joinpath("state.json").read_text() == checkpoints[1].joinpath("state.json").read_text()
    assert (whole / f"samples/{last:06d}.png").read_bytes() == (parts / f"samples/{last:06d}.png").read_bytes()


def test_a_run_writes_its_resolved_configuration_metrics_images_checkpoint_and_lora(plain_run):
    root = plain_run.run_dir
    assert (root / "resolved.yaml").is_file() and plain_run.iterations == 3
    names = {path.name for path in root.iterdir()}
    assert {"resolved.yaml", "metrics.jsonl", "samples", "checkpoints", "curves.png", "export"} <= names
    row, *_, gain = rows = read_metrics(root / "metrics.jsonl")
    assert row["iteration"] == 0 and gain.keys() == {"iteration", "gain/two_stream", "gain/strided_judge"}
    # At the start policy and anchor are the same network, so the drift is exactly nothing.
    assert row["drift/rms"] == 0.0 and row["anchor/uniform"] == 0.0
    require_drift(rows)
    assert {"time/rollout", "time/reward", "time/learn", "time/sync", "time/iteration"} <= row.keys()
    # A LoRA run exports its LoRA and the trajectory, and no copy of the base model.
    exported = {path.name for path in (root / "export").iterdir()}
    assert exported == {f"{read_run_config(root).run.name}.safetensors", "acpo.json", "schedule.json", "sigmas.txt"}


def test_an_anchor_may_train_alone_and_never_moves_the_policy(tiny, tmp_path):
    config = tiny("run.iterations=2", f"run.dir={tmp_path / 'run'}", "algorithm.reward_weight=0")
    drive(config, open_ports, QUIET)
    *rows, gain = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["drift/rms"] for row in rows] == [0.0, 0.0]
    assert all(row["anchor/weight"] > 0 and "reward/quality" not in row for row in rows)
    # The same prompts, seeds and weights as at calibration, whose mean is 0 by definition.
    assert gain["gain/two_stream"] == pytest.approx(0, abs=1e-9)


def test_latent_cut_and_image_cut_take_the_same_step(tiny, tmp_path):
    config = tiny()
    handles = LocalRollouts(config, device="cpu").generate(fixed_groups(config, ["a", "b"], 8, stream="test"))
    weights = {}
    for cut in ("latent", "image"):
        config = tiny(f"rewards.cut={cut}", "rewards.wire_dtype=float32")
        learner = LocalLearner(learner_spec(config), LocalRewards(config, device="cpu"), device="cpu")
        learner.start(None)
        assert learner.train(handles, task_of(ids_of(handles))).optim_steps == 1
        learner.save(tmp_path / cut)
        weights[cut] = load_file(tmp_path / cut / "optimizer.safetensors")
    moments = [name for name in weights["latent"] if name.startswith("exp_avg.") and "lora_B" in name]
    assert any(bool(weights["latent"][name].any()) for name in moments)
    for name in moments:
        # First moments are the gradients: equal up to the order of float32 sums, relative to the largest entry.
        scale = weights["latent"][name].abs().max()
        assert (weights["latent"][name] - weights["image"][name]).abs().max() <= 1e-4 * scale


def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(plain_run, tmp_path, caplog):
    root = copy_run(plain_run.run_dir, tmp_path / "run")
    file = root / "checkpoints/000003/learner/policy.safetensors"
    tensors = load_file(file)
    save_file({name: value + 1 for name, value in tensors.items()}, file)
    newest = CheckpointStore(root / "checkpoints", keep=3).newest()
    assert newest is not None and newest.iteration == 2
    assert "000003 is damaged" in caplog.text


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
        (["sampler.num_steps=7"], r"sampler.num_steps was \d, is 7"),
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


def test_metrics_lines_are_json_objects_with_their_iteration(plain_run):
    rows = [json.loads(line) for line in (plain_run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    assert "gain/two_stream" in rows[-1]


def test_a_run_that_ran_out_of_memory_may_go_on_with_checkpointing(plain_run, tiny, tmp_path):
    root = copy_run(plain_run.run_dir, tmp_path / "run", newest=2)
    thrifty = tiny(*PLAIN, f"run.dir={root}", "model.memory.gradient_checkpointing=true")
    assert drive(thrifty, open_ports, QUIET, resume="auto").iterations == 3


BFLOAT16 = ["run.iterations=2", "learner.precision=bfloat16", "checkpoint.every=1", "guard.drift_timesteps=0"]


@pytest.fixture(scope="module")
def bfloat16_run(tmp_path_factory):
    """A run with `BFLOAT16`, and by function whether it was called under autocast."""
    from diffusers import UNet2DConditionModel

    from acpo_dist.config.load import load_config
    from acpo_dist.models.text import PromptEmbeddings
    from acpo_dist.workers.reward.worker import RewardWorker
    from tests.conftest import TINY

    seen: dict[str, set[bool]] = {}

    def noting(name, wrapped):
        def call(*arguments, **named):
            seen.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))
            return wrapped(*arguments, **named)

        return call

    root = tmp_path_factory.mktemp("bfloat16") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (RewardWorker, "value_and_grad"), (PromptEmbeddings, "_make"), (UNet2DConditionModel, "forward"),
        ):  # fmt: skip
            patch.setattr(owner, name, noting(name, getattr(owner, name)))
        drive(load_config("toy_sdxl", [*TINY, *BFLOAT16, f"run.dir={root}"]), open_ports, QUIET)
    return root, seen


def test_a_bfloat16_run_that_is_resumed_gives_the_same_weights_bit_for_bit(bfloat16_run, tiny, tmp_path):
    """Embeddings must not depend on the call that encoded a prompt first: in calibration, or within the update."""
    whole, _ = bfloat16_run
    parts = copy_run(whole, tmp_path / "parts", newest=1)
    drive(tiny(*BFLOAT16, f"run.dir={parts}"), open_ports, QUIET, resume="auto")
    files = [load_file(root / "checkpoints/000002/learner/policy.safetensors") for root in (whole, parts)]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_only_the_network_computes_in_bfloat16(bfloat16_run):
    _, seen = bfloat16_run
    assert seen["value_and_grad"] == seen["_make"] == {False}
    assert True in seen["forward"]


def test_without_timesteps_no_drift_is_probed(bfloat16_run):
    row = read_metrics(bfloat16_run[0] / "metrics.jsonl")[0]
    assert not [key for key in row if key.startswith("drift/at/")] and "guard/drift" in row
