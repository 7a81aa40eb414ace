"""Processes of a run under test, and the phase that they are in, as the system and the run folder show them."""

import os
from pathlib import Path

from acpo_dist.tracking.jsonl import read_metrics

PHASES = (
    "start",
    "loading",
    "calibration",
    "drawing",
    "scoring",
    "learning",
    "publishing",
    "saving",
    "iterating",
    "export",
)
"""`iterating` is all of an iteration in one process, whose phases are not visible from outside."""
ROLES = {
    "learner": "ray::LearnerActor",
    "rollout": "ray::RolloutActor",
    "reward": "ray::ServeReplica",
    "controller": "ray::ServeController",
}
"""Role -> start of the titles of its processes; the role `driver` is the process that was started."""
_METHODS = {
    "learning": ("LearnerActor.train",),
    "saving": ("LearnerActor.save",),
    "publishing": ("LearnerActor.export", "RolloutActor.load"),
    "drawing": ("RolloutActor.generate",),
    "loading": ("LearnerActor.build", "LearnerActor.__init__", "RolloutActor.__init__", "LearnerActor.start"),
}


class Processes:
    """A process and all descendants that it has or had.

    Args:
        parent: the process that was started.
        server: the process whose forks stand for descendants of the parent; it is not counted itself.
    """

    def __init__(self, parent: int, server: int | None = None) -> None:
        self.parent, self._server = parent, server
        self._seen: dict[int, str] = {}
        """Process id -> start time, which tells a process from a later one with the same id."""

    def refresh(self) -> None:
        """Look for new descendants."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and (facts := _stat(int(entry.name))):
                found[int(entry.name)] = facts
        family, size = {self.parent, *self._seen, *([self._server] if self._server else [])}, 0
        while size != len(family):
            size = len(family)
            family |= {pid for pid, (above, _, _) in found.items() if above in family}
        for pid in (family & found.keys()) - {self._server}:
            self._seen.setdefault(pid, found[pid][1])

    def titles(self) -> dict[int, str]:
        """Title by process id of those that live; Ray writes the method that an actor executes into its title."""
        return {pid: title for pid in self._seen if self.lives(pid) and (title := _title(pid))}

    def lives(self, pid: int) -> bool:
        """Whether a process seen before still runs; a zombie does not."""
        facts = _stat(pid)
        return facts is not None and facts[1] == self._seen.get(pid) and facts[2] not in "ZX"

    def alive(self) -> list[int]:
        """Processes that live, the parent included."""
        return [pid for pid in self._seen if self.lives(pid)]


def of_role(titles: dict[int, str], role: str, parent: int) -> list[int]:
    """Processes of a role."""
    if role == "driver":
        return [parent]
    return [pid for pid, title in titles.items() if title.startswith(ROLES[role])]


def phase_of(titles: dict[int, str], folder: Path, iterations: int) -> str:
    """The phase of a run; `scoring` is what lies between drawing and learning."""
    done = rows(folder)
    if done > iterations or (folder / "export").exists():
        return "export"
    methods = {title.removeprefix("ray::") for title in titles.values()}
    found = next((name for name, of in _METHODS.items() if methods & set(of)), None)
    if found is None and any((folder / "checkpoints").glob(".*.partial")):
        return "saving"
    if found in ("loading", "learning", "saving"):
        return found
    started = any(title.startswith(ROLES["learner"]) for title in titles.values())
    if not done:
        return "calibration" if started else "start"
    if not any(title.startswith("ray::") for title in titles.values()):
        # One process, or Ray that starts again.
        return "iterating"
    return (found or "scoring") if started else "start"


def rows(folder: Path) -> int:
    """Recorded rows of metrics."""
    file = folder / "metrics.jsonl"
    try:
        return len(read_metrics(file)) if file.exists() else 0
    except (OSError, ValueError):
        return 0


def _stat(pid: int) -> tuple[int, str, str] | None:
    """(parent, start time, state)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), fields[19], fields[0]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace").strip()
    except OSError:
        return ""


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
