"""Machines made of Linux namespaces: own addresses, own processes, own /tmp and /dev/shm, and an ssh server.

Needs root. Everything hangs on one process per machine (its PID 1): when that ends, so does all that ran there.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

USER = "acpo"
"""Name of the user on the machines: root under another name, with another home than the real root."""
_TOOLS = {"ip": "iproute2", "ss": "iproute2", "ssh": "openssh-client", "rsync": "rsync", "nsenter": "util-linux",
          "unshare": "util-linux", "pgrep": "procps", "curl": "curl", "nft": "nftables"}  # fmt: skip
_SSHD = "/usr/sbin/sshd"


def why_not() -> str:
    """Return why machines cannot be created here; empty if they can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    missing = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    if not Path(_SSHD).exists():
        missing.append("openssh-server")
    if missing:
        return f"needs the packages {', '.join(missing)}"
    if Path(sys.prefix).resolve().is_relative_to("/tmp"):
        return f"{sys.prefix} lies in /tmp, of which each machine has its own: put the checkout elsewhere"
    done = subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"namespaces are not allowed here: {done.stderr.strip()}"


@dataclass(frozen=True)
class Host:
    """One machine."""

    name: str
    address: str
    """On the network that joins the machines."""
    folder: Path
    """Holds its home and its files."""
    prefix: str
    """Prefix of the names of its namespace and links."""

    @property
    def home(self) -> Path:
        """Home of the user."""
        return self.folder / "home"

    @property
    def namespace(self) -> str:
        """Name of its network namespace."""
        return f"{self.prefix}-{self.name}"

    @property
    def _pid_file(self) -> Path:
        return self.folder / "init.pid"

    @property
    def init(self) -> int | None:
        """PID 1 of the machine, in the outer namespace; None while it is off."""
        if not self._pid_file.exists():
            return None
        pid = int(self._pid_file.read_text())
        return pid if Path(f"/proc/{pid}").exists() else None

    def start(self, shared: Path, addresses: Mapping[str, str]) -> None:
        """Start it, and wait until ssh responds.

        Args:
            shared: folder that all machines see as /mnt/acpo.
            addresses: of all machines, by name.
        """
        self.join()
        self.home.mkdir(parents=True, exist_ok=True)
        for name in ("hosts", "passwd", "sshd_config", "init.sh"):
            (self.folder / name).write_text(self._file(name, shared, addresses))
        key = self.folder / "host_key"
        if not key.exists():
            run_here("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        with (self.folder / "init.log").open("ab") as log:
            # `ip netns exec` and `unshare` exec on, so the child of the last one is PID 1 of the machine.
            outer = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "unshare", "--pid", "--mount", "--uts", "--ipc", "--fork",
                 "--kill-child", "--mount-proc", "bash", str(self.folder / "init.sh")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        inner = until(lambda: _children(outer.pid), 20, f"{self.name} does not start; see {log.name}")
        self._pid_file.write_text(str(inner[0]))
        until(lambda: self.listens(22), 20, f"ssh on {self.name} does not answer; see {log.name}")

    def _file(self, name: str, shared: Path, addresses: Mapping[str, str]) -> str:
        if name == "hosts":
            return "127.0.0.1 localhost\n" + "".join(f"{where} {who}\n" for who, where in addresses.items())
        if name == "passwd":
            return (
                # First, because ssh asks for the home of the number, not of the name.
                f"{USER}:x:0:0::{self.home}:/bin/bash\nroot:x:0:0:root:/root:/bin/bash\n"
                "sshd:x:105:65534::/run/sshd:/bin/false\n"
            )
        if name == "sshd_config":
            return (
                f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder.parent}/key.pub\nPidFile none\n"
                "UsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
                "PrintMotd no\nMaxStartups 100\n"
            )
        return (
            f"set -e\nhostname {self.name}\nip link set lo up\n"
            # Bound before /tmp is covered: the shared folder may lie there.
            f"mount -t tmpfs none /mnt && mkdir /mnt/acpo && mount --bind {shared} /mnt/acpo\n"
            f"mount --bind {self.folder}/hosts /etc/hosts\nmount --bind {self.folder}/passwd /etc/passwd\n"
            "mount -t tmpfs none /tmp && chmod 1777 /tmp\nmount -t tmpfs -o size=2g none /dev/shm\n"
            "mount -t tmpfs none /run && mkdir /run/sshd\n"
            # bash, as PID 1, takes in the processes whose parents ended.
            f"{_SSHD} -D -f {self.folder}/sshd_config &\nwhile :; do wait -n || sleep 1; done\n"
        )

    def run(self, command: str, *, timeout: float = 120, env: Mapping[str, str] | None = None) -> str:
        """Return the output of a command on the machine, run as by a login.

        Raises:
            AssertionError: it fails; with its output.
        """
        done = self.call(command, timeout=timeout, env=env)
        assert done.returncode == 0, f"{self.name}$ {command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def call(
        self, command: str, *, timeout: float = 120, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As `run`, also if it fails."""
        return subprocess.run(
            self.inside("bash", "-c", command), env=self._environment(env), timeout=timeout, capture_output=True,
            text=True,
        )  # fmt: skip

    def spawn(self, command: str, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a command on the machine."""
        with log.open("wb") as file:
            return subprocess.Popen(
                self.inside("bash", "-c", command), env=self._environment(env), stdin=subprocess.DEVNULL, stdout=file,
                stderr=file, start_new_session=True,
            )  # fmt: skip

    def inside(self, *command: str) -> list[str]:
        """Return the command line that runs a command on the machine."""
        assert self.init is not None, f"{self.name} is off"
        spaces = "--net --pid --mount --uts --ipc".split()
        return ["nsenter", "--target", str(self.init), *spaces, f"--wd={self.home}", *command]

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        base = {"HOME": str(self.home), "USER": USER, "LOGNAME": USER, "TERM": "dumb", "LANG": "C.UTF-8"}
        return base | {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"} | dict(env or {})

    def listens(self, port: int) -> bool:
        """Return whether a TCP port is listened on."""
        return any(where.rsplit(":", 1)[1] == str(port) for where, _ in self.listeners())

    def listeners(self) -> list[tuple[str, str]]:
        """Return every listening TCP socket: (address:port, process)."""
        done = run_here("ip", "netns", "exec", self.namespace, "ss", "-H", "-l", "-t", "-n", "-p")
        rows = [line.split() for line in done.splitlines() if line.strip()]
        return [(row[3], row[5] if len(row) > 5 else "") for row in rows]

    def processes(self) -> list[str]:
        """Return command lines of the processes on the machine, except PID 1 and the ssh server."""
        if self.init is None:
            return []
        space = os.readlink(f"/proc/{self.init}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "ns/pid") == space:
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip())
            except OSError:
                continue
        own = ("bash " + str(self.folder), "sshd:", _SSHD)
        return [line[:100] for line in found if line and not line.startswith(own) and line != "sleep 1"]

    def cut(self) -> None:
        """Disconnect the network."""
        run_here("ip", "netns", "exec", self.namespace, "ip", "link", "set", "eth0", "down")

    def join(self) -> None:
        """Reconnect it."""
        run_here("ip", "netns", "exec", self.namespace, "ip", "link", "set", "eth0", "up")

    def power_off(self) -> None:
        """End all processes at once without notice: the network is disconnected first, until `start`."""
        self.cut()
        pid = self.init
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            until(lambda: self.init is None, 20, f"{self.name} does not end")


def until(found, timeout_s: float, otherwise: str | Callable[[], str]):
    """Return the value of `found` once it is true.

    Args:
        otherwise: what to say when it is not; called then, if it has to look.

    Raises:
        AssertionError: it is not in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = found()
        if value:
            return value
        assert time.monotonic() < deadline, otherwise if isinstance(otherwise, str) else otherwise()
        time.sleep(0.2)


def _children(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def run_here(*command: str) -> str:
    """Return the output of a command outside all machines.

    Raises:
        AssertionError: it fails; with what it says.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout
