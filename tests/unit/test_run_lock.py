"""Run lock: a second process is rejected, a dead holder is replaced, and a process that lost the lock stops."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from acpo_dist.core.errors import ResumeError, RunTakenError
from acpo_dist.training import run_lock as lock
from acpo_dist.training.run_lock import LOCK_FILE, LockHolder, RunLock, held, lock_holder, sign_of

HOLD = """
import sys
from pathlib import Path
from acpo_dist.training.run_lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def never(seconds: float) -> None:
    raise AssertionError("nothing there to wait for")


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def elsewhere(root: Path, **changes) -> LockHolder:
    """Write a lock file of another machine."""
    with held(root):
        me = lock_holder(root)
        assert me is not None
    driver = replace(me, host="far", place="another machine", token="theirs", **changes)
    root.mkdir(exist_ok=True)
    (root / LOCK_FILE).write_text(json.dumps(asdict(driver)))
    return driver


def test_a_locked_run_is_refused_with_the_process_that_holds_the_lock(other, tmp_path):
    driver = lock_holder(tmp_path / "run")
    assert driver is not None and driver.pid == other.pid and sign_of(driver) == "alive"
    with pytest.raises(ResumeError, match=rf"process {other.pid} on .*run\.name"), held(tmp_path / "run", wait=never):
        pass
    other.stdin.close()
    other.wait()
    assert not (tmp_path / "run").exists(), "nothing was begun"
    with held(tmp_path / "run", wait=never):
        pass


def test_the_lock_of_a_process_killed_on_this_host_is_taken_over_at_once(other, tmp_path):
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    driver = lock_holder(tmp_path / "run")
    assert driver is not None and sign_of(driver) == "gone"
    with held(tmp_path / "run", wait=never):
        pass


def test_a_process_that_reuses_the_number_of_a_dead_holder_does_not_hold_the_lock(tmp_path):
    with held(tmp_path):
        me = lock_holder(tmp_path)
    assert me is not None and sign_of(me) == "alive" and sign_of(replace(me, started=me.started - 100)) == "gone"


def test_a_holder_on_another_host_counts_as_alive_while_its_heartbeat_grows(tmp_path):
    driver = elsewhere(tmp_path / "run")
    assert sign_of(driver) == "unknown"

    def beats(seconds: float) -> None:
        (tmp_path / "run" / LOCK_FILE).write_text(json.dumps(asdict(replace(driver, beat=driver.beat + 1))))

    with pytest.raises(ResumeError, match="on far"), held(tmp_path / "run", wait=beats):
        pass
    waited = []
    with held(tmp_path / "run", wait=waited.append):
        assert waited == [lock._SILENT_S]
        now = lock_holder(tmp_path / "run")
        assert now is not None and now.pid == os.getpid()


def test_a_holder_on_another_host_that_releases_during_the_wait_is_succeeded(tmp_path):
    elsewhere(tmp_path / "run")
    with held(tmp_path / "run", wait=lambda seconds: (tmp_path / "run" / LOCK_FILE).unlink()):
        now = lock_holder(tmp_path / "run")
        assert now is not None and now.pid == os.getpid()


def test_a_file_of_another_version_counts_as_alive_while_it_changes(tmp_path):
    elsewhere(tmp_path / "run")
    file = tmp_path / "run" / LOCK_FILE
    file.write_text('{"later": 1}')
    with pytest.raises(ResumeError, match="another process"):
        with held(tmp_path / "run", wait=lambda seconds: file.write_text('{"later": 2}')):
            pass


def test_changing_the_wall_clock_does_not_release_the_lock(tmp_path, monkeypatch):
    with held(tmp_path):
        me = lock_holder(tmp_path)
        created = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 100)
        monkeypatch.setattr(psutil, "boot_time", lambda: 100.0)
        assert me is not None and sign_of(me) == "alive"


def test_of_two_processes_that_take_over_a_dead_lock_at_once_one_is_refused(tmp_path, other, monkeypatch):
    driver = lock_holder(tmp_path / "run")
    assert driver is not None
    file, rename = tmp_path / "run" / LOCK_FILE, os.rename
    living = file.read_bytes()
    file.write_text(json.dumps(asdict(replace(driver, token="dead", started=0.0))))

    def late(source, target):
        # Somebody else was through in between.
        file.write_bytes(living)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(ResumeError, match=f"process {other.pid}"), held(tmp_path / "run", wait=never):
        pass
    assert file.read_bytes() == living and [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]


def test_a_late_heartbeat_does_not_restore_a_released_lock(tmp_path, monkeypatch):
    mine = RunLock(tmp_path / "run")
    mine.take(never)
    mine.release()
    looks = iter([False, True])
    monkeypatch.setattr(mine._over, "wait", lambda seconds: next(looks))
    mine.beat()
    assert not (tmp_path / "run").exists()


def test_an_existing_empty_folder_is_kept_after_release(tmp_path):
    with held(tmp_path, wait=never):
        pass
    assert tmp_path.is_dir() and list(tmp_path.iterdir()) == []


def test_a_truncated_lock_file_is_removed_after_the_wait(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).write_text('{"token": "a')
    waited = []
    with held(tmp_path / "run", wait=waited.append):
        assert len(waited) == 1 and lock_holder(tmp_path / "run") is not None
    assert list((tmp_path / "run").iterdir()) == []


def test_heartbeats_continue_until_another_process_takes_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_S", 0.01)
    mine = RunLock(tmp_path)
    mine.take(never)
    import threading

    thread = threading.Thread(target=mine.beat)
    thread.start()
    while (now := lock_holder(tmp_path)) is None or now.beat < 3:
        pass
    mine.require()
    while thread.is_alive():
        # A heartbeat in progress may overwrite the file once more.
        (tmp_path / LOCK_FILE).write_text(json.dumps(asdict(replace(now, token="theirs", host="far"))))
        thread.join(timeout=0.1)
    with pytest.raises(RunTakenError, match=r"process \d+ on far"):
        mine.require()
    mine.release()
    theirs = lock_holder(tmp_path)
    assert theirs is not None and theirs.token == "theirs", "what another process wrote is left alone"


def test_a_run_that_lost_its_lock_writes_no_checkpoint(tiny, tmp_path):
    from acpo_dist.tracking.console import Console
    from acpo_dist.training.local import open_ports
    from acpo_dist.training.run import drive

    root = tmp_path / "run"
    config = tiny(f"run.dir={root}", "run.iterations=3", "checkpoint.every=1", "tracking.mlflow=false")

    def taken(*arguments) -> None:
        me = lock_holder(root)
        assert me is not None
        (root / LOCK_FILE).write_text(json.dumps(asdict(replace(me, token="theirs"))))

    with pytest.raises(RunTakenError, match="newest checkpoint"):
        drive(config, open_ports, Console(quiet=True), at_start=taken)
    assert not list(root.glob("checkpoints/0*")) and (root / "metrics.jsonl").read_text() == ""


def test_a_run_that_lost_its_workers_and_its_lock_changes_nothing_in_the_folder(tiny, tmp_path):
    from contextlib import contextmanager

    from acpo_dist.core.errors import WorkerLostError
    from acpo_dist.tracking.console import Console
    from acpo_dist.training.run import drive

    root, opened = tmp_path / "run", []
    theirs = '{"iteration": 0}\n{"iteration": 1}\n'

    @contextmanager
    def cut_off(config, tracker):
        opened.append(config)
        me = lock_holder(root)
        assert me is not None
        (root / LOCK_FILE).write_text(json.dumps(asdict(replace(me, token="theirs", host="far"))))
        (root / "metrics.jsonl").write_text(theirs)
        raise WorkerLostError("every machine is gone")
        yield

    with pytest.raises(RunTakenError, match="on far"):
        drive(tiny(f"run.dir={root}", "run.iterations=2"), cut_off, Console(quiet=True))
    assert len(opened) == 1 and (root / "metrics.jsonl").read_text() == theirs


def test_a_second_process_leaves_a_locked_run_unchanged(tiny, tmp_path, other):
    from acpo_dist.tracking.console import Console
    from acpo_dist.training.local import open_ports
    from acpo_dist.training.run import drive

    config = tiny(f"run.dir={tmp_path / 'run'}", "run.iterations=1", "tracking.mlflow=false")
    with pytest.raises(ResumeError, match="holds the run lock"):
        drive(config, open_ports, Console(quiet=True))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [LOCK_FILE]


def test_a_finished_run_releases_the_lock(plain_run):
    assert lock_holder(plain_run.run_dir) is None and not (plain_run.run_dir / LOCK_FILE).exists()
    assert (plain_run.run_dir / "export").is_dir()
