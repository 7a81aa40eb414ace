"""Every command reports a cluster that cannot be joined with one immediate message."""

import os
import socket
import subprocess
import sys

import pytest

from acpo_dist.core.errors import UsageError

joining = pytest.importorskip("actors.cluster.connect", reason="needs the extra `ray`")


@pytest.fixture
def listening():
    """An address where another program accepts connections."""
    with socket.socket() as door:
        # Ray takes 127.0.0.1 for the address that others reach this machine by.
        door.bind(("", 0))
        door.listen()
        yield f"127.0.0.1:{door.getsockname()[1]}"


@pytest.fixture
def unused(listening):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "toy_sdxl", "--address"],
        ["rewards", "status", "--address"],
        ["rewards", "scale", "musiq", "2", "--address"],
    ],
)
def test_every_command_reports_that_no_cluster_listens_at_the_address(arguments, unused):
    from typer.testing import CliRunner

    from acpo_dist.cli import commands  # noqa: F401  (registers the commands)
    from acpo_dist.cli.app import app

    result = CliRunner().invoke(app, [*arguments, unused])
    assert isinstance(result.exception, UsageError), result.exception
    assert f"no Ray cluster at {unused}" in str(result.exception) and "HOST:6379" in str(result.exception)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "nonsense"])
def test_what_is_no_address_is_a_mistake_of_the_user(address):
    with pytest.raises(UsageError, match=f"no Ray cluster at {address}: Invalid address"):
        joining.join(address)


def test_a_run_on_such_a_cluster_ends_with_the_same_message(unused, tiny):
    from actors.launch import connected

    with pytest.raises(UsageError, match=f"no Ray cluster at {unused}"), connected(tiny(f"cluster.address={unused}")):
        pytest.fail("there is no cluster")


def test_a_missing_token_is_reported_in_one_message(listening, tmp_path):
    # In a process of its own: Ray reads how it authenticates once.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    variables |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    done = subprocess.run(
        [sys.executable, "-c", "from acpo_dist.cli import main; main()", "rewards", "status", "--address", listening],
        capture_output=True, text=True, env=variables, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "RAY_AUTH_MODE" in done.stderr and "RAY_AUTH_TOKEN_PATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_long_tmpdir_is_named_with_its_length_and_the_key_that_shortens_it(tmp_path):
    long = tmp_path / ("a" * 90)
    long.mkdir()
    program = "from actors.cluster.connect import join; join('local')"
    variables = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables | {"TMPDIR": str(long)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0 and f"TMPDIR={long}" in done.stderr and "RAY_TMPDIR" in done.stderr


def test_small_shared_memory_is_reported_with_its_size_and_the_size_that_ray_needs():
    gib = 2**30
    said = joining.small_shared_memory(gib // 16, 3 * gib)
    assert "0.06 GiB" in said and "3.00 GiB" in said and "--shm-size=3g" in said and len(said) <= 600
    assert joining.small_shared_memory(4 * gib, 3 * gib) == ""


@pytest.mark.parametrize(("failures", "joins"), [(4, True), (5, False)])
@pytest.mark.parametrize(
    "error", [Exception("The current node timed out during startup."), RuntimeError("Failed to start GCS.")]
)
def test_a_local_cluster_that_is_not_up_in_time_is_started_again_and_five_failures_are_one_message(
    error, failures, joins, monkeypatch
):
    """Ray's own time limit cannot be triggered at will, so its observed exception is used."""
    calls = []

    def start(**arguments):
        calls.append(arguments["address"])
        if calls.count("local") <= failures:
            raise error

    monkeypatch.setattr(joining.ray, "init", start)
    monkeypatch.setattr(joining.ray, "shutdown", lambda: calls.append("shutdown"))
    if joins:
        joining.join("local")
    else:
        with pytest.raises(UsageError, match=str(error)):
            joining.join("local")
    assert calls == ["local", "shutdown"] * failures + ["local"] * joins


def test_an_error_of_another_kind_starts_no_cluster_again(monkeypatch):
    calls = []

    def start(**arguments):
        calls.append(arguments["address"])
        raise KeyError("a defect")

    monkeypatch.setattr(joining.ray, "init", start)
    with pytest.raises(KeyError):
        joining.join("local")
    assert calls == ["local"]
