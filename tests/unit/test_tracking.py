"""The MLflow tracker: no record is lost, and training never waits; several trackers are independent."""

import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import threading

import pytest
from PIL import Image

from acpo_dist.tracking import mlflow_tracker
from acpo_dist.tracking.composite import CompositeTracker
from acpo_dist.tracking.jsonl import JsonlTracker, read_metrics
from acpo_dist.tracking.mlflow_records import flatten, legal_name
from acpo_dist.tracking.mlflow_run import RunFacts, make_sqlite, open_run, shown_uri, sqlite_file
from acpo_dist.tracking.mlflow_tracker import MlflowTracker, default_uri

NOWHERE = "http://127.0.0.1:9"


class Heard(logging.Handler):
    """Lets a test wait for a log message instead of sleeping."""

    def __init__(self, part):
        super().__init__(logging.INFO)
        self.part, self.event = part, threading.Event()

    def emit(self, record):
        if self.part in record.getMessage():
            self.event.set()

    def __enter__(self):
        logger = logging.getLogger("acpo_dist")
        self.level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return self

    def __exit__(self, *_):
        logger = logging.getLogger("acpo_dist")
        logger.removeHandler(self)
        logger.setLevel(self.level)

    def wait(self):
        assert self.event.wait(15), f"nobody logged {self.part!r}"


@pytest.fixture(autouse=True)
def _no_ambient_mlflow(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """MLflow takes seconds to create a database, so it is created once and copied."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("template") / "new" / "mlflow.db"
    make_sqlite(f"sqlite:///{path}", MlflowClient)
    assert [child.name for child in path.parent.iterdir()] == ["mlflow.db"]
    return path


@pytest.fixture
def run_dir(tmp_path, empty_database):
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    return folder / "one"


def start(run_dir, *, uri=None, params=None, **changes):
    facts = {"params": params or {"run": {"seed": 3}}, "tags": {"git": "abc"}} | changes
    return MlflowTracker(uri or default_uri(run_dir), "acpo", "one", spool=run_dir / "mlflow", **facts)


def client_of(run_dir):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=default_uri(run_dir))


def history(run_dir, run_id, key):
    return [(metric.step, metric.value) for metric in client_of(run_dir).get_metric_history(run_id, key)]


def waiting(run_dir):
    path = run_dir / "mlflow" / "pending.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# MLflow


def test_a_run_can_be_read_back_from_mlflow(run_dir, tmp_path):
    image = tmp_path / "grid-000001.png"
    Image.new("RGB", (4, 4)).save(image)
    tracker = start(run_dir, params={"run": {"seed": 3, "note": "x" * 900}, "rewards": [{"type": "toy"}]})
    tracker.log_text("resolved.yaml", "run: {}\n")
    for iteration in range(3):
        tracker.log_metrics(iteration, {"drift/rms": iteration / 4, "reward/a b(c)/mean": 1.0})
    tracker.log_metrics(3, {"drift/rms": math.nan})
    tracker.log_image("grid", 1, image)
    tracker.set_tags({"checkpoint": "runs/one/checkpoints/3", "gpus": 2})
    tracker.close("FINISHED")
    tracker.close("FAILED")

    client = client_of(run_dir)
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "one")
    assert run.data.params == {"run.seed": "3", "run.note": "x" * 500, "rewards.0.type": "toy"}
    assert {"git": "abc", "checkpoint": "runs/one/checkpoints/3", "gpus": "2"}.items() <= run.data.tags.items()
    steps = history(run_dir, tracker.run_id, "drift/rms")
    assert steps[:3] == [(0, 0.0), (1, 0.25), (2, 0.5)] and math.isnan(steps[3][1])
    assert run.data.metrics["reward/a b_c_/mean"] == 1.0
    artifacts = run_dir.parent / "mlartifacts" / tracker.run_id / "artifacts"
    assert (artifacts / "config" / "resolved.yaml").read_text() == "run: {}\n"
    assert (artifacts / "samples" / "grid-000001.png").read_bytes() == image.read_bytes()
    assert waiting(run_dir) == []


def test_a_restart_continues_the_same_mlflow_run(run_dir):
    first = start(run_dir)
    first.log_metrics(0, {"a": 1.0})
    first.close("KILLED")
    second = start(run_dir, params={"run": {"seed": 4, "iterations": 9}})
    assert second.run_id == first.run_id
    second.log_metrics(1, {"a": 2.0})
    second.close("FINISHED")
    client = client_of(run_dir)
    found = client.search_runs([client.get_experiment_by_name("acpo").experiment_id])
    assert [run.info.run_id for run in found] == [first.run_id]
    assert found[0].info.status == "FINISHED"
    assert found[0].data.params == {"run.seed": "3", "run.iterations": "9"}
    assert history(run_dir, first.run_id, "a") == [(0, 1.0), (1, 2.0)]


def test_a_run_that_was_deleted_in_mlflow_is_replaced_by_a_new_one(run_dir, caplog):
    first = start(run_dir)
    first.close("FINISHED")
    client_of(run_dir).delete_run(first.run_id)
    second = start(run_dir)
    second.log_metrics(0, {"a": 1.0})
    second.close("FINISHED")
    assert second.run_id != first.run_id
    assert (run_dir / "mlflow" / "run_id").read_text() == second.run_id
    assert f"MLflow run {first.run_id} no longer exists" in caplog.text


def test_an_experiment_that_another_process_makes_in_the_same_moment_is_shared(run_dir):
    from mlflow.tracking import MlflowClient

    class Overtaken(MlflowClient):
        asked = 0

        def get_experiment_by_name(self, name):
            self.asked += 1
            return None if self.asked == 1 else super().get_experiment_by_name(name)

    uri = default_uri(run_dir)
    other = client_of(run_dir).create_experiment("acpo")
    client = Overtaken(tracking_uri=uri)
    run = open_run(client, RunFacts(uri=uri, experiment="acpo", run_name="one", params={}, tags={}), "")
    assert (run.info.experiment_id, client.asked) == (other, 2)


def test_a_database_appears_complete_or_not_at_all_and_the_first_of_two_makers_wins(tmp_path):
    target = tmp_path / "mlflow.db"

    def killed(tracking_uri):
        sqlite_file(tracking_uri).write_text("half")
        raise KeyboardInterrupt

    def overtaken(tracking_uri):
        sqlite_file(tracking_uri).write_text("mine")
        target.write_text("theirs")

    with pytest.raises(KeyboardInterrupt):
        make_sqlite(f"sqlite:///{target}", killed)
    assert list(tmp_path.iterdir()) == []
    make_sqlite(f"sqlite:///{target}", overtaken)
    assert target.read_text() == "theirs" and list(tmp_path.iterdir()) == [target]


STARTING_RUN = """
import sys
from pathlib import Path
from acpo_dist.tracking import mlflow_tracker
mlflow_tracker.CLOSE_TIMEOUT_S = 600.0
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
tracker = mlflow_tracker.MlflowTracker(
    mlflow_tracker.default_uri(folder), "acpo", folder.name, spool=folder / "mlflow", params={}, tags={})
tracker.log_metrics(0, {"a": 1.0})
tracker.close("FINISHED")
"""


def test_several_runs_that_start_at_once_make_one_database_and_each_finds_its_run(tmp_path):
    names = ["one", "two"]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", STARTING_RUN, str(tmp_path / name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for name in names
    ]  # fmt: skip
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 2
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    errors = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    client = client_of(tmp_path / "one")
    (experiment,) = [one for one in client.search_experiments() if one.name == "acpo"]
    found = client.search_runs([experiment.experiment_id])
    assert sorted((run.info.run_name, run.info.status, run.data.metrics["a"]) for run in found) == [
        (name, "FINISHED", 1.0) for name in names
    ]
    assert [waiting(tmp_path / name) for name in names] == [[], []]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", *names]


def test_an_unreachable_server_is_named_once_and_its_records_wait_on_disk(run_dir, caplog):
    with Heard("cannot be used") as heard:
        tracker = start(run_dir, uri=NOWHERE)
        heard.wait()
    for iteration in range(20):
        tracker.log_metrics(iteration, {"a": math.inf})
    tracker.log_text("resolved.yaml", "x")
    tracker.set_tags({"a": 1})
    tracker.close("FINISHED")
    assert caplog.text.count("cannot be used") == 1 and caplog.text.count("22 records are pending") == 1
    assert [record.get("iteration") for record in waiting(run_dir)] == [*range(20), None, None]
    assert (tracker.uri, tracker.run_id) == (NOWHERE, None)

    later = start(run_dir)
    later.close("FINISHED")
    assert history(run_dir, later.run_id, "a")[19][0] == 19
    assert waiting(run_dir) == []


def test_what_waited_is_sent_as_soon_as_the_store_can_be_used_again(tmp_path, empty_database):
    run_dir, store, ready = tmp_path / "runs" / "one", tmp_path / "store", tmp_path / "ready"
    (tmp_path / "file").touch()
    store.symlink_to(tmp_path / "file")  # a file where the folder should be
    ready.mkdir()
    shutil.copy(empty_database, ready / "mlflow.db")
    (tmp_path / "link").symlink_to(ready)
    with Heard("cannot be used") as down, Heard("has accepted all") as up:
        tracker = start(run_dir, uri=f"sqlite:///{store}/mlflow.db")
        tracker.log_metrics(0, {"a": 1.0})
        down.wait()
        os.replace(tmp_path / "link", store)
        tracker.log_metrics(1, {"a": 2.0})
        up.wait()
    assert history(store / "x", tracker.run_id, "a")[0] == (0, 1.0)
    tracker.close("FINISHED")
    assert history(store / "x", tracker.run_id, "a") == [(0, 1.0), (1, 2.0)]
    assert waiting(run_dir) == []


def test_closing_waits_for_a_silent_server_only_so_long(run_dir, monkeypatch, caplog):
    monkeypatch.setattr(mlflow_tracker, "CLOSE_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = start(run_dir, uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracker.log_metrics(0, {"a": 1.0})
        # The server never answers, so this returns only because the wait is bounded.
        tracker.close("FINISHED")
    assert "1 records are pending" in caplog.text
    assert [record["iteration"] for record in waiting(run_dir)] == [0]


def test_an_image_that_mlflow_cannot_store_does_not_delay_the_metrics(run_dir, tmp_path, caplog):
    image = tmp_path / "grid.png"
    Image.new("RGB", (4, 4)).save(image)
    (run_dir.parent / "mlartifacts").write_text("a file where the artifact folder should be")
    tracker = start(run_dir)
    tracker.log_image("grid", 0, tmp_path / "gone.png")
    tracker.log_image("grid", 0, image)
    tracker.log_metrics(0, {"a": 1.0})
    tracker.close("FINISHED")
    assert history(run_dir, tracker.run_id, "a") == [(0, 1.0)]
    assert [record["path"] for record in waiting(run_dir)] == [str(image)]
    assert "gone.png is missing" in caplog.text and "1 records for MLflow were dropped" in caplog.text


def test_the_default_store_lies_beside_the_run_folder_unless_the_environment_names_one(tmp_path, monkeypatch):
    assert default_uri(tmp_path / "runs" / "one") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert sqlite_file(default_uri(tmp_path / "runs" / "one")) == tmp_path / "runs" / "mlflow.db"
    odd = tmp_path / "100% a?b#c" / "one"
    assert sqlite_file(default_uri(odd)) == odd.parent / "mlflow.db"
    assert sqlite_file(NOWHERE) is None and sqlite_file("sqlite://") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    assert default_uri(tmp_path / "runs" / "one") == NOWHERE


def test_passwords_in_a_tracking_uri_are_not_logged():
    assert shown_uri("https://me:secret@host/x and more") == "https://***@host/x and more"


@pytest.mark.parametrize(
    ("name", "legal"), [("a/b.c-d e", "a/b.c-d e"), ("a:b(c)", "a_b_c_"), ("/a//b/../c", "a/c"), ("..", "_")]
)
def test_names_are_brought_into_the_form_that_mlflow_takes(name, legal):
    from mlflow.utils.validation import _validate_metric_name

    assert legal_name(name) == legal
    _validate_metric_name(legal_name(name))


def test_params_have_the_keys_that_overrides_use():
    nested = {"a": {"b": [{"c": 1}, {"c": None}], "d": [1, 2]}, "e": {}}
    assert flatten(nested) == {"a.b.0.c": "1", "a.b.1.c": "None", "a.d": "[1, 2]"}


# Composite


class Broken:
    def __getattr__(self, name):
        def fail(*args):
            raise RuntimeError(f"{name} broke")

        return fail


def test_a_failing_tracker_is_named_once_and_does_not_stop_the_others(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    tracker = CompositeTracker([Broken(), JsonlTracker(path)])
    tracker.log_metrics(0, {"a": 1.0})
    tracker.log_metrics(1, {"a": 1.0})
    tracker.log_image("grid", 1, path)
    tracker.log_text("x", "y")
    tracker.set_tags({})
    tracker.close("FINISHED")
    assert [row["iteration"] for row in read_metrics(path)] == [0, 1]
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "Traceback" not in caplog.text
    assert "Broken.log_metrics failed" in warnings[0] and "log_metrics broke" in warnings[0]


def test_an_interrupt_passes_through_the_composite():
    class Interrupted:
        def log_metrics(self, iteration, metrics):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CompositeTracker([Interrupted()]).log_metrics(0, {})
