"""What one look at a machine, a configuration or a cluster found."""

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
    """One line of the answer."""

    check: str
    """What was looked at."""
    verdict: Verdict
    """`note` is for the user to know; `warning` will cost time or memory; what `failed` ends a run that needs it."""
    found: str
    """What was there."""
    advice: str = ""
    """What to do about it."""

    def to_mapping(self) -> dict[str, str]:
        """Plain data."""
        return asdict(self)


def judged(good: bool, check: str, found: str, advice: str, *, otherwise: Verdict = "warning") -> Finding:
    """`ok`, or what it is `otherwise`, and the advice only then."""
    return Finding(check, "ok", found) if good else Finding(check, otherwise, found, advice)


Check = Callable[[], Iterable[Finding]]


def worst(findings: Iterable[Finding]) -> Verdict:
    """The most serious verdict; `ok` of nothing."""
    return _ORDER[max((_ORDER.index(finding.verdict) for finding in findings), default=0)]


def run_checks(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Findings of named checks, one after the other. A check that itself fails is a finding, not the end."""
    for name, check in checks:
        try:
            yield from check()
        except AcpoError as error:
            yield Finding(name, "failed", str(error))
        except Exception as error:
            # Whatever it is, the other checks still tell the user something.
            yield Finding(name, "failed", f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    succeeded: bool
    text: str
    """Its last line on standard output; where it failed, the last line that it complained with."""


def in_child(program: str, *arguments: str, timeout_s: float = 120.0) -> Outcome:
    """Run a Python program in a process of its own: a library that crashes takes only that with it."""
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
