"""What is injected: cases of faults, roles and phases, drawn at random from a seed."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.soak.faults import CLOSED, SIGNALS, Injection
from tests.soak.processes import PHASES

ITERATIONS = 3
"""On Ray float32 sums differ by their order, and the difference grows tenfold per iteration: 1e-6, 2e-5, 3e-4, 2e-2."""
SURVIVED = ("learner", "rollout", "reward", "controller")
"""Roles whose loss must not end the command."""
_LATER = [name for name in PHASES if name not in ("start", "loading", "calibration", "export")]
_RANKS = [name for name in PHASES if name not in ("start", "iterating")]
_PER_CASE = 9


@dataclass(frozen=True)
class Combination:
    """What is counted: a fault of a role in a phase."""

    fault: str
    role: str
    phase: str
    backend: str

    def __str__(self) -> str:
        return f"{self.fault} {self.role} {self.phase} {self.backend}"


@dataclass
class Case:
    """One run and its faults."""

    seed: int
    backend: str
    overrides: list[str] = field(default_factory=list)
    injections: list[Injection] = field(default_factory=list)

    def has(self, role: str) -> bool:
        """Whether a fault is of this role."""
        return any(one.role == role for one in self.injections)


def _product(faults: Iterable[str], role: str, phases: Iterable[str], backend: str) -> list[Combination]:
    return [Combination(fault, role, phase, backend) for fault in faults for phase in phases]


_ON_RAY = [one for role in SURVIVED for one in _product(SIGNALS, role, _RANKS, "ray")]
_ON_RAY += _product(SIGNALS, "driver", ["start", *_RANKS], "ray")
GROUPS: list[list[Combination]] = [
    _ON_RAY,
    _product(SIGNALS, "driver", ["start", "iterating", "saving", "export"], "local")
    + _product(["damaged checkpoint"], "driver", ["iterating", "saving", "export"], "local"),
    _product(["full disk"], "disk", ["iterating", "saving", "export"], "local"),
    _product(["full disk"], "disk", ["scoring", "saving", "export"], "ray"),
    _product(["SIGKILL", "SIGSTOP", CLOSED], "mlflow", ["start", "iterating", "export"], "local"),
    _product(["nan", "hang", "memory"], "reward", ["calibration", "drawing", "learning"], "ray"),
]
"""Combinations of one group may share a run."""


def draw(seed: int, wanted: Callable[[Combination], bool] = lambda _: True) -> Case | None:
    """The case of a seed.

    Args:
        seed: decides everything that is random.
        wanted: which combinations may be injected.

    Returns:
        A run with several faults; None if no combination is wanted.
    """
    chosen = random.Random(seed)
    left = [[one for one in group if wanted(one)] for group in GROUPS]
    if not any(left):
        return None
    place = chosen.choices(range(len(left)), weights=[len(group) for group in left])[0]
    signals = GROUPS[place] is _ON_RAY
    found = chosen.sample(left[place], len(left[place]))
    # Exports, and all phases of the other runs, have time for one fault each.
    short = {"export"} if signals else set(PHASES)
    first = {one.phase: one for one in reversed(found)}
    found = [one for one in found if one.phase not in short or first[one.phase] is one]
    injections = [
        Injection(one.fault, one.role, one.phase, _after(chosen, one.phase), chosen.randrange(2**32))
        for one in found[:_PER_CASE]
    ]
    overrides = []
    if found[0].backend == "ray":
        overrides += _engine(chosen)
        overrides += ["rollout.num_workers=2"] if signals else ["rewards.replicas=2", "rewards.attempt_timeout_s=20"]
    return Case(seed, found[0].backend, overrides, _in_order(injections))


def again(record: Mapping[str, Any]) -> Case:
    """The case of a record of the log."""
    injections = [Injection(**one | {"done": False, "seen": ""}) for one in record["injections"]]
    return Case(record["seed"], record["backend"], record["overrides"], injections)


def survived(records: Iterable[Mapping[str, Any]]) -> Counter[Combination]:
    """How often each combination was injected into runs without problems."""
    return Counter(
        Combination(one["fault"], one["role"], one["phase"], record["backend"])
        for record in records
        for one in record["injections"]
        if one["done"] and not record["problems"]
    )


def _engine(chosen: random.Random) -> list[str]:
    stage = chosen.choice(["0", "1", "2", "2", "3"])
    return [
        "cluster.max_restarts=12", "learner.num_ranks=2", f"learner.zero_stage={stage}",
        "rollout.cpus_per_worker=0.1", "rewards.cpus_per_replica=0.1", "learner.cpus_per_rank=0.2",
    ]  # fmt: skip


def _in_order(injections: list[Injection]) -> list[Injection]:
    """Sorted by the time at which each is due."""
    return sorted(injections, key=lambda one: (one.after, PHASES.index(one.phase)))


def _after(chosen: random.Random, phase: str) -> int:
    if phase == "export":
        return ITERATIONS + 1
    return chosen.randrange(1, ITERATIONS) if phase in _LATER else 0
