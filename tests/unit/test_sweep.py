"""A sweep trains every combination once, continues, and marks the front of quality against drift."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from acpo_dist.analysis.sweep.combinations import combinations, configurations, split_values
from acpo_dist.analysis.sweep.sweep import run_sweep
from acpo_dist.cli.app import main
from acpo_dist.core.errors import ConfigError, ModelError, ResumeError, UsageError
from tests.conftest import TINY
from tests.helpers.runs import make_run, row

WEIGHT = "algorithm.anchor.weight=1,2,3"


def grid(root, *axes, arms=(), seeds=(0, 1)):
    return configurations("toy_sdxl", combinations(axes, arms), seeds, root, ["run.iterations=2"])


def trainer(quality, started):
    """Return a function that writes the run folder of a configuration as training would, without training."""

    def train(config):
        started.append(config.run_dir)
        gain, drift = quality(config)
        rows = [row(index, reward=0.5, judge=0.5, drift=drift) for index in range(2)]
        make_run(config.run_dir, rows, gains={"two_stream": gain, "strided_judge": gain})
        (config.run_dir / "resolved.yaml").write_text(yaml.safe_dump(config.to_mapping()))

    return train


def by_weight(config):
    """The middle weight is dominated: less quality and more drift than the first."""
    return {1: (1.0, 0.2), 2: (0.5, 0.3), 3: (0.2, 0.1)}[config.algorithm.anchor.weight]


def test_values_are_split_at_commas_outside_brackets_and_quotes():
    assert split_values("0.1,[1,2],{a: 1, b: 2},'x,y'") == ["0.1", "[1,2]", "{a: 1, b: 2}", "'x,y'"]


def test_every_combination_of_values_and_arms_is_made_once():
    found = combinations(
        [WEIGHT, "learner.learning_rate=1e-4,1e-3", "run.iterations=2"], ["late=", "all=sampler.t_max=1"]
    )
    assert len(found) == 12 and len({each.name for each in found}) == 12
    assert found[1].name == "weight=1,learning_rate=1e-4,all"
    assert found[1].overrides[-2:] == ("run.iterations=2", "sampler.t_max=1")


def test_keys_that_end_alike_are_named_in_full():
    names = [each.name for each in combinations(["algorithm.anchor.weight=1,2", "rewards.train.0.weight=1,2"])]
    assert names[0] == "algorithm.anchor.weight=1,rewards.train.0.weight=1"


@pytest.mark.parametrize(
    "axes", [["algorithm.anchor.weight"], ["a.b=1,,2"], ["a.b=1,1"], ["a.b=1", "a.b=2"], ["=1"]]
)  # fmt: skip
def test_an_axis_of_another_form_is_refused(axes):
    with pytest.raises(UsageError):
        combinations(axes)


def test_an_invalid_combination_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match="weight"):
        grid(tmp_path, "algorithm.anchor.weight=1,many")
    assert not list(tmp_path.iterdir())


def test_the_front_holds_the_combinations_that_no_other_dominates(tmp_path):
    result = run_sweep(grid(tmp_path, WEIGHT), tmp_path, trainer(by_weight, []), lambda text: None)
    assert [group.label for group in result.groups] == ["weight=1", "weight=2", "weight=3"]
    assert [group.seeds for group in result.groups] == [(0, 1)] * 3
    assert list(result.front) == [0, 2]
    assert [cells[0] for cells in result.table[1]] == ["*", "", "*"]
    assert result.chart is not None and result.chart.read_bytes()[1:4] == b"PNG"
    assert result.page is not None and "weight=2" in result.page.read_text()


def test_a_sweep_that_is_started_again_trains_only_what_is_missing(tmp_path):
    first, second = [], []
    run_sweep(grid(tmp_path, WEIGHT, seeds=(0,)), tmp_path, trainer(by_weight, first), lambda text: None)
    run_sweep(grid(tmp_path, WEIGHT, seeds=(0, 1)), tmp_path, trainer(by_weight, second), lambda text: None)
    assert len(first) == 3 and sorted(path.name for path in second) == ["seed-1"] * 3


def test_a_failed_run_is_reported_and_the_others_are_trained(tmp_path):
    def quality(config):
        if config.algorithm.anchor.weight == 2:
            raise ModelError("no weights")
        return by_weight(config)

    result = run_sweep(grid(tmp_path, WEIGHT, seeds=(0,)), tmp_path, trainer(quality, []), lambda text: None)
    assert list(result.failed) == [str(tmp_path / "weight=2/seed-0")]
    assert "no weights" in result.failed[str(tmp_path / "weight=2/seed-0")]
    assert [group.label for group in result.groups] == ["weight=1", "weight=3"]


def test_a_folder_with_runs_of_another_configuration_is_refused(tmp_path):
    run_sweep(grid(tmp_path, WEIGHT), tmp_path, trainer(by_weight, []), lambda text: None)
    with pytest.raises(ResumeError, match="algorithm"):
        run_sweep(
            grid(tmp_path, WEIGHT, "algorithm.reward_weight=0.5"), tmp_path, trainer(by_weight, []), lambda text: None
        )  # fmt: skip


def acpo(monkeypatch, capsys, *arguments):
    """Exit code and JSON object of `acpo sweep ARGUMENTS --json`."""
    monkeypatch.setattr(sys, "argv", ["acpo", "sweep", "toy_sdxl", *arguments, "--json"])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, json.loads(capsys.readouterr().out)


def test_the_command_trains_every_arm_and_gives_one_json_object(monkeypatch, capsys, tmp_path):
    arms = ("--arm", "anchored=", "--arm", "free=algorithm.anchor.weight=0 algorithm.anchor.budget=null")
    code, found = acpo(monkeypatch, capsys, *TINY, "run.iterations=1", *arms, "--out", str(tmp_path))
    assert code == 0 and found["failed"] == {}
    assert [each["label"] for each in found["combinations"]] == ["anchored", "free"]
    assert all(each["quality"] is not None for each in found["combinations"])
    assert (tmp_path / "free/seed-0/resolved.yaml").is_file() and (tmp_path / "front.png").is_file()


@pytest.mark.parametrize("seeds", [("0", "2"), ("0,2",)])
def test_seeds_are_given_with_spaces_or_commas(seeds, monkeypatch, capsys, tmp_path):
    arguments = ("algorithm.reward_weight=1,2", "--seeds", *seeds, "--dry-run", "--out", str(tmp_path))
    code, found = acpo(monkeypatch, capsys, *arguments)
    assert code == 0 and len(found["runs"]) == 4 and found["runs"][1].endswith("reward_weight=1/seed-2")
    assert not list(tmp_path.iterdir())


PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
DOCUMENTED = [
    command.replace("\\\n", " ")
    for page in PAGES
    for command in re.findall(r"^acpo sweep (?:.*\\\n)*.*", page.read_text(encoding="utf-8"), flags=re.M)
]


@pytest.mark.parametrize("command", DOCUMENTED)
def test_a_documented_sweep_has_valid_combinations(command, done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10_train.parquet").touch()
    assert " runs: " in done(*shlex.split(command)[1:], *(() if "--dry-run" in command else ("--dry-run",)))


def test_the_pages_document_sweeps():
    assert len(DOCUMENTED) > 3
