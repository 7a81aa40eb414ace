"""`acpo doctor` reports each problem with a remedy, and one problem does not hide another."""

import base64
import http.server
import socket
import threading
from pathlib import Path

import pytest

from acpo_dist.cli.doctor import _checks
from acpo_dist.core.errors import ModelError
from acpo_dist.preflight.doctor import configured, machine, packages, storage
from acpo_dist.preflight.doctor.finding import Finding, in_child, run_checks, worst


def by_check(findings) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_a_program_that_crashes_is_an_outcome_and_not_the_end_of_this_process():
    assert in_child("import os; os.kill(os.getpid(), 11)").text == "ended by signal 11"
    assert in_child("raise ValueError('told')").text == "ValueError: told"
    assert in_child("print('a'); print('b')").text == "b" and in_child("pass").succeeded
    slow = in_child("import threading; threading.Event().wait()", timeout_s=0.5)
    assert not slow.succeeded and "0.5 s" in slow.text


def test_a_check_that_fails_is_a_finding_and_the_others_are_still_made():
    def broken():
        yield Finding("first", "ok", "fine")
        raise ModelError("no such model")

    def unforeseen():
        raise ZeroDivisionError("by zero")

    found = list(run_checks([("a", broken), ("b", unforeseen), ("c", lambda: [Finding("last", "note", "seen")])]))
    assert [(one.check, one.verdict) for one in found] == [
        ("first", "ok"), ("a", "failed"), ("b", "failed"), ("last", "note"),
    ]  # fmt: skip
    assert found[1].found == "no such model" and found[2].found == "ZeroDivisionError: by zero"
    assert worst(found) == "failed" and worst(found[:1]) == "ok" and worst([]) == "ok"


def test_a_library_that_does_not_fit_torch_is_found_though_it_is_installed(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    (tmp_path / "deepspeed.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (vision,) = packages.check_torchvision()
    assert vision.verdict == "failed" and "operator nms does not exist" in vision.found and "torch" in vision.advice
    zero = packages.compare_installed("extra `zero`", packages.wanted_packages()["zero"], "ranks", "zero")
    assert zero.verdict == "failed" and "ended by signal 6" in zero.found and "acpo-dist[zero]" in zero.advice


def test_an_unsupported_version_is_reported_and_a_missing_extra_is_no_failure(tmp_path, monkeypatch):
    (tmp_path / "mlflow-1.0.dist-info").mkdir()
    (tmp_path / "mlflow-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mlflow\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    wanted = packages.wanted_packages()
    old = packages.compare_installed("extra `mlflow`", wanted["mlflow"], "MLflow", "mlflow")
    assert old.verdict == "warning" and "mlflow 1.0 instead of" in old.found
    absent = packages.compare_installed("x", [packages.Requirement("no-such-distribution>=2")], "nothing", "x")
    assert absent.verdict == "note" and absent.found == "for nothing: no-such-distribution not installed"
    needed = packages.compare_installed("x", [packages.Requirement("no-such-distribution>=2")], "")
    assert needed.verdict == "failed"


def test_this_machine_passes_with_what_it_has():
    found = by_check([*machine.check_system(), *machine.check_devices(), *machine.check_process_group()])
    try:
        socket.getaddrinfo(socket.gethostname(), None)
        named = "ok"
    except OSError:
        named = "failed"
    assert found["python"].verdict == "ok" and found.pop("process group").verdict == named
    assert all(one.verdict != "failed" for one in found.values())
    assert all(one.advice for one in found.values() if one.verdict in ("warning", "failed"))


def test_more_threads_than_cores_are_reported(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert by_check(machine.check_system())["processors"].verdict == "warning"


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_reported(tmp_path):
    (good,) = storage.check_runs(tmp_path / "not" / "yet" / "there", 0.0)
    assert good.verdict == "ok" and list(tmp_path.iterdir()) == []
    (full,) = storage.check_runs(tmp_path, 1e9)
    assert full.verdict == "warning" and "checkpoint.keep" in full.advice
    (locked,) = storage.check_runs(Path("/proc/runs"), 0.0)
    assert locked.verdict == "failed" and "/proc" in locked.found and "run.dir" in locked.advice


class Store(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.headers["Authorization"] == f"Basic {base64.b64encode(b'user:se@cret').decode()}"
        self.send_response(200 if known or not self.path.startswith("/locked") else 401)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_a_tracking_server_is_contacted_and_its_password_is_not_shown():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"127.0.0.1:{server.server_port}"
        (good,) = storage.check_tracking(f"http://{where}")
        (locked,) = storage.check_tracking(f"http://{where}/locked")
        (known,) = storage.check_tracking(f"http://user:se%40cret@{where}/locked")
        server.shutdown()
    (gone,) = storage.check_tracking(f"http://user:secret@{where}")
    (odd,) = storage.check_tracking("http://user:secret@host:port")
    assert good.verdict == "ok" and "200" in good.found
    assert locked.verdict == "warning" and "401" in locked.found and "TOKEN" in locked.advice
    assert known.verdict == "ok" and "cret" not in known.found
    assert gone.verdict == "warning" and "secret" not in gone.found and where in gone.found
    assert odd.verdict == "warning" and "secret" not in odd.found


def test_libraries_that_a_configuration_cannot_be_read_with_are_a_finding_after_the_others(monkeypatch):
    def broken(source, overrides):
        raise RuntimeError("Failed to import diffusers because of operator nms")

    monkeypatch.setattr("acpo_dist.config.load.load_config", broken)
    checks = dict(_checks("toy_sdxl", [], None))
    (found,) = checks.pop("configuration")()
    assert found.verdict == "failed" and "operator nms" in found.found and "toy_sdxl" in found.found
    assert list(checks) == ["machine", "libraries", "torchvision", "devices", "process group"]


@pytest.mark.parametrize(
    ("source", "owner"), [("sdxl_lora", "StableDiffusionXLPipeline"), ("cifar10_ddpm", "DDPMPipeline")]
)
def test_a_model_that_is_not_on_this_disk_is_a_note_and_nothing_is_downloaded(source, owner, monkeypatch):
    import diffusers

    from acpo_dist.config.load import load_config

    asked = []

    def download(path, **options):
        asked.append(options["local_files_only"])
        raise OSError("not in the cache")

    monkeypatch.setattr(getattr(diffusers, owner), "download", download)
    monkeypatch.setattr(getattr(diffusers, owner), "from_pretrained", download)
    config = load_config(source, ["model.path=missing/model", "data.path=images.parquet"])
    (found,) = configured.check_model(config)
    assert found.verdict == "note" and "hf download missing/model" in found.advice
    assert set(asked) <= {True}


def test_a_model_that_the_run_trains_first_is_reported_as_such():
    from acpo_dist.config.load import load_config

    (found,) = configured.check_model(load_config("cifar10_ddpm", ["data.path=images.parquet"]))
    assert found.verdict == "note" and "trains first" in found.found


def test_a_configuration_is_opened_as_a_run_opens_it(tiny, tmp_path):
    config = tiny(f"run.dir={tmp_path / 'run'}")
    found = by_check(
        one
        for check in (configured.check_model, configured.check_rewards, configured.check_plan)
        for one in check(config)
    ) | by_check(one for _, check in configured.data_checks(config) for one in check())
    assert {one.verdict for one in found.values()} <= {"ok", "note"}
    assert "gradient of norm" in found["reward `two_stream`"].found
    assert "gradient" not in found["judge `strided_judge`"].found
    assert list(configured.check_folder(config)) == []


def test_weights_that_are_not_there_fail_their_reward_and_not_the_others(tiny, tmp_path):
    config = tiny()
    (entry,) = config.rewards.train
    absent = entry.model_copy(update={"weights": str(tmp_path / "absent.safetensors")})
    broken = config.model_copy(update={"rewards": config.rewards.model_copy(update={"train": (absent,)})})
    found = by_check(configured.check_rewards(broken))
    assert found["reward `two_stream`"].verdict == "failed" and "absent" in found["reward `two_stream`"].found
    assert found["judge `strided_judge`"].verdict == "ok"


def test_a_model_that_is_not_there_fails_and_room_for_the_run_is_looked_at_all_the_same(tiny, tmp_path):
    config = tiny(f"run.dir={tmp_path / 'run'}")
    lost = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path / "absent")})})
    found = by_check(
        run_checks([("model", lambda: configured.check_model(lost)), ("plan", lambda: configured.check_plan(lost))])
    )
    assert found["model"].verdict == "failed" and "model.path" in found["model"].found
    assert found["plan"].verdict == "note" and found["runs"].verdict in ("ok", "warning")


@pytest.mark.parametrize("uri", ["sqlite:////proc/mlflow.db", "postgresql://user:secret@host/db"])
def test_other_stores_are_named_without_their_password(uri):
    (found,) = storage.check_tracking(uri)
    assert "secret" not in found.found and found.verdict != "failed"
