"""A run's folder: its resolved configuration, where it left off, and whether a configuration may continue it."""

import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from acpo_dist.config.load import dump, load_config
from acpo_dist.config.schema import Config
from acpo_dist.core.errors import CheckpointError, ResumeError
from acpo_dist.tracking.jsonl import replace_file
from acpo_dist.workers.learner.checkpoint import Checkpoint, CheckpointStore, open_checkpoint

logger = logging.getLogger(__name__)

RESOLVED = "resolved.yaml"
METRICS = "metrics.jsonl"

# What may change when a run goes on: where it runs and how long, but not what it computes.
_FREE = {
    "run": {"name", "dir", "iterations"},
    "model": {"memory", "speed", "offline"},
    # Chunks hold independent samples: another size changes rounding alone, and a run that ran out of memory needs it.
    "rollout": {"num_workers", "batch_size", "cpus_per_worker", "gpus_per_worker"},
    "rewards": {"replicas", "cpus_per_replica", "gpus_per_replica", "deadline_s", "attempt_timeout_s", "pool", "http"},
    "learner": {
        "num_ranks", "zero_stage", "offload_optimizer", "micro_batch", "cpus_per_rank", "gpus_per_rank", "timeout_s",
        "max_skipped_steps",
    },
    "guard": None,
    "checkpoint": None,
    "tracking": None,
    "cluster": None,
}  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and its checkpoints."""

    root: Path
    checkpoints: CheckpointStore
    require_ours: Callable[[], None] = lambda: None
    """Raises `RunTakenError` once another process drives the run."""

    @property
    def metrics(self) -> Path:
        """One JSON object per iteration."""
        return self.root / METRICS

    @property
    def guard(self) -> Path:
        """One JSON object per decision of the guard that was due for a line."""
        return self.root / "guard.jsonl"

    @property
    def skipped(self) -> Path:
        """One JSON object per optimiser step that was left out."""
        return self.root / "skipped_steps.jsonl"

    @property
    def samples(self) -> Path:
        """Sample grids."""
        return self.root / "samples"

    @property
    def export(self) -> Path:
        """The tuned pipeline."""
        return self.root / "export"


def open_run(config: Config, resume: str | None) -> tuple[RunFolder, Checkpoint | None]:
    """Make or continue the run folder.

    Args:
        resume: None starts afresh and refuses a folder that already holds a run; `auto` continues from the newest good
            checkpoint, or starts afresh if there is none; a path is a run folder or one checkpoint of one, which is
            copied into the run's own folder where it lies elsewhere. Later checkpoints there are set aside: whatever
            goes on from the newest one, goes on from the one that was named.

    Raises:
        ResumeError: the folder is taken, is no run, or its configuration differs in what matters.
    """
    root = config.run_dir
    store = CheckpointStore(root / "checkpoints", keep=config.checkpoint.keep)
    checkpoint: Checkpoint | None = None
    if resume is None:
        _require_free(root)
    elif resume == "auto":
        if (root / RESOLVED).exists():
            _require_same(config, root)
            checkpoint = store.newest()
    else:
        checkpoint = _from_path(config, Path(resume))
        if checkpoint.folder.parent.resolve() != (root / "checkpoints").resolve():
            _require_free(root)
            checkpoint = _bring_in(checkpoint, store)
        for path in store.set_aside(after=checkpoint.iteration):
            logger.warning("%s is of later iterations, which are done again: kept as %s", root, path.name)
    root.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: without it the run cannot be gone on with.
    replace_file(root / RESOLVED, dump(config).encode())
    return RunFolder(root, store), checkpoint


def read_run_config(root: Path) -> Config:
    """Configuration of an existing run.

    Raises:
        ResumeError: the folder is no run.
    """
    if not (root / RESOLVED).is_file():
        raise ResumeError(f"{root} is not a run: it has no {RESOLVED}. Give a folder that `acpo train` wrote.")
    return load_config(root / RESOLVED)


def _require_free(root: Path) -> None:
    # A run that failed before its first iteration holds nothing to lose.
    begun = (root / METRICS).exists() and (root / METRICS).stat().st_size
    if begun or any((root / "checkpoints").glob("[0-9]*")):
        raise ResumeError(
            f"{root} already holds a run. Continue it with `--resume auto`, or choose another run.dir, run.name or "
            "run.seed."
        )


def _bring_in(checkpoint: Checkpoint, store: CheckpointStore) -> Checkpoint:
    """Copy a checkpoint of another run, and the one that its guard would roll back to."""
    best = checkpoint.best_iteration
    if best != checkpoint.iteration and (checkpoint.folder.parent / f"{best:06d}").is_dir():
        store.adopt(open_checkpoint(checkpoint.folder.parent / f"{best:06d}"))
    return store.adopt(checkpoint)


def _from_path(config: Config, path: Path) -> Checkpoint:
    if path.parent.name == "checkpoints":
        _require_same(config, path.parent.parent)
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            raise ResumeError(str(error)) from error
    _require_same(config, path)
    checkpoint = CheckpointStore(path / "checkpoints", keep=config.checkpoint.keep).newest()
    if checkpoint is None:
        raise ResumeError(f"{path} is a run, but has no whole checkpoint yet; start it afresh in another run.dir")
    return checkpoint


def _require_same(config: Config, root: Path) -> None:
    if not (root / RESOLVED).is_file():
        raise ResumeError(
            f"--resume: {root} is not a run: it has no {RESOLVED}. Give a folder that `acpo train` wrote."
        )
    try:
        old = yaml.safe_load((root / RESOLVED).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ResumeError(f"--resume: {root / RESOLVED} cannot be read: {error}") from error
    if not isinstance(old, dict):
        raise ResumeError(
            f"--resume: {root / RESOLVED} holds no sections, but {type(old).__name__}: it was cut short. Restore it; "
            "MLflow has a copy of what is recorded there."
        )
    differences = list(_differences(old, config.to_mapping()))
    if differences:
        raise ResumeError(
            f"--resume: {root} was started with another configuration: {'; '.join(differences[:5])}. Restore these "
            "values, or start a new run in another run.dir."
        )


def _differences(old: dict[str, Any], new: dict[str, Any]):
    for section in sorted(set(old) | set(new)):
        free = _FREE.get(section, set())
        if free is None:
            continue
        before, after = old.get(section), new.get(section)
        if not isinstance(before, dict) or not isinstance(after, dict):
            if before != after:
                yield f"{section} was {before!r}, is {after!r}"
            continue
        for key in sorted((set(before) | set(after)) - free):
            if before.get(key) != after.get(key):
                yield f"{section}.{key} was {before.get(key)!r}, is {after.get(key)!r}"


def git_commit() -> str | None:
    """Commit of the working tree that this code runs from, with `-dirty` when it has changes; None outside git."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
