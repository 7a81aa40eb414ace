"""Machines on one network, and one outside that reaches the first of them over another network."""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.hosts import Host, run_here, until


class Network:
    """The links, and all machines."""

    def __init__(self, folder: Path, names: Sequence[str], *, outside: str, prefix: str = "acpo") -> None:
        """Describe it; `up` makes it.

        Args:
            folder: holds the machines' files; seen by all of them under the same path.
            outside: name of the machine that is not on the wire.
        """
        self.folder, self._prefix = folder, prefix
        self.shared = folder / "shared"
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)}
        self.hosts = {name: Host(name, where, folder / name, prefix) for name, where in self.addresses.items()}
        self.desk = Host(outside, "10.78.0.9", folder / outside, prefix)
        self.door = "10.78.0.1"
        """Address of the first machine as seen from outside."""

    @property
    def _switch(self) -> str:
        return f"{self._prefix}-switch"

    @property
    def _everyone(self) -> list[Host]:
        return [*self.hosts.values(), self.desk]

    def up(self) -> None:
        """Make links and start all machines."""
        self.shared.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "key").exists():
            run_here("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key"))
        switch = self._switch
        _ip(f"netns add {switch}")
        _ip(f"-n {switch} link add wire type bridge")
        _ip(f"-n {switch} link set wire up")
        for host in self._everyone:
            _ip(f"netns add {host.namespace}")
            _ip(f"-n {host.namespace} link set lo up")
        for host in self.hosts.values():
            port = f"port-{host.name}"
            _ip(f"link add eth0 netns {host.namespace} type veth peer {port} netns {switch}")
            _ip(f"-n {switch} link set {port} master wire up")
            _connect(host, "eth0", host.address)
        first = next(iter(self.hosts.values()))
        _ip(f"link add eth1 netns {first.namespace} type veth peer eth0 netns {self.desk.namespace}")
        _connect(first, "eth1", self.door)
        _connect(self.desk, "eth0", self.desk.address)
        for host in self._everyone:
            self.start(host)

    def start(self, host: Host) -> None:
        """Switch a machine on."""
        host.start(self.shared, {**self.addresses, self.desk.name: self.desk.address})

    def down(self) -> None:
        """End all machines and remove the links, including remains of an earlier attempt."""
        for host in self._everyone:
            if host.init is not None:
                os.kill(host.init, signal.SIGKILL)
                until(lambda host=host: host.init is None, 20, f"{host.name} does not end")
        for name in (*(host.namespace for host in self._everyone), self._switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def leftovers(self) -> list[str]:
        """Return existing namespaces."""
        return [line for line in run_here("ip", "netns", "list").splitlines() if line.startswith(f"{self._prefix}-")]


def _connect(host: Host, device: str, address: str) -> None:
    _ip(f"-n {host.namespace} addr add {address}/24 dev {device}")
    _ip(f"-n {host.namespace} link set {device} up")


def _ip(words: str) -> None:
    run_here("ip", *words.split())
