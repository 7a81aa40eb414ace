"""The printed link opens the charts of a command's runs, and no library message is printed."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys

import pytest

from acpo_dist.tracking.mlflow_query import charts_link
from acpo_dist.tracking.mlflow_tracker import MlflowTracker
from tests.conftest import TINY
from tests.helpers.browser import Browser, require_browser

ACPO = [sys.executable, "-c", "from acpo_dist.cli import main; main()"]


@pytest.fixture
def store(tmp_path):
    """A database with two runs of three iterations."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for name in ("first", "second"):
        tracker = MlflowTracker(uri, "toys", name, spool=tmp_path / name, params={"run": {"seed": 0}}, tags={})
        for iteration in range(3):
            tracker.log_metrics(iteration, {"drift/rms": 0.1 * iteration, "reward/two_stream/mean": 0.5})
        tracker.close("FINISHED")
    return uri


@pytest.fixture
def server(store, tmp_path):
    """Address of `mlflow ui` on that database."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, _, page = charts_link(store, "toys").partition(", then open ")
    assert page.startswith("http://127.0.0.1:5000/#/experiments/")
    process = subprocess.Popen(
        [*shlex.split(command), "--port", str(port), "--workers", "1"], start_new_session=True, cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert any("running on http" in line for line in process.stderr), "mlflow ui ended before it listened"
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_the_link_opens_the_charts_of_the_runs_in_a_browser(server):
    require_browser()
    link = charts_link(server, "toys")
    assert link.startswith(f"{server}/#/experiments/")
    browser = Browser()
    try:
        browser.open(link, width=1400)
        charts = "document.querySelectorAll('.js-plotly-plot').length"
        browser.run(f"new Promise(done => {{ const look = () => {charts} ? done() : setTimeout(look, 100); look(); }})")
        text = browser.run("document.body.innerText")
        assert "rms" in text and "first" in text and "second" in text
    finally:
        browser.close()


def test_a_store_that_is_not_there_has_no_link(tmp_path):
    assert charts_link(f"sqlite:///{tmp_path / 'none.db'}", "toys") is None
    assert charts_link("http://127.0.0.1:9", "toys") is None


def test_an_experiment_that_is_not_there_has_no_link(store):
    assert charts_link(store, "other") is None


@pytest.mark.slow
def test_a_run_prints_its_own_lines_and_the_link_and_no_warning_of_a_library(tmp_path):
    options = [*TINY, "tracking.mlflow=true", "run.iterations=1", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [*ACPO, "train", "toy_sdxl", *options], capture_output=True, text=True, timeout=240, check=True
    )
    starts = (
        "toy-sdxl: 1 iterations",
        "calibrated on",
        "iteration 1/1",
        "gain in base",
        "done in",
        "charts of the runs:",
    )
    lines = done.stderr.splitlines()
    assert [line for line in lines if not line.startswith(starts)] == [] and done.stdout == ""
    assert re.search(r"mlflow ui --backend-store-uri sqlite:\S+, then open http://\S+compareRunsMode=CHART$", lines[-1])
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["iteration"] == 0
