"""What is injected: cases of faults, roles and phases, drawn at random from a seed."""

import random
from dataclasses import dataclass, field, replace

from tests.soak.faults import CLOSED, SIGNALS, Injection
from tests.soak.processes import PHASES

ITERATIONS = 3
"""On Ray float32 sums differ by their order, and the difference grows tenfold per iteration: 1e-6, 2e-5, 3e-4, 2e-2."""
_LATER = [name for name in PHASES if name not in ("start", "loading", "calibration", "export")]
_RANKS = [name for name in PHASES if name not in ("start", "iterating")]
SURVIVED = ("learner", "rollout", "reward", "controller")
"""Roles whose loss must not end the command."""
_DISK_PHASES = {"local": ("iterating", "saving", "export"), "ray": ("scoring", "saving", "export")}
_REWARD_FAULTS, _REWARD_PHASES = ("nan", "hang", "memory"), ("calibration", "drawing", "learning")
_TRACKING_FAULTS, _TRACKING_PHASES = ("SIGKILL", "SIGSTOP", CLOSED), ("start", "iterating", "export")
_PER_CASE = 6
"""Signals in one run of `every`."""


@dataclass
class Case:
    """One run and its faults."""

    seed: int
    backend: str
    overrides: list[str] = field(default_factory=list)
    injections: list[Injection] = field(default_factory=list)
    small_disk: bool = False
    mlflow: bool = False
    """Whether the run is tracked by an MLflow server, which the faults disturb."""


def draw(seed: int, kind: str = "any") -> Case:
    """The case of a seed.

    Args:
        seed: decides everything that is random.
        kind: one of `KINDS`, `any` for all of them at random, or `all` for every
            combination of fault, role and phase in turn: `len(every(0))` seeds that follow each other have each once.
    """
    chosen = random.Random(seed)
    if kind == "all":
        turn, place = divmod(seed, len(every(0)))
        return _seeded(replace(every(turn)[place], seed=seed), chosen)
    if kind == "any":
        kind = chosen.choice(["learner", "roles", "roles", "local", "local", "disk", "reward", "tracking"])
    return _seeded(KINDS[kind](seed, chosen), chosen)


def every(turn: int) -> list[Case]:
    """Cases that together inject each combination of fault, role and phase once.

    Args:
        turn: decides which combinations share a run, and the order of the cases; their number is always the same.
    """
    chosen = random.Random(turn)
    signals = [
        Injection(fault, role, phase, _after(chosen, phase))
        for role in ("driver", *SURVIVED)
        for fault in SIGNALS
        for phase in (["start", *_RANKS] if role == "driver" else _RANKS)
    ]
    chosen.shuffle(signals)
    cases = [
        Case(0, "ray", [*_engine(chosen), "rollout.num_workers=2"], _in_order(signals[at : at + _PER_CASE]))
        for at in range(0, len(signals), _PER_CASE)
    ]
    cases += [
        Case(0, "local", [], [Injection(fault, "driver", phase, _after(chosen, phase))])
        for fault in (*SIGNALS, "damaged checkpoint")
        for phase in ("start", "iterating", "saving", "export")
        if (fault, phase) != ("damaged checkpoint", "start")
    ]
    cases += [_full_disk(backend, phase, chosen) for backend in _DISK_PHASES for phase in _DISK_PHASES[backend]]
    cases += [_tracking_lost(fault, phase, chosen) for fault in _TRACKING_FAULTS for phase in _TRACKING_PHASES]
    cases += [_faulty_reward(fault, phase, chosen) for fault in _REWARD_FAULTS for phase in _REWARD_PHASES]
    chosen.shuffle(cases)
    return cases


def _seeded(case: Case, chosen: random.Random) -> Case:
    for injection in case.injections:
        injection.seed = chosen.randrange(2**32)
    return case


def _engine(chosen: random.Random) -> list[str]:
    stage = chosen.choice(["0", "1", "2", "2", "3"])
    return [
        "cluster.max_restarts=8", "learner.num_ranks=2", f"learner.zero_stage={stage}",
        "rollout.cpus_per_worker=0.1", "rewards.cpus_per_replica=0.1", "learner.cpus_per_rank=0.2",
    ]  # fmt: skip


def _in_order(injections: list[Injection]) -> list[Injection]:
    """Sorted by the time at which each is due."""
    return sorted(injections, key=lambda one: (one.after, PHASES.index(one.phase)))


def _after(chosen: random.Random, phase: str) -> int:
    if phase == "export":
        return ITERATIONS + 1
    return chosen.randrange(1, ITERATIONS) if phase in _LATER else 0


def _learner(seed: int, chosen: random.Random) -> Case:
    phases = [chosen.choice(_RANKS) for _ in range(4)]
    injections = [Injection("SIGKILL", "learner", phase, _after(chosen, phase)) for phase in phases]
    return Case(seed, "ray", _engine(chosen), _in_order(injections))


def _roles(seed: int, chosen: random.Random) -> Case:
    injections = []
    for _ in range(3):
        fault = chosen.choice(["SIGKILL", "SIGKILL", "SIGSTOP", "SIGTERM"])
        role = chosen.choice(["driver", *SURVIVED])
        phase = chosen.choice(["start", *_RANKS] if role == "driver" else _RANKS)
        injections.append(Injection(fault, role, phase, _after(chosen, phase)))
    workers = ["rollout.num_workers=2"] if chosen.random() < 0.5 else []
    return Case(seed, "ray", [*_engine(chosen), *workers], _in_order(injections))


def _local(seed: int, chosen: random.Random) -> Case:
    fault = chosen.choice(["SIGKILL", "SIGTERM", "SIGSTOP", "damaged checkpoint"])
    phases = ["iterating", "saving", "export", *(["start"] if fault != "damaged checkpoint" else [])]
    return Case(seed, "local", [], _in_order([_of(chosen, fault, phases), _of(chosen, "SIGKILL", phases)]))


def _of(chosen: random.Random, fault: str, phases: list[str]) -> Injection:
    phase = chosen.choice(phases)
    return Injection(fault, "driver", phase, _after(chosen, phase))


def _disk(seed: int, chosen: random.Random) -> Case:
    backend = chosen.choice(["local", "local", "ray"])
    return replace(_full_disk(backend, chosen.choice(_DISK_PHASES[backend]), chosen), seed=seed)


def _full_disk(backend: str, phase: str, chosen: random.Random) -> Case:
    overrides = _engine(chosen) if backend == "ray" else []
    return Case(0, backend, overrides, [Injection("full disk", "disk", phase, _after(chosen, phase))], True)


def _reward(seed: int, chosen: random.Random) -> Case:
    return replace(_faulty_reward(chosen.choice(_REWARD_FAULTS), chosen.choice(_REWARD_PHASES), chosen), seed=seed)


def _faulty_reward(fault: str, phase: str, chosen: random.Random) -> Case:
    overrides = [*_engine(chosen), "rewards.replicas=2", "rewards.attempt_timeout_s=20"]
    return Case(0, "ray", overrides, [Injection(fault, "reward", phase, _after(chosen, phase))])


def _tracking(seed: int, chosen: random.Random) -> Case:
    return replace(_tracking_lost(chosen.choice(_TRACKING_FAULTS), chosen.choice(_TRACKING_PHASES), chosen), seed=seed)


def _tracking_lost(fault: str, phase: str, chosen: random.Random) -> Case:
    return Case(0, "local", [], [Injection(fault, "mlflow", phase, _after(chosen, phase))], mlflow=True)


KINDS = {
    "learner": _learner, "roles": _roles, "local": _local, "disk": _disk, "reward": _reward, "tracking": _tracking
}  # fmt: skip
"""Kinds of cases that are drawn at random."""
