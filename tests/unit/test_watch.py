"""The guard in a run: it warns, lowers the reward, stops or rolls back, says why, and survives a restart."""

import json
import sys

import pytest
from safetensors.torch import load_file

from acpo_dist.cli.app import main
from acpo_dist.driver import drive
from acpo_dist.local import open_ports
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics

QUIET = Console(quiet=True)
# A rule that any run breaks: eight samples never agree with the calibration's mean exactly.
TRIPWIRE = [
    "guard.warmup=0", "guard.patience=1", "guard.content_shift={warn: 1e-9, stop: 1e-9}", "guard.hacking_gap=null",
    "guard.judge_below_base=null", "guard.judge_fall=null", "guard.drift=null", "checkpoint.every=1",
]  # fmt: skip


def test_a_quiet_guard_is_recorded_at_every_iteration_and_changes_nothing(tiny, tmp_path):
    rows = []
    for action in ("none", "warn"):
        root = tmp_path / action
        drive(tiny("run.iterations=2", f"run.dir={root}", f"guard.action={action}"), open_ports, QUIET)
        rows.append(read_metrics(root / "metrics.jsonl"))
    assert any(key.startswith("guard/judge_below_base") for key in rows[1][0])
    for off, warn in zip(*rows, strict=True):
        assert {k: v for k, v in off.items() if "time" not in k} == {k: v for k, v in warn.items() if "time" not in k}


def test_a_broken_rule_stops_the_run_with_exit_code_3_and_says_why(tiny, tmp_path, monkeypatch, capsys):
    from tests.conftest import TINY

    root = tmp_path / "run"
    overrides = [*TINY, *TRIPWIRE, "guard.action=stop", "run.iterations=5", f"run.dir={root}"]
    monkeypatch.setattr(sys, "argv", ["acpo", "train", "toy_sdxl", *overrides, "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["iterations"] == 1 and "base standard deviations" in answer["stopped_by_guard"]
    # The folder is complete: checkpoint, pictures, pipeline, and the reason.
    assert (root / "checkpoints/000001/manifest.json").is_file() and (root / "export/model_index.json").is_file()
    assert json.loads((root / "guard.jsonl").read_text().splitlines()[0])["action"] == "stop"


def test_a_roll_back_exports_the_checkpoint_that_the_judges_liked_best(tiny, tmp_path):
    root = tmp_path / "run"
    result = drive(
        tiny(*TRIPWIRE, "guard.action=roll_back", "run.iterations=5", "checkpoint.keep=1", f"run.dir={root}"),
        open_ports, QUIET,
    )  # fmt: skip
    assert result.guard is not None and result.guard.action == "roll_back" and result.guard.best_iteration == 0
    kept = {path.name for path in (root / "checkpoints").iterdir()}
    assert kept == {"000000", "000001"}, "the best is kept beyond checkpoint.keep"
    # Rolled back to the base: the adapter's second factors are still nothing.
    lora = load_file(next((root / "export/lora").glob("*.safetensors")))
    second = [value for name, value in lora.items() if name.endswith(("lora_B.weight", "lora.up.weight"))]
    assert second and all(float(value.abs().max()) == 0 for value in second)


def test_a_lowered_reward_halves_its_weight_and_a_restart_remembers_it(tiny, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*TRIPWIRE, "guard.action=lower_reward", "guard.cooldown=50"]
    drive(tiny("run.iterations=3", f"run.dir={whole}", *options), open_ports, QUIET)
    drive(tiny("run.iterations=2", f"run.dir={parts}", *options), open_ports, QUIET)
    # What a crash after the checkpoint left behind is about to be done again.
    with (parts / "guard.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 2, "action": "stop"}) + "\n")
    drive(tiny("run.iterations=3", f"run.dir={parts}", *options), open_ports, QUIET, resume="auto")
    rows = [read_metrics(root / "metrics.jsonl") for root in (whole, parts)]
    assert [row["guard/reward_scale"] for row in rows[0][:3]] == [0.5, 0.5, 0.5]
    keep = [key for key in rows[0][2] if not key.startswith("time/") and "requests" not in key]
    assert {key: rows[0][2][key] for key in keep} == {key: rows[1][2][key] for key in keep}
    assert len((whole / "guard.jsonl").read_text().splitlines()) == 1
    assert (parts / "guard.jsonl").read_text() == (whole / "guard.jsonl").read_text()
