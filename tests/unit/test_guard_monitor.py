"""The guard in a run: it warns, lowers the reward, stops or rolls back, gives reasons, and survives a restart."""

import json
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
from safetensors.torch import load_file

from acpo_dist.cli.app import main
from acpo_dist.config.load import load_config
from acpo_dist.core.types import Normaliser, RewardTerm, TrainTask
from acpo_dist.data.prompts import load_prompts, sample_prompts
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import JsonlTracker, read_metrics
from acpo_dist.training.context import fixed_groups
from acpo_dist.training.guard.monitor import GuardMonitor
from acpo_dist.training.local import LocalLearner, LocalRewards, LocalRollouts, learner_spec, open_ports
from acpo_dist.training.run import RunResult, drive
from acpo_dist.training.run_folder import open_run, read_run_config
from tests.conftest import TINY
from tests.helpers.runs import PLAIN, copy_run, results

QUIET = Console(quiet=True)
MIDDLES = [125, 375, 625, 875]
"""Middles of four parts of the toy's 1000 timesteps."""
# A rule that any run breaks: eight samples never agree with the calibration's mean exactly.
TRIPWIRE = [
    "guard.warmup=0", "guard.patience=1", "guard.content_shift={warn: 1e-9, stop: 1e-9}", "guard.hacking_gap=null",
    "guard.judge_below_base=null", "guard.judge_fall=null", "guard.drift=null", "checkpoint.every=1",
]  # fmt: skip


def test_a_quiet_guard_is_recorded_at_every_iteration_and_changes_nothing(plain_run, tiny, tmp_path):
    root = tmp_path / "run"
    drive(tiny(*PLAIN, f"run.dir={root}", "guard.action=none"), open_ports, QUIET)
    watched = results(plain_run.run_dir)
    assert read_run_config(plain_run.run_dir).guard.action == "warn" and results(root) == watched
    for row in watched[: plain_run.iterations]:
        assert any(name.startswith("guard/judge_below_base") for name in row)
        assert [name for name in row if name.startswith("drift/at/")] == [f"drift/at/{t}" for t in MIDDLES]


def test_a_broken_rule_stops_the_run_with_exit_code_3_and_the_reason(tiny, tmp_path, monkeypatch, capsys):
    root = tmp_path / "run"
    overrides = [*TINY, *TRIPWIRE, "guard.action=stop", "run.iterations=5", f"run.dir={root}"]
    monkeypatch.setattr(sys, "argv", ["acpo", "train", "toy_sdxl", *overrides, "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 3
    # Libraries that are imported for the first time may write here too; the command itself keeps them apart.
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["iterations"] == 1 and "base standard deviations" in answer["stopped_by_guard"]
    # The folder is complete: checkpoint, images, pipeline, and the reason.
    assert (root / "checkpoints/000001/manifest.json").is_file() and (root / "export/acpo.json").is_file()
    assert json.loads((root / "guard.jsonl").read_text().splitlines()[0])["action"] == "stop"


def test_a_roll_back_exports_the_best_checkpoint_by_the_judges(tiny, tmp_path):
    root = tmp_path / "run"
    result = drive(
        tiny(*TRIPWIRE, "guard.action=roll_back", "run.iterations=5", "checkpoint.keep=1", f"run.dir={root}"),
        open_ports, QUIET,
    )  # fmt: skip
    assert result.guard is not None and result.guard.action == "roll_back" and result.guard.best_iteration == 0
    kept = {path.name for path in (root / "checkpoints").iterdir()}
    assert kept == {"000000", "000001"}, "the best is kept beyond checkpoint.keep"
    # Rolled back to the base: the adapter's second factors are still nothing.
    lora = load_file(next((root / "export").glob("*.safetensors")))
    second = [value for name, value in lora.items() if name.endswith("lora_up.weight")]
    assert second and all(float(value.abs().max()) == 0 for value in second)


def recording(published: list[int]):
    """In-process ports that record the versions loaded by the workers."""

    @contextmanager
    def opened(config, tracker):
        with open_ports(config, tracker) as ports:
            inner = ports.weights

            class Noting:
                def publish(self, version: int) -> str:
                    published.append(version)
                    return inner.publish(version)

            yield replace(ports, weights=Noting())

    return opened


GROSS = "guard.drift_budget=1e-6"


@pytest.fixture(scope="module")
def ended_by(tmp_path_factory):
    """Run until gross drift ends it with an action: its result, and the versions that the workers loaded."""

    @cache
    def run(action: str) -> tuple[RunResult, list[int]]:
        root, published = tmp_path_factory.mktemp(action) / "run", []
        overrides = [*TINY, GROSS, f"guard.action={action}", "run.iterations=5", f"run.dir={root}"]
        return drive(load_config("toy_sdxl", overrides), recording(published), QUIET), published

    return run


@pytest.mark.parametrize(("action", "wanted"), [("roll_back", [0]), ("stop", [0, 1])])
def test_weights_with_gross_drift_are_rolled_back_before_they_are_published(ended_by, action, wanted):
    result, published = ended_by(action)
    assert published == wanted and result.iterations == 1
    assert result.guard is not None and [reason.rule for reason in result.guard.reasons] == ["drift"]


def test_drift_of_the_new_weights_is_measured_by_timestep_in_the_anchors_units(tiny, tmp_path):
    config = tiny(f"run.dir={tmp_path / 'run'}")
    pool = LocalRollouts(config, device="cpu")
    handles = pool.generate(fixed_groups(config, ["a red circle on a white background"], 8, stream="test"))
    ids = tuple(name for handle in handles for name in handle.sample_ids)
    learner = LocalLearner(learner_spec(config), LocalRewards(config, device="cpu"), device="cpu")
    learner.start(None)
    reward = RewardTerm(name="two_stream", weight=1.0, normaliser=Normaliser(mean=0.4, std=0.2, sign=1))
    learner.train(handles, TrainTask(
        iteration=0, policy_version=0, sample_ids=ids, weights=dict.fromkeys(ids, 1.0), anchor_weight=2.0,
        learning_rate=1e-3, rewards=(reward,),
    ))  # fmt: skip
    folder, _ = open_run(config, None)

    def probed(*overrides: str) -> dict[int, float]:
        return GuardMonitor(
            tiny(*overrides), pool, folder, JsonlTracker(folder.metrics), QUIET
        ).probe(learner, handles)  # fmt: skip

    eps, v = (probed(f"algorithm.anchor.space={space}") for space in ("eps", "v"))
    assert list(eps) == MIDDLES and min(eps.values()) > 0
    for timestep, value in eps.items():
        # A velocity is the noise over the signal, sqrt(alpha_bar): objective/anchor.py.
        assert v[timestep] == pytest.approx(value / float(pool.alpha_bars()[timestep]), rel=1e-4)
    assert probed("guard.drift_timesteps=0") == {}


@pytest.mark.parametrize("samples_per_prompt", [1, 4])
def test_a_collapse_shows_as_lost_diversity(tiny, tmp_path, samples_per_prompt):
    config = tiny(f"run.dir={tmp_path / 'run'}", f"rollout.samples_per_prompt={samples_per_prompt}",
                  f"rollout.prompts_per_iteration={8 // samples_per_prompt}", "guard.images=8")  # fmt: skip
    prompts = load_prompts(config.data.prompts, config.data.prompt_column)
    pool = LocalRollouts(config, device="cpu")
    groups = sample_prompts(prompts, iteration=0, run_seed=0, num_prompts=config.rollout.prompts_per_iteration,
                  samples_per_prompt=samples_per_prompt, stream="calibration")  # fmt: skip
    handles = pool.generate(groups)

    class Fallen(LocalRollouts):
        """The same samples, but each image is the first of its prompt, or the first of all."""

        def __init__(self) -> None:
            """Draw nothing."""

        def images(self, handles, sample_ids):
            pairs = [pair for handle in handles for pair in zip(handle.sample_ids, handle.prompts, strict=True)]
            prompt_of = dict(pairs) if samples_per_prompt > 1 else dict.fromkeys(dict(pairs), "")
            first = {}
            for name in sample_ids:
                first.setdefault(prompt_of[name], name)
            return pool.images(handles, [first[prompt_of[name]] for name in sample_ids])

    folder, _ = open_run(config, None)
    monitor = GuardMonitor(config, pool, folder, JsonlTracker(folder.metrics), QUIET)
    monitor.calibrate(handles)
    restored = GuardMonitor(config, Fallen(), folder, JsonlTracker(folder.metrics), QUIET)
    restored.restore(json.loads(json.dumps(monitor.to_mapping())))
    names = [entry.name for entry in (*config.rewards.train, *config.rewards.judges)]
    scores = {name: {"a": 0.0} for name in names}
    normalisers = dict.fromkeys(names, Normaliser(mean=0.0, std=1.0, sign=1))
    found = [
        each.check(0, handles, scores, normalisers, drift_rms=0.0, probe={}).metrics for each in (monitor, restored)
    ]
    assert [metrics["diversity_lost"] for metrics in found] == pytest.approx([0, 1], abs=1e-6)
    assert all("drift" in metrics for metrics in found), "known without a probe, from the update"


def test_a_lowered_reward_halves_its_weight_and_a_restart_remembers_it(tiny, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*TRIPWIRE, "guard.action=lower_reward", "guard.cooldown=50"]
    drive(tiny("run.iterations=2", f"run.dir={whole}", *options), open_ports, QUIET)
    copy_run(whole, parts, newest=1)
    # What a crash after the checkpoint left behind is about to be done again.
    with (parts / "guard.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 1, "action": "stop"}) + "\n")
    drive(tiny("run.iterations=2", f"run.dir={parts}", *options), open_ports, QUIET, resume="auto")
    rows = [read_metrics(root / "metrics.jsonl") for root in (whole, parts)]
    assert [row["guard/reward_scale"] for row in rows[0][:2]] == [0.5, 0.5]
    keep = [key for key in rows[0][1] if not key.startswith(("time/", "idle/")) and "requests" not in key]
    assert {key: rows[0][1][key] for key in keep} == {key: rows[1][1][key] for key in keep}
    assert len((whole / "guard.jsonl").read_text().splitlines()) == 1
    assert (parts / "guard.jsonl").read_text() == (whole / "guard.jsonl").read_text()


def _unet(root) -> bytes:
    return next((root / "export").glob("*.safetensors")).read_bytes()


def test_resuming_a_run_that_the_guard_has_ended_trains_and_exports_nothing_new(ended_by, tiny, tmp_path):
    ended, _ = ended_by("roll_back")
    root = shutil.copytree(ended.run_dir, tmp_path / "run")
    options = [f"run.dir={root}", GROSS, "guard.action=roll_back"]
    before, rows = _unet(root), read_metrics(root / "metrics.jsonl")
    for iterations in (5, 7):
        again = drive(tiny(*options, f"run.iterations={iterations}"), open_ports, QUIET, resume="auto")
        assert again.guard == ended.guard and again.iterations == 1
        assert again.metrics == ended.metrics
    # Interrupted between checkpoint and export: that is made up for, from the same checkpoint.
    shutil.rmtree(root / "export")
    drive(tiny(*options, "run.iterations=5"), open_ports, QUIET, resume="auto")
    assert _unet(root) == before and read_metrics(root / "metrics.jsonl") == rows


def test_an_ended_run_continues_under_another_guard(ended_by, tiny, tmp_path):
    root = shutil.copytree(ended_by("stop")[0].run_dir, tmp_path / "run")
    options = [f"run.dir={root}", GROSS, "run.iterations=2"]
    result = drive(tiny(*options, "guard.action=warn"), open_ports, QUIET, resume="auto")
    assert result.guard is None and result.iterations == 2


def test_a_roll_back_that_was_switched_on_later_exports_the_base_model(tiny, tmp_path):
    root = tmp_path / "run"
    drive(tiny(f"run.dir={root}", "run.iterations=1", "guard.action=warn"), open_ports, QUIET)
    assert not (root / "checkpoints/000000").exists()
    strict = tiny(f"run.dir={root}", "run.iterations=3", "guard.action=roll_back", "guard.drift_budget=1e-6")
    result = drive(strict, open_ports, QUIET, resume="auto")
    assert result.guard is not None and result.guard.best_iteration == 0
    lora = load_file(next((root / "export").glob("*.safetensors")))
    assert all(float(value.abs().max()) == 0 for name, value in lora.items() if name.endswith("lora_up.weight"))
