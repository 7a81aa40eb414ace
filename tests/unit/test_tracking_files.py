"""`metrics.jsonl` and the spool: complete lines on disk, also after a crash or on a full disk."""

import json
import math
import os

import pytest
import torch

from acpo_dist.tracking.jsonl import JsonlTracker, read_metrics, truncate_after
from acpo_dist.tracking.spool import Spool

# metrics.jsonl


def test_every_iteration_is_one_line_on_disk_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log_metrics(0, {"drift/rms": 0.5, "sync/version": 1})
    tracker.log_metrics(1, {"drift/rms": torch.tensor(0.25)})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"iteration": 0, "drift/rms": 0.5, "sync/version": 1},
        {"iteration": 1, "drift/rms": 0.25},
    ]
    tracker.close("FINISHED")
    tracker.close("FINISHED")


def test_metrics_that_are_not_finite_become_null_and_are_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    JsonlTracker(path).log_metrics(7, {"loss": math.nan, "grad": -math.inf, "fine": 1.0})
    row = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    assert row == {"iteration": 7, "loss": None, "grad": None, "fine": 1.0}
    assert "iteration 7" in caplog.text and "loss=nan" in caplog.text and "grad=-inf" in caplog.text
    assert "fine=" not in caplog.text


def test_a_torn_last_line_is_left_out_when_reading_and_logged(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0, "a": 1.0}\n{"iteration": 1, "a": 0.')
    assert read_metrics(path) == [{"iteration": 0, "a": 1.0}]
    assert "line 2 is torn" in caplog.text


def test_a_line_written_after_a_torn_one_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n{"iterat')
    JsonlTracker(path).log_metrics(1, {})
    assert path.read_text() == '{"iteration": 0}\n{"iteration": 1}\n'


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}')
    JsonlTracker(path).log_metrics(1, {})
    assert [row["iteration"] for row in read_metrics(path)] == [0, 1]


def test_resuming_forgets_the_resume_point_and_what_follows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"iteration": {i}, "a": 0.1}}\n' for i in range(5)) + '{"iteration": 5, "a"')
    assert truncate_after(path, 3) == 2
    assert path.read_text() == "".join(f'{{"iteration": {i}, "a": 0.1}}\n' for i in range(3))
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert truncate_after(tmp_path / "absent.jsonl", 3) == 0


@pytest.mark.parametrize("last", ["metrics", "close"])
def test_a_line_that_could_not_be_forced_to_disk_is_written_once_the_disk_has_room(tmp_path, monkeypatch, last):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log_metrics(0, {})

    def full(descriptor):
        raise OSError(28, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            tracker.log_metrics(1, {})
        assert [row["iteration"] for row in read_metrics(path)] == [0]
    if last == "metrics":
        tracker.log_metrics(2, {})
    tracker.close("FINISHED")
    assert [row["iteration"] for row in read_metrics(path)] == [0, 1, 2][: 3 if last == "metrics" else 2]


# spool


def test_a_failing_lane_of_the_spool_keeps_its_records_in_order_and_blocks_no_other(tmp_path):
    spool = Spool(tmp_path / "pending.jsonl")
    for number in range(6):
        spool.append({"lane": "odd" if number % 2 else "even", "number": number})
    sent = []

    def send(record):
        if record["number"] == 3:
            raise OSError("down")
        if record["number"] == 0:
            spool.append({"lane": "even", "number": 6})
        sent.append(record["number"])

    errors = spool.drain(send, lambda record: record["lane"])
    assert sent == [0, 1, 2, 4] and [str(error) for error in errors] == ["down"]
    assert [json.loads(line)["number"] for line in spool.path.read_text().splitlines()] == [3, 5, 6]
    assert spool.drain(lambda record: None, lambda record: "all") == []
    assert not spool.path.exists()


def test_a_spool_torn_by_a_crash_keeps_its_whole_records(tmp_path):
    path = tmp_path / "pending.jsonl"
    path.write_text('{"number": 0}\n{"num')
    spool = Spool(path)
    spool.append({"number": 1})
    seen = []
    spool.drain(seen.append, lambda record: "all")
    assert seen == [{"number": 0}, {"number": 1}]
