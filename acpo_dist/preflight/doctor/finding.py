"""Findings of the checks of a machine, a configuration or a cluster."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from acpo_dist.core.errors import AcpoError

Verdict = Literal["ok", "note", "warning", "failed"]
_ORDER: tuple[Verdict, ...] = ("ok", "note", "warning", "failed")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    """Subject of the check."""
    verdict: Verdict
    """`note` is information; `warning` costs time or memory; `failed` ends a run that depends on the subject."""
    found: str
    """Observed state."""
    advice: str = ""
    """Remedy."""

    def to_mapping(self) -> dict[str, str]:
        """Return JSON-compatible data."""
        return asdict(self)


def judged(good: bool, check: str, found: str, advice: str, *, otherwise: Verdict = "warning") -> Finding:
    """Return an `ok` finding if `good`, else a finding with the verdict `otherwise` and the advice."""
    return Finding(check, "ok", found) if good else Finding(check, otherwise, found, advice)


Check = Callable[[], Iterable[Finding]]


def worst(findings: Iterable[Finding]) -> Verdict:
    """Return the most serious verdict; `ok` without findings."""
    return _ORDER[max((_ORDER.index(finding.verdict) for finding in findings), default=0)]


def run_checks(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Run named checks in order and yield their findings. An exception in a check becomes a finding."""
    for name, check in checks:
        try:
            yield from check()
        except AcpoError as error:
            yield Finding(name, "failed", str(error))
        except Exception as error:
            # The other checks are still useful to the user, whatever the error.
            yield Finding(name, "failed", f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Outcome:
    """Result of a child process."""

    succeeded: bool
    text: str
    """Last line of standard output; if the program failed, last line of standard error."""


def in_child(program: str, *arguments: str, timeout_s: float = 120.0) -> Outcome:
    """Run a Python program in a separate process, so that a crash of a library does not end this one.

    Args:
        program: Python source code.
        arguments: command line arguments.
        timeout_s: time limit in seconds.

    Returns:
        The result.
    """
    command = [sys.executable, "-c", program, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(False, f"no end within {timeout_s:g} s")
    if done.returncode == 0:
        return Outcome(True, _last(done.stdout))
    if done.returncode < 0:
        return Outcome(False, f"ended by signal {-done.returncode}")
    return Outcome(False, _last(done.stderr) or f"exit code {done.returncode}")


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
