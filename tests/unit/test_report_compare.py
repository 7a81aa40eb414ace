"""Comparisons of runs: parameters that differ, means over seeds, the Pareto front; from folders and from MLflow."""

import json
import os
import random
import shutil
import statistics
import sys
from html import unescape

import pytest

from acpo_dist.analysis.report.compare import differences, labels_of, pareto_front, seed_groups
from acpo_dist.analysis.report.find import gather, runs_below, runs_of_experiment
from acpo_dist.analysis.report.metrics import metrics_of
from acpo_dist.analysis.report.record import read_run
from acpo_dist.cli.app import main
from acpo_dist.core.errors import UsageError
from acpo_dist.tracking.mlflow_query import attach
from acpo_dist.tracking.mlflow_tracker import MlflowTracker
from tests.helpers.runs import make_run, row

ROWS = [row(i, reward=0.6, judge=0.5, drift=0.1) for i in range(2)]


@pytest.fixture
def four(tmp_path):
    """Three seeds of one experiment, and one with another learning rate."""
    for seed, gain in enumerate((0.1, 0.2, 0.6)):
        make_run(tmp_path / f"a{seed}", ROWS, f"run.seed={seed}", gains={"two_stream": gain, "strided_judge": gain})
    make_run(tmp_path / "b", ROWS, "learner.learning_rate=0.5", gains={"two_stream": 1.0, "strided_judge": 0.4})
    return tmp_path


def run_cli(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["acpo", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0), *capsys.readouterr()
    return 0, *capsys.readouterr()


def test_runs_that_differ_only_in_their_seed_share_a_mean_and_a_spread(four):
    records, problems = runs_below(four)
    metrics = [metrics_of(record) for record in records]
    groups = seed_groups(records, metrics, labels_of(records))
    assert problems == [] and [group.seeds for group in groups] == [(0, 1, 2), (0,)]
    spread = groups[0].gains["two_stream"]
    assert spread.mean == pytest.approx(0.3) and spread.std == pytest.approx(statistics.stdev([0.1, 0.2, 0.6]))
    assert groups[1].gains["two_stream"].std is None


def test_runs_that_are_not_finished_and_seeds_that_are_there_twice_stay_out_of_the_means(four, monkeypatch, capsys):
    make_run(four / "crashed", ROWS, "run.seed=3", checkpoint=2)
    again = {"two_stream": 0.4, "strided_judge": 0.4}
    make_run(four / "a1again", ROWS, "run.seed=1", gains=again)
    os.utime(four / "a1" / "metrics.jsonl", (1, 1))
    code, out, _ = run_cli(monkeypatch, capsys, "compare", four, "--json")
    group = json.loads(out)["seed_groups"][0]
    assert code == 0 and len(group["members"]) == 5 and group["seeds"] == [0, 1, 2]
    assert group["left_out"] == "1 not finished, 1 with a duplicate seed"
    # Of the two runs of seed 1 the newer one counts.
    assert group["quality"]["mean"] == pytest.approx(statistics.fmean([0.1, 0.4, 0.6]))
    assert group["quality"]["std"] == pytest.approx(statistics.stdev([0.1, 0.4, 0.6]))
    code, out, _ = run_cli(monkeypatch, capsys, "compare", four)
    assert "1 not finished, 1 with a duplicate seed" in out
    shutil.rmtree(four / "a1")
    code, out, _ = run_cli(monkeypatch, capsys, "compare", four / "crashed", four / "a0", "--json")
    (group,) = json.loads(out)["seed_groups"]
    assert group["seeds"] == [0] and group["quality"] == {"mean": pytest.approx(0.1), "std": None}


def test_differences_name_the_key_and_every_value_but_not_where_a_run_lies(four):
    found = differences(runs_below(four)[0])
    assert found["learner.learning_rate"] == ["0.004", "0.004", "0.004", "0.5"]
    assert found["run.seed"] == ["0", "1", "2", "0"]
    assert set(found) == {"learner.learning_rate", "run.seed"}


def test_labels_are_as_long_as_they_must_be_to_differ(four, tmp_path):
    labels = labels_of(runs_below(four)[0])
    assert labels == ["toy-sdxl seed 0 (a0)", "toy-sdxl seed 1", "toy-sdxl seed 2", "toy-sdxl seed 0 (b)"]
    assert labels_of(runs_below(four)[0][:1]) == ["toy-sdxl"]


def test_the_front_agrees_with_brute_force():
    draw = random.Random(0)
    points = [(draw.randrange(6) / 5, draw.randrange(6) / 5) for _ in range(40)]
    beaten = {
        i for i, (x, y) in enumerate(points) for u, v in points if (u < x and v >= y) or (u <= x and v > y)
    }  # fmt: skip
    assert pareto_front(points) == [i for i in range(40) if i not in beaten]


def test_compare_answers_in_json_and_writes_a_page(four, monkeypatch, capsys):
    code, out, _ = run_cli(monkeypatch, capsys, "compare", four, "--json")
    answer = json.loads(out)
    assert code == 0 and len(answer["runs"]) == 4
    # All have the same drift, so only the run with the best judge is on the front.
    assert answer["pareto_front"] == ["toy-sdxl seed 2"]
    code, out, _ = run_cli(monkeypatch, capsys, "compare", four, "--out", four / "p.html")
    assert code == 0 and "learner.learning_rate" in out and "toy-sdxl seed 2" in out
    page = (four / "p.html").read_text()
    assert "Parameters that differ" in page and "toy-sdxl seed 2" in page and "mean ± std of 3 seeds" in unescape(page)


def test_runs_lists_what_can_be_read_and_names_what_cannot(four, monkeypatch, capsys):
    (four / "broken").mkdir()
    (four / "broken" / "resolved.yaml").write_text("a: [")
    code, out, err = run_cli(monkeypatch, capsys, "runs", four, "--json")
    answer = json.loads(out)
    assert code == 0 and len(answer["runs"]) == 4 and "broken" in answer["left_out"][0] and "left out" in err
    code, out, _ = run_cli(monkeypatch, capsys, "runs", four)
    assert code == 0 and all(str(four / name) in out for name in ("a0", "a1", "a2", "b"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs", "nowhere"], "no folder nowhere"),
        (["runs", "."], "no run in ."),
        (["compare"], "--experiment"),
        (["compare", "nowhere"], "nowhere is not a run"),
        (["compare", "nowhere", "--out", "x.pdf"], "must end in .html"),
        (["report", "nowhere"], "nowhere is not a run"),
        (["follow", "nowhere"], "nowhere is not a run"),
        (["runs", "--experiment", "e", "--uri", "http://127.0.0.1:9"], "cannot be used"),
        (["runs", "--experiment", "e", "--uri", "sqlite:///none.db"], "none.db does not exist"),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_the_reason(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(monkeypatch, capsys, *arguments)
    assert code == 2 and words in err and out == ""


def test_mlflows_own_copies_of_configurations_are_no_runs(four):
    copy = four / "mlartifacts" / "0" / "config"
    copy.mkdir(parents=True)
    shutil.copy(four / "b" / "resolved.yaml", copy / "resolved.yaml")
    assert len(runs_below(four)[0]) == 4 and len(gather([four], None, None)) == 4


def test_an_experiment_is_read_from_mlflow_alone_when_the_folders_are_gone(tmp_path):
    root = make_run(tmp_path / "run", ROWS, "run.name=tracked", gains={"two_stream": 0.5, "strided_judge": 0.25})
    record, uri = read_run(root), f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = MlflowTracker(
        uri, "e", "tracked", spool=root / "mlflow", params=record.config, tags={"run_dir": str(root)}
    )
    for line in (root / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        tracker.log_metrics(metrics.pop("iteration"), metrics)
    tracker.close("FINISHED")
    (here,) = runs_of_experiment("e", uri)
    assert here.root == root
    shutil.move(root, tmp_path / "gone")
    (there,) = runs_of_experiment("e", uri)
    assert there.root is None and there.done == 2 and there.state == "finished"
    wanted = metrics_of(read_run(tmp_path / "gone"))
    found = metrics_of(there)
    assert (found.gains, found.drift, found.seed, found.budget) == (
        wanted.gains,
        wanted.drift,
        wanted.seed,
        wanted.budget,
    )
    assert found.guard == wanted.guard and found.roles == wanted.roles
    page = tmp_path / "report.html"
    page.write_text("x")
    attach(
        uri,
        there.mlflow_run_id,
        page,
        folder="report",
        metrics={"report/diversity": 0.5},
        step=2,
        tags={"verdict": "v"},
    )
    assert metrics_of(runs_of_experiment("e", uri)[0]).diversity == 0.5
    with pytest.raises(UsageError, match=r"no experiment `other`.*found: .*e"):
        runs_of_experiment("other", uri)
