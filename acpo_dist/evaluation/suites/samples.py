"""The samples of an evaluation on disk: one JSON line each, written by the chunk, verified before they are believed."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from acpo_dist.core.errors import ResumeError
from acpo_dist.evaluation.suites.images import digest
from acpo_dist.tracking.jsonl import mend_last_line, parse_object, replace_file

PLAN = "plan.json"
SAMPLES = "samples.jsonl"
REPORT = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of one arm, and what the judges said of it."""

    arm: str
    """`model` or `comparison`."""
    sample_id: str
    """The same in both arms: same prompt, same seed, or same name."""
    prompt_id: int
    prompt: str
    category: str
    seed: int | None
    """None for an image that was there already."""
    image: str
    """Path below the evaluation folder; for an image that was there already its name there."""
    sha256: str
    """Of the encoded image."""
    schedule_id: str | None = None
    """Trajectory that it was drawn along."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """Raw scores in each judge's own unit; None where it failed."""
    errors: dict[str, str] = field(default_factory=dict)
    """Judge -> why it has no score."""


class SampleLog:
    """`samples.jsonl` and the images of an evaluation folder."""

    def __init__(self, folder: Path) -> None:
        """Use a folder; `start` comes next."""
        self.folder = folder
        self._rows: dict[tuple[str, str], Sample] = {}

    @property
    def rows(self) -> list[Sample]:
        """All samples, in the order of arms as they came and of sample ids."""
        return list(self._rows.values())

    def check(self, plan: dict[str, Any], *, resume: bool) -> dict[str, Any]:
        """Refuse a folder that is taken; nothing is written.

        Args:
            plan: everything that fixes the numbers.

        Returns:
            The plan that belongs into the folder.

        Raises:
            ResumeError: the folder holds an evaluation and is not to be gone on with, or was begun with another plan.
        """
        path = self.folder / PLAN
        if path.exists() and not resume:
            raise ResumeError(
                f"{self.folder} already holds an evaluation. Go on with it by --resume, or choose another --out."
            )
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            require_same(old, plan, self.folder)
            # Scores of judges that are left out this time still wait in the file.
            plan = {**plan, "judges": {**old["judges"], **plan["judges"]}}
        return plan

    def start(self, plan: dict[str, Any]) -> None:
        """Write the plan that `check` gave, and read what an earlier call finished."""
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
        """Forget the samples whose image does not hold; returns how many."""
        broken = [key for key, row in self._rows.items() if not holds(row)]
        for key in broken:
            del self._rows[key]
        return len(broken)

    def find(self, arm: str, sample_id: str) -> Sample | None:
        """A sample that is there already."""
        return self._rows.get((arm, sample_id))

    def append(self, rows: Sequence[Sample]) -> None:
        """Write finished samples, and have them on disk when this returns."""
        text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        with (self.folder / SAMPLES).open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self._rows.update({(row.arm, row.sample_id): row for row in rows})

    def finish(self, order: Iterable[tuple[str, str]], judges: Sequence[str]) -> None:
        """Rewrite the file once: one line per sample, in the given order of (arm, sample id), these judges alone."""
        rows = [_with_judges(self._rows[key], judges) for key in order]
        self._rows = {(row.arm, row.sample_id): row for row in rows}
        text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        replace_file(self.folder / SAMPLES, text.encode())

    def image_path(self, arm: str, sample_id: str) -> str:
        """Where a drawn image lies, below the folder."""
        return f"images/{arm}/{sample_id}.png"

    def write_image(self, name: str, data: bytes) -> None:
        """Write the bytes of an image."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def read_image(self, row: Sample) -> bytes:
        """The bytes of a drawn image, or nothing if the file is gone."""
        path = self.folder / row.image
        return path.read_bytes() if path.is_file() else b""

    def image_holds(self, row: Sample) -> bool:
        """Whether a drawn image is what was judged."""
        return digest(self.read_image(row)) == row.sha256


def require_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Refuse to mix two evaluations; judges may be added.

    Raises:
        ResumeError: names what differs.
    """
    known = {name: facts for name, facts in new.get("judges", {}).items() if name in old.get("judges", {})}
    before = {name: old["judges"][name] for name in known}
    pairs = [(key, old.get(key), new.get(key)) for key in sorted((set(old) | set(new)) - {"judges", "software"})]
    differences = [
        text for key, was, now in [*pairs, ("judges", before, known)] for text in _differences(key, was, now)
    ]
    if differences:
        raise ResumeError(
            f"--resume: {folder} was begun with another plan: {'; '.join(differences[:5])}. Restore these values, or "
            "choose another --out."
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
