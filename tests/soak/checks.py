"""What must hold after a run that was disturbed."""

import math
import re
from pathlib import Path

from acpo_dist.core.errors import LONGEST, AcpoError
from acpo_dist.training.run_lock import LOCK_FILE, lock_holder, sign_of
from acpo_dist.workers.learner.checkpoint import open_checkpoint

_LINE = re.compile(r"^\w+Error: ")


def compare(found: list[dict[str, float]], expected: list[dict[str, float]], *, exact: bool) -> list[str]:
    """Differences between the metrics of a run and of its undisturbed twin.

    Args:
        exact: bit for bit; else to rounding, since float32 sums depend on which requests meet at a replica.
    """
    mine, theirs = ([row["iteration"] for row in rows] for rows in (found, expected))
    if mine != theirs:
        return [f"iterations {mine}, expected {theirs}"]
    problems = []
    for one, other in zip(found, expected, strict=True):
        if one.keys() != other.keys():
            problems.append(f"iteration {one['iteration']}: keys {sorted(one.keys() ^ other.keys())}")
        for name in one.keys() & other.keys():
            same = one[name] == other[name] or (
                not exact and math.isclose(one[name], other[name], rel_tol=2e-3, abs_tol=5e-4)
            )
            if not same:
                problems.append(f"iteration {one['iteration']}: {name} {one[name]}, expected {other[name]}")
    return problems


def ending(code: int, output: str, *, signalled: bool) -> list[str]:
    """What is wrong with how a process ended: a traceback, or no clear message where it failed.

    Args:
        code: its return code.
        output: what it wrote.
        signalled: whether the process itself received a signal that ends it.
    """
    problems = ["a traceback was printed"] if "Traceback (most recent call last)" in output else []
    if code in (-9, 137) and signalled:
        return problems
    if code == -15 and signalled and not output.strip():
        # While Python starts, before anything is begun, SIGTERM has its default effect.
        return []
    lines = output.strip().splitlines()
    if code in (143, 130) and signalled:
        return (
            problems if any("continue with" in line for line in lines) else [*problems, "no command to continue with"]
        )
    if code:
        named = [line for line in lines if _LINE.match(line)]
        if code < 0 or not named:
            problems.append(f"exit code {code} without a message: {lines[-1:]}")
        elif len(named) > 1 or len(output[output.index(named[0]) :]) > 2 * LONGEST:
            problems.append(f"exit code {code}: {len(named)} messages of {len(output)} characters")
    return problems


def folder_left(folder: Path) -> list[str]:
    """What is wrong with the run folder of a finished run: partial files, damaged checkpoints, a held lock."""
    problems = [f"left: {path.relative_to(folder)}" for path in folder.rglob("*.partial")]
    problems += [f"left: {path.relative_to(folder)}" for path in folder.rglob("*.tmp*")]
    checkpoints = sorted((folder / "checkpoints").glob("[0-9]*"))
    for path in checkpoints:
        try:
            open_checkpoint(path)
        except AcpoError as error:
            problems.append(str(error))
    if not checkpoints:
        problems.append("no checkpoint")
    holder = lock_holder(folder)
    if (folder / LOCK_FILE).exists() and (holder is None or sign_of(holder) != "gone"):
        problems.append(f"the run lock is held by {holder}")
    if not (folder / "export" / "acpo.json").is_file():
        problems.append("no export")
    return problems
