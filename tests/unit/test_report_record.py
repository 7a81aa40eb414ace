"""Run folders are read unchanged: gains in base units; broken or missing parts are reported."""

import json
import os

import pytest

from acpo_dist.analysis.report.metrics import metrics_of, verdict
from acpo_dist.analysis.report.record import read_run, require_rows
from acpo_dist.analysis.report.sample_renderer import chosen_iteration
from acpo_dist.config.load import load_config
from acpo_dist.core.errors import UsageError
from acpo_dist.evaluation.suites.subject import find_checkpoint
from acpo_dist.training.run_lock import LOCK_FILE, held
from acpo_dist.workers.learner.checkpoint import CheckpointStore
from tests.helpers.runs import make_run, row

RISING = [row(i, reward=0.5 + 0.1 * i, judge=0.4 + 0.02 * i, drift=0.1 + 0.01 * i) for i in range(4)]


def old(root, seconds=10_000):
    """Set an old modification time."""
    path = root / "metrics.jsonl"
    os.utime(path, (path.stat().st_mtime - seconds,) * 2)
    return root


def test_gains_are_the_means_in_standard_deviations_of_base_samples(tmp_path):
    record = read_run(make_run(tmp_path / "run", RISING, checkpoint=4))
    # (0.8 - 0.5) / 0.2 and (0.46 - 0.4) / 0.1, by hand.
    assert record.gain_of("reward", "two_stream", record.rows[3]) == pytest.approx(1.5)
    assert record.gain_of("judge", "strided_judge", record.rows[3]) == pytest.approx(0.6)
    assert record.mean_gain(record.rows[3], "judge") == pytest.approx(0.6)


def test_a_gain_that_the_run_recorded_itself_needs_no_checkpoint(tmp_path):
    rows = [row(0, reward=9.0, judge=9.0, drift=0.0, **{"reward/two_stream/gain": 0.25})]
    record = read_run(make_run(tmp_path / "run", rows))
    assert record.gain_of("reward", "two_stream", record.rows[0]) == 0.25
    assert record.gain_of("judge", "strided_judge", record.rows[0]) is None


def test_a_finished_run_shows_its_final_gains_and_an_unfinished_one_the_mean_of_its_last_iterations(tmp_path):
    gains = {"two_stream": 0.7, "strided_judge": 0.3}
    done = metrics_of(read_run(make_run(tmp_path / "done", RISING, gains=gains, checkpoint=4)))
    assert done.final and done.gains == gains and done.quality == 0.3 and done.state == "finished"
    cut = metrics_of(read_run(old(make_run(tmp_path / "cut", RISING, "run.iterations=9", checkpoint=4))))
    assert not cut.final and cut.state == "unfinished" and cut.total == 9
    assert cut.gains["two_stream"] == pytest.approx(0.75), "gains 0, 0.5, 1 and 1.5"
    assert cut.seconds == 8.0 and cut.drift == pytest.approx(0.115)


def test_a_run_is_running_while_it_is_driven_and_unfinished_from_then_on(tmp_path):
    root = make_run(tmp_path / "run", RISING, "run.iterations=9")
    with held(root):
        assert read_run(root).state == "running"
        here = (root / LOCK_FILE).read_text()
    assert read_run(root).state == "unfinished"
    # Of a driver on another machine only what it wrote last can be seen.
    (root / LOCK_FILE).write_text(json.dumps(json.loads(here) | {"place": "another machine"}))
    assert read_run(root).state == "running" and read_run(old(root)).state == "unfinished"
    # A clock that was set back, or another one's, puts the time of the last line into the future.
    assert read_run(old(root, -20_000)).state == "unfinished"


def test_the_best_checkpoint_is_the_guards_best_in_the_newest_checkpoint(tmp_path):
    rows = [row(i, reward=0.5, judge=0.5, drift=0.1, **{"guard/best_iteration": 2.0}) for i in range(4)]
    root = make_run(tmp_path / "run", rows)
    store = CheckpointStore(root / "checkpoints", keep=9)
    # The line of iteration 3 was written before its checkpoint was saved, and found to be better than that of 2.
    for iteration, best in ((2, 2), (3, 3), (4, 3)):
        state = {"normalisers": {}, "guard": {"state": {"best": [best, 0.1]}}}
        store.commit(store.prepare(iteration), iteration, state)
    found = find_checkpoint(root, load_config("toy_sdxl", [f"run.dir={root}"]), "best")
    assert chosen_iteration(read_run(root), "best") == found.iteration == 3
    state["guard"]["state"]["best"] = [0, 0.0]
    store.commit(store.prepare(4), 4, state)
    with pytest.raises(UsageError, match="no checkpoint scored higher than the base model"):
        chosen_iteration(read_run(root), "best")
    assert chosen_iteration(read_run(root), "export") == 4


def test_broken_lines_are_counted_and_left_out(tmp_path, caplog):
    root = make_run(tmp_path / "run", RISING)
    with (root / "metrics.jsonl").open("a") as file:
        file.write('not json\n[1, 2]\n{"iteration": 4, "rew')
    record = read_run(root)
    assert record.broken_lines == 3 and record.done == 4
    assert "line 5 is not a JSON object" in caplog.text


def test_a_value_that_was_not_finite_is_a_gap_and_never_a_number(tmp_path):
    rows = [row(0, reward=0.5, judge=0.4, drift=0.1), row(1, reward=0.5, judge=0.4, drift=0.1, **{"drift/rms": None})]
    record = read_run(make_run(tmp_path / "run", rows, checkpoint=2))
    assert record.rows[1]["drift/rms"] is None and record.recent("drift/rms") == 0.1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "found no such folder"),
        (lambda path: path.mkdir(), "found a folder without it"),
        (lambda path: (path.mkdir(), (path / "resolved.yaml").write_text("a: [")), "cannot be read as YAML"),
        (lambda path: (path.mkdir(), (path / "resolved.yaml").write_text("- a")), "expected sections, found list"),
    ],
)
def test_what_is_no_run_is_refused_with_what_was_found(tmp_path, make, words):
    make(tmp_path / "x")
    with pytest.raises(UsageError, match=words):
        read_run(tmp_path / "x")


def test_a_run_without_metrics_is_listed_but_not_reported(tmp_path):
    record = read_run(make_run(tmp_path / "run", [], "run.iterations=3"))
    assert record.state == "no metrics" and metrics_of(record).gains == {}
    with pytest.raises(UsageError, match="has no metrics"):
        require_rows(record)


def test_a_guard_that_ended_the_run_is_named_with_its_reason(tmp_path):
    event = {"iteration": 3, "action": "stop", "raised": ["drift"], "reasons": [{"rule": "drift", "value": 1.4}]}
    metrics = metrics_of(read_run(make_run(tmp_path / "run", RISING, "run.iterations=9", guard=[event], checkpoint=4)))
    assert metrics.state == "stopped by guard" and metrics.guard.text == "stopped at iteration 4 by drift"
    assert verdict(metrics)[0] == "bad"


def test_a_stop_that_a_resumed_run_went_on_from_is_history(tmp_path):
    event = {"iteration": 1, "action": "stop", "raised": ["drift"], "reasons": []}
    record = read_run(make_run(tmp_path / "run", RISING, guard=[event], gains={"two_stream": 0.1}))
    assert record.state == "finished"


@pytest.mark.parametrize(
    ("judge", "drift", "share", "tone"),
    [(0.3, 0.1, 0.3, "good"), (0.3, 0.4, 0.3, "caution"), (0.3, 0.1, 0.9, "caution"), (0.3, 0.1, 1.1, "bad"),
     (-0.2, 0.1, 0.3, "bad")],
)  # fmt: skip
def test_the_verdict_follows_judges_drift_and_guard(tmp_path, judge, drift, share, tone):
    rows = [row(0, reward=0.6, judge=0.4, drift=drift, **{"guard/drift": share, "drift/budget": 0.3})]
    gains = {"two_stream": 0.5, "strided_judge": judge}
    metrics = metrics_of(read_run(make_run(tmp_path / "run", rows, gains=gains)))
    found, sentence = verdict(metrics)
    assert found == tone
    assert f"strided_judge {judge:+.2f}" in sentence and f"rms drift {drift:.3g} of a budget of 0.3" in sentence
