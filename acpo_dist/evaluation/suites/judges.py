"""Judges by name, their versions, and scores with recorded failures."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from acpo_dist.config.plugins import MetricConfig
from acpo_dist.core.errors import RewardConfigError, WorkerError
from acpo_dist.data.decoding import at_once
from acpo_dist.rewards.naming import metric_section
from acpo_dist.workers.reward.worker import RewardWorker

CHUNK = 16
"""Images per request; fixed, so that scores do not depend on the number of workers."""
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".json", ".txt"})


class JudgePool(Protocol):
    """Loaded judges, local or remote."""

    def submit(self, judge: str, images: Tensor, prompts: Sequence[str]) -> Callable[[], list[float]]:
        """Start to score images of one size.

        Args:
            judge: name of the judge.
            images: uint8 (B, 3, H, W).
            prompts: B prompts.

        Returns:
            Function that waits for the B scores. It raises the judge's exception, or WorkerError if the pool is lost.
        """
        ...


class LocalJudges(JudgePool):
    """Judges in the current process; scoring runs when the result is requested."""

    def __init__(self, sections: Sequence[Any], *, device: str) -> None:
        """Load all judges.

        Args:
            sections: configuration sections of the judges.
            device: torch device.

        Raises:
            RewardConfigError: a judge cannot be built.
        """
        self._workers = {
            section.name: RewardWorker(section, model=None, cut="image", wire_dtype="float32", device=device)
            for section in sections
        }

    @override
    def submit(self, judge: str, images: Tensor, prompts: Sequence[str]) -> Callable[[], list[float]]:
        return lambda: self._workers[judge].score(images, prompts)


@dataclass
class Judgement:
    """Scores of one image."""

    scores: dict[str, float | None] = field(default_factory=dict)
    """None if the judge failed."""
    errors: dict[str, str] = field(default_factory=dict)
    """Judge -> reason for the missing score."""


class PendingJudgement:
    """Pending requests for one chunk of images."""

    def __init__(
        self, pool: JudgePool, judges: Sequence[str], images: Sequence[Tensor], prompts: Sequence[str]
    ) -> None:
        """Submit one request per judge and run of images of equal size.

        Args:
            pool: judges.
            judges: names of the judges.
            images: uint8 RGB, each (3, H, W).
            prompts: one per image.
        """
        self._pool, self._images, self._prompts = pool, images, prompts
        self._requests = [
            (judge, rows, self._submit(judge, rows)) for rows in _runs_of_one_size(images) for judge in judges
        ]

    def result(self) -> list[Judgement]:
        """Wait for the scores.

        A failed request is repeated image by image, so that only the failing images lose their scores.

        Returns:
            One judgement per image, in order.

        Raises:
            WorkerError: the pool is lost; no image is at fault.
        """
        found = [Judgement() for _ in self._images]
        for judge, rows, wait in self._requests:
            scores, error = _try(wait)
            if error is None:
                for row, score in zip(rows, scores, strict=True):
                    found[row].scores[judge] = score
                continue
            for row in rows:
                if len(rows) > 1:
                    scores, error = _try(self._submit(judge, range(row, row + 1)))
                found[row].scores[judge] = None if error else scores[0]
                if error:
                    found[row].errors[judge] = error
        return found

    def _submit(self, judge: str, rows: range) -> Callable[[], list[float]]:
        return self._pool.submit(
            judge, torch.stack([self._images[row] for row in rows]), [self._prompts[row] for row in rows]
        )


def judge_sections(texts: Sequence[str]) -> tuple[Any, ...]:
    """Parse judge specifications.

    Args:
        texts: names from `acpo rewards list`, `pyiqa:NAME`, `module:Class`, several of them separated by commas, or a
            YAML section such as `{type: pick_score, weights: FOLDER}`.

    Returns:
        Configuration sections of the judges.

    Raises:
        RewardConfigError: a judge is unknown or unusable, or two have the same name.
    """
    parts = [part for text in texts for part in ([text] if text.lstrip().startswith("{") else text.split(","))]
    sections = tuple(_section(part.strip()) for part in parts if part.strip())
    check_names(sections)
    return sections


def check_names(sections: Sequence[Any]) -> None:
    """Check that the names of judges are unique.

    Raises:
        RewardConfigError: two judges have the same name.
    """
    names = [section.name for section in sections]
    for name in names:
        if names.count(name) > 1:
            raise RewardConfigError(f"two judges have the name `{name}`: omit one, or give each its own `name`.")


def judge_facts(section: Any) -> dict[str, Any]:
    """Return the settings of a judge and the SHA-256 of its local weights."""
    facts: dict[str, Any] = {"settings": section.model_dump(mode="json"), "higher_is_better": section.direction > 0}
    weights = getattr(section, "weights", None)
    if weights and Path(weights).expanduser().exists():
        facts["weights_sha256"] = weights_digest(Path(weights).expanduser())
    return facts


def weights_digest(path: Path) -> str:
    """Compute the SHA-256 of a file, or of all weights and settings in a folder with their relative names."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file() and entry.suffix in _WEIGHTS):
        whole.update(f"{file.relative_to(path)}|{weights_digest(file)}\n".encode())
    return whole.hexdigest()


def _section(text: str) -> MetricConfig:
    """Return the validated section of one judge."""
    section = metric_section(text, "--judges")
    if getattr(section, "weights", None) == "train":
        raise RewardConfigError(f"--judges {text}: weights `train` belong to a run; give the file that it trained")
    return section


def _runs_of_one_size(images: Sequence[Tensor]) -> Iterator[range]:
    """Yield runs of consecutive rows of one size, shorter for large images; depends only on the images."""
    start = 0
    for row in range(1, len(images) + 1):
        full = row - start == at_once(images[start], CHUNK)
        if row == len(images) or full or images[row].shape != images[start].shape:
            yield range(start, row)
            start = row


def _try(wait: Callable[[], list[float]]) -> tuple[list[float], str | None]:
    try:
        return wait(), None
    except WorkerError:
        raise
    except Exception as error:  # a judge may be user code; its exception is recorded beside the sample
        text = str(error).strip().splitlines()
        return [], f"{type(error).__name__}: {text[0] if text else 'no message'}"
