"""The cluster as used: commands on a computer outside, commands on its head, and its state according to Ray."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.hosts import Host, until
from tests.cluster.install import CONFIG
from tests.cluster.network import Network

_DESK = "export PATH=$HOME/acpo/venv/bin:$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0"
_HEAD = ". ~/acpo/node.sh"
_CLASSES = {"LearnerActor": "learner", "RolloutActor": "rollout", "ServeReplica": "reward"}


@dataclass(frozen=True)
class Worker:
    """A live actor of a run."""

    role: str
    address: str
    """Of its machine."""
    pid: int
    """As its machine counts."""


class Cluster:
    """Three machines and a desk."""

    def __init__(self, folder: Path) -> None:
        """Describe it; `steps_cluster.up` makes it."""
        self.folder = folder
        self.net = Network(folder, ["h1", "h2", "h3"], outside="desk")
        self.roles = {"h1": "head", "h2": "learner", "h3": "rollout"}
        self.desk = self.net.desk
        self.checkout = folder / "checkout"

    @property
    def head(self) -> Host:
        """The machine with the driver, Ray's control service and MLflow."""
        return self.net.hosts["h1"]

    def host_at(self, address: str) -> Host:
        """The machine with an address."""
        return next(host for host in self.net.hosts.values() if host.address == address)

    def at_desk(self, command: str, *, folder: Path | None = None, timeout: float = 180) -> str:
        """Return the output of a command outside the cluster, with the environment of docs/cluster.md."""
        return self.desk.run(f"{_DESK} && cd {folder or self.checkout} && {command}", timeout=timeout)

    def try_at_desk(self, command: str, *, timeout: float = 180) -> Any:
        """As `at_desk`, also if it fails."""
        return self.desk.call(f"{_DESK} && cd {self.checkout} && {command}", timeout=timeout)

    def on_head(self, command: str, *, timeout: float = 180) -> str:
        """Return the output of a command on the head."""
        return self.head.run(f"{_HEAD} && {command}", timeout=timeout)

    def try_on(self, host: Host, command: str, *, timeout: float = 180) -> Any:
        """Run a command on any machine of the cluster, also if it fails."""
        return host.call(f"{_HEAD} && {command}", timeout=timeout)

    def head_json(self, command: str, *, timeout: float = 180) -> Any:
        """Return the result of a command with `--json` on the head."""
        return json.loads(self.on_head(f"{command} --json", timeout=timeout).strip().splitlines()[-1])

    def forward(self) -> None:
        """Start `ray dashboard` outside the cluster: the only access to the job service."""
        log = self.folder / "dashboard.log"
        self.desk.spawn(f"{_DESK} && cd {self.checkout} && exec ray dashboard {CONFIG}", log)
        until(lambda: self.desk.listens(8265), 60, f"`ray dashboard` does not forward; see {log}")

    def end_forward(self) -> None:
        """Send Ctrl-C to `ray dashboard`."""
        self.desk.call("pkill -x ssh")
        until(lambda: not self.desk.processes(), 30, lambda: f"still at the desk: {self.desk.processes()}")

    def nodes(self) -> list[str]:
        """Return the addresses of the live machines; empty while the head does not respond."""
        done = self.try_on(self.head, "ray list nodes --filter state=ALIVE --format json", timeout=90)
        try:
            return sorted(node["node_ip"] for node in json.loads(done.stdout[done.stdout.index("[") :]))
        except ValueError:
            return []

    def workers(self) -> list[Worker]:
        """Return live learner ranks, rollout workers and reward replicas."""
        where = {node["node_id"]: node["node_ip"] for node in self._list("nodes")}
        found = []
        for actor in self._list("actors --filter state=ALIVE --detail"):
            role = next((role for word, role in _CLASSES.items() if word in actor["class_name"]), None)
            if role:
                found.append(Worker(role, where.get(actor["node_id"], "?"), actor["pid"]))
        return found

    def places(self) -> dict[str, set[str]]:
        """Return role -> addresses of the machines with live workers of the role."""
        workers = self.workers()
        return {role: {one.address for one in workers if one.role == role} for role in _CLASSES.values()}

    def _list(self, what: str) -> list[dict[str, Any]]:
        text = self.on_head(f"ray list {what} --format json --limit 1000", timeout=90)
        return json.loads(text[text.index("[") :])
