"""Two users of one machine run at once: neither uses the other's cluster, files or port."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from acpo_dist.core.errors import LONGEST

pytest.importorskip("ray", reason="needs the extra `ray`")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

NOBODY_UID = 65534
"""Numeric id of the Debian user `nobody`, who owns no files."""
PROGRAM = """
import os, sys, ray
from acpo_dist.config.pool import HttpConfig
from acpo_dist.core.errors import WorkerError
from actors.cluster.connect import join, leave
from actors.reward.client import PoolLink
from actors.reward.gateway import open_gateway
join("local")
print(ray.get(ray.remote(num_cpus=0.1)(lambda: os.getuid()).remote(), timeout=240), flush=True)
sys.stdin.readline()
http = HttpConfig(enabled=True, port=int(sys.argv[1]))
try:
    gateway, address = open_gateway(PoolLink(applications={}, deadline_s=1.0, attempt_timeout_s=1.0), {}, "image", http)
    print("serves", flush=True)
except WorkerError as error:
    print(error, flush=True)
sys.stdin.readline()
leave()
"""


def start(user: int, home: Path, port: int) -> subprocess.Popen[str]:
    """Start the program as a user with a home of its own; without the right to change users, as this one."""
    home.mkdir()
    command = [sys.executable, "-c", PROGRAM, str(port)]
    if user != os.getuid():
        os.chown(home, user, user)
        # The interpreter may lie in a folder of this user; files of this user still cannot be written.
        rights = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *rights, *command]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables |= {
        "HOME": str(home), "ACPO_REWARDS_TOKEN": f"a token of user {user}", "PYTHONPATH": ":".join(sys.path),
        "RAY_worker_niceness": "0",
    }  # fmt: skip
    return subprocess.Popen(
        command, cwd=home, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> str:
    """The next line of a process."""
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline().strip()
    assert line, process.stderr.read()
    return line


def go_on(process: subprocess.Popen[str]) -> None:
    """Let a process open its gateway."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_users_have_clusters_of_their_own_and_the_second_on_one_http_port_is_told_the_key(tmp_path_factory):
    # A folder that every user may enter: pytest's own belongs to one.
    base = Path(tmp_path_factory.mktemp("users"))
    other = NOBODY_UID if os.getuid() == 0 and shutil.which("setpriv") else os.getuid()
    for folder in [base, *base.parents][:3] if other != os.getuid() else []:
        folder.chmod(folder.stat().st_mode | 0o055)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    first = start(os.getuid(), base / "first", port)
    try:
        second = start(other, base / "second", port)
        try:
            assert (said(first), said(second)) == (str(os.getuid()), str(other))
            go_on(first)
            assert said(first) == "serves"
            go_on(second)
            message = said(second)
            assert f"127.0.0.1:{port}" in message and "rewards.http.port=0" in message
            assert "Address already in use" in message and len(message) <= LONGEST
        finally:
            _, errors = second.communicate("\n")
        assert second.returncode == 0, errors
    finally:
        _, errors = first.communicate("\n")
    assert first.returncode == 0, errors
