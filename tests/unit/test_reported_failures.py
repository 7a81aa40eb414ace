"""Failures that users of such tools report: each is avoided, or named in one message with its remedy."""

import http.server
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from acpo_dist.config.load import load_config
from acpo_dist.core.errors import LONGEST, AcpoError, StorageError, UsageError
from acpo_dist.core.files import on_storage
from acpo_dist.diffusion.trajectory import Trajectory
from acpo_dist.objective.advantage import group_advantages
from acpo_dist.preflight.doctor.storage import check_tracking
from acpo_dist.tracking.mlflow_tracker import MlflowTracker
from acpo_dist.training import run_lock
from acpo_dist.training.run_lock import held, lock_holder
from acpo_dist.training.trajectory.manager import few_late_states
from tests.conftest import TINY
from tests.helpers.runs import results

LONG = "ü" * 300
LAUNCHERS = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "none", "ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_DEEPSPEED": "true",
    "SLURM_JOB_ID": "7", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_NODELIST": "node[1-4]", "UV": "/usr/bin/uv",
    "UV_RUN_RECURSION_DEPTH": "1",
}  # fmt: skip
JUMPING_CLOCK = """
import itertools, time
now, jumps = time.time, itertools.cycle([0.0, -3.0e7, 4.0e8, -86400.0])
time.time = lambda: now() + next(jumps)
"""
"""`sitecustomize.py`: the wall clock jumps by a year back, ten years ahead and a day back from call to call."""
PROXIES = {
    name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY")
}


class OtherHost(http.server.BaseHTTPRequestHandler):
    """Answers as MLflow does to a host name that it does not know; `/health` is always answered."""

    def do_GET(self) -> None:
        known = self.path == "/health"
        self.send_response(200 if known else 403)
        self.end_headers()
        self.wfile.write(b"OK" if known else b"Invalid Host header - possible DNS rebinding attack detected")

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def other_host(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OtherHost) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_mlflow_server_that_refuses_the_host_name_is_quoted_with_the_option_that_allows_it(
    other_host, tmp_path, caplog
):
    tracker = MlflowTracker(other_host, "acpo", "one", spool=tmp_path / "mlflow", params={}, tags={})
    tracker.close("FINISHED")
    said = next(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "403" in said and "Invalid Host header" in said and "--allowed-hosts" in said and other_host in said
    assert len(said) <= LONGEST + len(str(tmp_path))


def test_the_doctor_asks_mlflow_what_a_run_asks_it(other_host):
    (found,) = check_tracking(other_host)
    assert found.verdict == "warning" and "Invalid Host header" in found.found and "--allowed-hosts" in found.advice


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "../../outside",
        "/absolute",
        "a:b",
        "with spaces",
        "äöü Ω 你好",
        LONG,
        "a" * 300,
        "..",
        " ",
        "a\0b",
        "CON?*",
    ],
)
def test_any_run_name_gives_one_folder_inside_the_folder_of_all_runs(name, monkeypatch, tmp_path):
    monkeypatch.setenv("ACPO_RUNS", str(tmp_path))
    folder = load_config("toy_sdxl", [f"run.name={name}"]).run_dir
    with held(folder):
        assert folder.is_dir() and folder.parent == tmp_path
    assert load_config("toy_sdxl", [f"run.name={name}"]).run.name == name


def test_long_run_names_that_differ_at_their_end_give_different_folders():
    first, second = (load_config("toy_sdxl", [f"run.name={LONG}{end}"]).run_dir for end in "ab")
    assert first != second


@pytest.mark.parametrize("folder", ["file/run", "/proc/run", "x" * 300])
def test_a_run_folder_that_cannot_be_made_is_a_mistake_of_the_user_with_the_key_to_set(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as caught, held(tmp_path / folder):
        pytest.fail("the folder cannot be made")
    assert "run.dir" in str(caught.value) and "ACPO_RUNS" in str(caught.value) and len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "FOLDER"], "no configuration"),
        (["pairs", "FOLDER", "--out", "pairs.parquet"], "found a folder"),
        (["vrg", "show", "FOLDER"], "found a folder"),
        (["vrg", "optimize", "--table", "FOLDER", "--trajectory", "FOLDER"], "found a folder"),
        (["eval", "toy-sdxl", "--suite", "FOLDER"], "a folder"),
        (["eval", "FOLDER"], "neither a run"),
        (["generate", "toy-sdxl", "--prompt", "a", "--schedule", "FOLDER"], "found a folder"),
        (["generate", "FOLDER", "--prompt", "a"], "found a folder without model_index.json"),
        (["export", "FOLDER", "--out", "out"], "is not a run"),
        (["train", "toy_sdxl", "data.prompts=FOLDER"], "holds no image"),
        (["train", "toy_sdxl", "model.loras=[{path: FOLDER}]"], "model.loras"),
        (["train", "toy_sdxl", "model.tuning.init=FOLDER"], "model.tuning.init"),
        (["train", "toy_sdxl", "rewards.train=[{type: two_stream, weights: FOLDER}]"], "no weights"),
        (["train", "toy_dpo", "data.pairs=FOLDER"], "data.pairs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_empty_folder_where_a_file_is_expected_is_one_message_with_its_path(
    arguments, said, tmp_path, monkeypatch, capsys
):
    from acpo_dist.cli import main

    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["acpo", *(text.replace("FOLDER", str(folder)) for text in arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    # Tables of the console break lines at its width.
    found = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in found
    plain = found.replace("\n", " ")
    assert said in plain and str(folder) in plain.replace(" ", "")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, and a command that makes it read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    subprocess.run(["umount", folder], check=True)


def test_a_run_folder_on_a_read_only_disk_is_named_before_and_during_a_run(small_disk):
    from acpo_dist.training.run_folder import open_run

    disk, make_read_only = small_disk
    folder, _ = open_run(load_config("toy_sdxl", [f"run.dir={disk / 'run'}"]), None)
    make_read_only()
    with pytest.raises(UsageError) as caught, held(disk / "other"):
        pytest.fail("the folder cannot be made")
    assert "run.dir" in str(caught.value) and "Read-only file system" in str(caught.value)
    with pytest.raises(StorageError) as during, on_storage(folder.root):
        folder.checkpoints.prepare(1)
    assert "Read-only file system" in str(during.value) and str(disk) in str(during.value)


def test_a_run_folder_on_a_full_disk_is_refused_with_the_room_that_is_left(small_disk):
    disk, _ = small_disk
    with (disk / "ballast").open("wb") as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    with pytest.raises(AcpoError) as caught, on_storage(disk / "run"), held(disk / "run"):
        pytest.fail("nothing can be written")
    assert "No space left" in str(caught.value) and str(disk) in str(caught.value)


def test_a_trajectory_with_one_late_state_is_reported_with_the_share_that_gives_two():
    levels = np.linspace(0.99, 0.01, 1000)
    few = Trajectory(timesteps=(999.0, 749.0, 499.0, 249.0), alpha_bars=(0.01, 0.1, 0.4, 0.8, 1.0))
    config = load_config("toy_sdxl", ["sampler.num_steps=4", "sampler.t_max=null", "sampler.guidance_scale=1"])
    said = few_late_states(few, config, levels)
    assert said is not None and "sampler.t_max=0.3" in said and "sampler.t_max=0.5 " in said and "249" in said
    assert few_late_states(few, load_config("toy_sdxl", ["sampler.t_max=0.5"]), levels) is None
    single = load_config("toy_sdxl", ["sampler.t_max=0.3", "sampler.late_per_sample=1"])
    assert few_late_states(few, single, levels) is None


def test_a_run_of_a_model_with_four_steps_says_at_its_start_which_key_to_set(tiny, tmp_path):
    from rich.console import Console as RichConsole

    from acpo_dist.tracking.console import Console
    from acpo_dist.training.local import open_ports
    from acpo_dist.training.run import drive

    class StartedError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StartedError

    steps = ["sampler.num_steps=4", "sampler.t_max=0.3", "sampler.guidance_scale=1", f"run.dir={tmp_path / 'run'}"]
    with (tmp_path / "said").open("w+", encoding="utf-8") as file:
        console = Console(rich_console=RichConsole(file=file, width=10_000))
        with pytest.raises(StartedError):
            drive(tiny(*steps), open_ports, console, at_start=stop)
        file.seek(0)
        said = [line for line in file.read().splitlines() if line.startswith("warning: only 1 of 4")]
    assert len(said) == 1 and "sampler.t_max=0.5" in said[0]


def test_a_group_whose_spread_is_a_residue_of_rounding_is_left_out_and_counted():
    # Scores that differ by 2e-4 where those of the base model have a standard deviation of 0.35.
    quality = {"a0": 0.0, "a1": 2e-4 / 0.35, "b0": 0.0, "b1": 0.2}
    found = group_advantages([["a0", "a1"], ["b0", "b1"]], {"m": quality}, {"m": 1.0})
    assert set(found.values) == {"b0", "b1"} and found.counts.flat_groups == 1


def test_another_version_of_ray_or_python_on_the_cluster_is_one_message_with_both_versions():
    pytest.importorskip("ray", reason="needs the extra `ray`")
    import ray
    from ray._private.utils import check_version_info

    from actors.cluster import connect

    with pytest.raises(RuntimeError) as refused:
        check_version_info({"ray_version": "2.9.0", "python_version": "3.8.1"}, "192.0.2.1")
    said = connect.explain("192.0.2.1:6379", refused.value)
    python = ".".join(map(str, sys.version_info[:3]))
    assert all(part in said for part in ("Ray 2.9.0, Python 3.8.1", f"Ray {ray.__version__}, Python {python}"))
    assert "192.0.2.1:6379" in said and "\n" not in said and len(said) <= LONGEST


def driven(*overrides: str) -> list[dict[str, float]]:
    """Metrics of a small run of one iteration in this process."""
    from acpo_dist.tracking.console import Console
    from acpo_dist.training.local import open_ports
    from acpo_dist.training.run import drive

    config = load_config("toy_sdxl", [*TINY, "run.iterations=1", *overrides])
    drive(config, open_ports, Console(quiet=True))
    return results(config.run_dir)


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> list[dict[str, float]]:
    return driven(f"run.dir={tmp_path_factory.mktemp('calm') / 'run'}")


def test_a_run_on_a_slow_disk_keeps_its_lock_and_its_metrics(tmp_path, calm, monkeypatch):
    folder, written, slowed = tmp_path / "run", os.fsync, []

    def fsync(file: int) -> None:
        """Take as long as three heartbeats of the run lock, which must not stop meanwhile."""
        holder = lock_holder(folder)
        if holder is not None:
            slowed.append(holder.beat)
            while (now := lock_holder(folder)) is None or now.beat < holder.beat + 3:
                time.sleep(0.01)
        written(file)

    monkeypatch.setattr(run_lock, "_BEAT_S", 0.02)
    monkeypatch.setattr(os, "fsync", fsync)
    assert driven(f"run.dir={folder}") == calm
    assert len(slowed) >= 3 and slowed == sorted(slowed)


def test_proxies_the_variables_of_launchers_and_a_jumping_clock_change_nothing(tmp_path, calm):
    command = [sys.executable, "-c", "from acpo_dist.cli import main; main()", "train", "toy_sdxl", "--json"]
    name = f"run.name=süß/{LONG}"
    (tmp_path / "sitecustomize.py").write_text(JUMPING_CLOCK)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [*command, *TINY, "run.iterations=1", name], capture_output=True, text=True, timeout=600,
        env={**os.environ, **LAUNCHERS, **PROXIES, "ACPO_RUNS": str(tmp_path), "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert results(Path(json.loads(done.stdout)["run_dir"])) == calm


def test_a_run_folder_that_was_moved_goes_on_from_its_checkpoint(tmp_path):
    from acpo_dist.training.run_folder import open_run

    first, second = (load_config("toy_sdxl", [f"run.dir={tmp_path / name}"]) for name in ("here", "there"))
    folder, none = open_run(first, None)
    assert none is None
    partial = folder.checkpoints.prepare(2)
    folder.checkpoints.commit(partial, 2, {"version": 2})
    folder.metrics.write_text('{"iteration": 0}\n{"iteration": 1}\n')
    (tmp_path / "here").rename(tmp_path / "there")
    moved, checkpoint = open_run(second, "auto")
    assert moved.root == tmp_path / "there" and checkpoint is not None and checkpoint.iteration == 2


def test_no_file_has_a_fixed_name_in_the_folder_that_all_users_of_a_machine_share():
    root = Path(__file__).resolve().parents[2]
    sources = [path for part in ("acpo_dist", "actors") for path in (root / part).rglob("*.py")]
    named = [path.name for path in sources if re.search(r"""["'](/tmp|/var/tmp|/dev/shm)/""", path.read_text("utf-8"))]
    assert named == []
