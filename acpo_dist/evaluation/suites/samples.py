"""Samples of an evaluation on disk: one JSON line each, appended by chunk and verified on resume."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from acpo_dist.core.errors import ResumeError
from acpo_dist.core.files import replace_file
from acpo_dist.core.json_text import read_object
from acpo_dist.data.encoded import digest
from acpo_dist.tracking.jsonl import mend_last_line, parse_object

PLAN = "plan.json"
SAMPLES = "samples.jsonl"
REPORT = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of one arm with its scores."""

    arm: str
    """`model` or `comparison`."""
    sample_id: str
    """Equal in both arms for the same prompt and seed, or the same file name."""
    prompt_id: int
    prompt: str
    category: str
    seed: int | None
    """None for an existing image."""
    image: str
    """Path relative to the evaluation folder; the original name for an existing image."""
    sha256: str
    """SHA-256 of the encoded image."""
    schedule_id: str | None = None
    """Trajectory that the image was sampled with."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """Raw scores in each judge's own unit; None if it failed."""
    errors: dict[str, str] = field(default_factory=dict)
    """Judge -> reason for the missing score."""


class SampleLog:
    """`samples.jsonl` and the images of an evaluation folder."""

    def __init__(self, folder: Path) -> None:
        """Initialise the log; call `start` next.

        Args:
            folder: evaluation folder.
        """
        self.folder = folder
        self._rows: dict[tuple[str, str], Sample] = {}

    @property
    def rows(self) -> list[Sample]:
        """Return all samples, by arm in order of appearance, then by sample id."""
        return list(self._rows.values())

    def check(self, plan: dict[str, Any], *, resume: bool) -> dict[str, Any]:
        """Check that the folder can be used; nothing is written.

        Args:
            plan: all settings that determine the metrics.
            resume: whether to continue the evaluation in the folder.

        Returns:
            The plan to write into the folder.

        Raises:
            ResumeError: the folder holds an evaluation and `resume` is off, or its plan differs.
        """
        path = self.folder / PLAN
        if path.exists() and not resume:
            raise ResumeError(
                f"{self.folder} already holds an evaluation. Continue it with --resume, or choose another --out."
            )
        if path.exists():
            old = read_object(path, ResumeError)
            require_same(old, plan, self.folder)
            # The file may still hold scores of judges that this call does not use.
            plan = {**plan, "judges": {**old["judges"], **plan["judges"]}}
        return plan

    def start(self, plan: dict[str, Any]) -> None:
        """Write the plan that `check` returned, and read the samples of an earlier call."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / PLAN, json.dumps(plan, indent=2, ensure_ascii=False).encode())
        log = self.folder / SAMPLES
        mend_last_line(log)
        lines = log.read_bytes().splitlines() if log.exists() else []
        for line in lines:
            mapping = parse_object(line)
            if mapping is not None:
                row = Sample(**mapping)
                self._rows[row.arm, row.sample_id] = row

    def verify(self, holds: Callable[[Sample], bool]) -> int:
        """Drop the samples whose image fails the check, and return their number."""
        broken = [key for key, row in self._rows.items() if not holds(row)]
        for key in broken:
            del self._rows[key]
        return len(broken)

    def find(self, arm: str, sample_id: str) -> Sample | None:
        """Return an existing sample, or None."""
        return self._rows.get((arm, sample_id))

    def append(self, rows: Sequence[Sample]) -> None:
        """Append finished samples and flush them to disk."""
        text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        with (self.folder / SAMPLES).open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self._rows.update({(row.arm, row.sample_id): row for row in rows})

    def finish(self, order: Iterable[tuple[str, str]], judges: Sequence[str]) -> None:
        """Rewrite the file with one line per sample.

        Args:
            order: (arm, sample id) of each line.
            judges: names of the judges whose scores are written.
        """
        rows = [_with_judges(self._rows[key], judges) for key in order]
        self._rows = {(row.arm, row.sample_id): row for row in rows}
        text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        replace_file(self.folder / SAMPLES, text.encode())

    def image_path(self, arm: str, sample_id: str) -> str:
        """Return the path of a sampled image relative to the folder."""
        return f"images/{arm}/{sample_id}.png"

    def write_image(self, name: str, data: bytes) -> None:
        """Write the bytes of an image."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def read_image(self, row: Sample) -> bytes:
        """Return the bytes of a sampled image, or no bytes if the file is missing."""
        path = self.folder / row.image
        return path.read_bytes() if path.is_file() else b""

    def image_holds(self, row: Sample) -> bool:
        """Return whether a sampled image matches its checksum."""
        return digest(self.read_image(row)) == row.sha256


def require_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Check that two evaluations have the same plan, except for added judges.

    Raises:
        ResumeError: the plans differ; the message lists the differences.
    """
    known = {name: facts for name, facts in new.get("judges", {}).items() if name in old.get("judges", {})}
    before = {name: old["judges"][name] for name in known}
    pairs = [(key, old.get(key), new.get(key)) for key in sorted((set(old) | set(new)) - {"judges", "software"})]
    differences = [
        text for key, was, now in [*pairs, ("judges", before, known)] for text in _differences(key, was, now)
    ]
    if differences:
        raise ResumeError(
            f"--resume: {folder} was started with another plan: {'; '.join(differences[:5])}. Restore these values, "
            "or choose another --out."
        )


def _differences(name: str, was: Any, now: Any) -> list[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        return [
            text
            for key in sorted(set(was) | set(now))
            for text in _differences(f"{name}.{key}", was.get(key), now.get(key))
        ]
    return [] if was == now else [f"{name} was {was!r}, is {now!r}"]


def _with_judges(row: Sample, judges: Sequence[str]) -> Sample:
    return replace(
        row,
        scores={name: row.scores.get(name) for name in judges},
        errors={name: row.errors[name] for name in judges if name in row.errors},
    )
