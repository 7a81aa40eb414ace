"""Run folder: paths, resolved configuration, checkpoints, and checks that a configuration may continue the run."""

import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acpo_dist.config.load import dump, load_config, writer_of
from acpo_dist.config.schema import Config
from acpo_dist.config.yaml_text import read_yaml
from acpo_dist.core.errors import CheckpointError, ConfigError, ResumeError, quoted, shorten
from acpo_dist.core.files import replace_file
from acpo_dist.core.version import own_version
from acpo_dist.workers.learner.checkpoint import Checkpoint, CheckpointStore, open_checkpoint

logger = logging.getLogger(__name__)

RESOLVED = "resolved.yaml"
_VALUE = 60
"""Characters of a value in a message."""
METRICS = "metrics.jsonl"

# Keys that may change on resume: where the run executes and for how long, not what it computes.
_FREE = {
    "run": {"name", "dir", "iterations"},
    "model": {"memory", "speed", "offline"},
    # Samples of a chunk are independent: another batch size changes rounding only, and a smaller one saves memory.
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
    """Raises `RunTakenError` if another process holds the run lock."""

    @property
    def metrics(self) -> Path:
        """One JSON object per iteration."""
        return self.root / METRICS

    @property
    def guard(self) -> Path:
        """One JSON object per guard decision in which a rule rose or an action was taken."""
        return self.root / "guard.jsonl"

    @property
    def skipped(self) -> Path:
        """One JSON object per skipped optimiser step."""
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
    """Create or continue the run folder.

    Args:
        resume: None starts a new run and refuses a folder that already holds one. `auto` continues from the newest
            valid checkpoint, or starts a new run if there is none. A path names a run folder or one of its
            checkpoints; a checkpoint of another folder is copied into this run's folder. Later checkpoints are set
            aside, so that the named one is the newest.

    Returns:
        (run folder, checkpoint to continue from or None).

    Raises:
        ResumeError: the folder already holds a run, is not a run, or its configuration differs in keys that affect
            results.
    """
    root = config.run_dir
    store = CheckpointStore(root / "checkpoints", keep=config.checkpoint.keep)
    checkpoint: Checkpoint | None = None
    if resume is None:
        _require_free(root)
    elif resume == "auto":
        if (root / RESOLVED).exists():
            require_same(config, root)
            checkpoint = store.newest()
    else:
        checkpoint = _from_path(config, Path(resume))
        if checkpoint.folder.parent.resolve() != (root / "checkpoints").resolve():
            _require_free(root)
            checkpoint = _bring_in(checkpoint, store)
        for path in store.set_aside(after=checkpoint.iteration):
            logger.warning("%s belongs to later iterations, which run again: kept as %s", root, path.name)
    root.mkdir(parents=True, exist_ok=True)
    # Atomic: without this file the run cannot be resumed.
    replace_file(root / RESOLVED, dump(config).encode())
    return RunFolder(root, store), checkpoint


def read_run_config(root: Path) -> Config:
    """Return the configuration of an existing run.

    Raises:
        ResumeError: the folder is no run.
    """
    if not (root / RESOLVED).is_file():
        raise ResumeError(f"{root} is not a run: it has no {RESOLVED}. Give a folder that `acpo train` wrote.")
    return load_config(root / RESOLVED)


def _require_free(root: Path) -> None:
    # A run that failed before its first iteration has no results to overwrite.
    begun = (root / METRICS).exists() and (root / METRICS).stat().st_size
    if begun or any((root / "checkpoints").glob("[0-9]*")):
        raise ResumeError(
            f"{root} already holds a run. Continue it with `--resume auto`, or choose another run.dir, run.name or "
            "run.seed."
        )


def _bring_in(checkpoint: Checkpoint, store: CheckpointStore) -> Checkpoint:
    """Copy a checkpoint of another run, and the checkpoint that its guard would roll back to."""
    best = checkpoint.best_iteration
    if best != checkpoint.iteration and (checkpoint.folder.parent / f"{best:06d}").is_dir():
        store.adopt(open_checkpoint(checkpoint.folder.parent / f"{best:06d}"))
    return store.adopt(checkpoint)


def _from_path(config: Config, path: Path) -> Checkpoint:
    if path.parent.name == "checkpoints":
        require_same(config, path.parent.parent)
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            raise ResumeError(str(error)) from error
    require_same(config, path)
    checkpoint = CheckpointStore(path / "checkpoints", keep=config.checkpoint.keep).newest()
    if checkpoint is None:
        raise ResumeError(f"{path} is a run without a complete checkpoint; start a new run in another run.dir")
    return checkpoint


def require_same(config: Config, root: Path) -> None:
    """Check that a run folder was started with this configuration, except for keys that do not affect results.

    Raises:
        ResumeError: the folder is not a run, or its configuration differs.
    """
    if not (root / RESOLVED).is_file():
        raise ResumeError(
            f"--resume: {root} is not a run: it has no {RESOLVED}. Give a folder that `acpo train` wrote."
        )
    try:
        old = read_yaml((root / RESOLVED).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ResumeError(f"--resume: {root / RESOLVED} cannot be read: {shorten(str(error), 300)}") from error
    if not isinstance(old, dict):
        raise ResumeError(
            f"--resume: {root / RESOLVED} holds {type(old).__name__} instead of sections: the file is truncated. "
            "Restore it; a run that is tracked in MLflow has a copy there."
        )
    differences = list(_differences(old, config.to_mapping()))
    if differences:
        writer = writer_of(root / RESOLVED)
        by = "" if writer == own_version() else f" and acpo_dist {writer} (this is {own_version()})"
        raise ResumeError(
            f"--resume: {root} was started with another configuration{by}: {shorten('; '.join(differences[:5]), 300)}. "
            "Restore these values, or start a new run in another run.dir."
        )


def _differences(old: dict[str, Any], new: dict[str, Any]):
    for section in sorted(set(old) | set(new), key=str):
        free = _FREE.get(section, set())
        if free is None:
            continue
        before, after = old.get(section), new.get(section)
        if not isinstance(before, dict) or not isinstance(after, dict):
            if before != after:
                yield f"{section} was {quoted(before, _VALUE)}, is {quoted(after, _VALUE)}"
            continue
        for key in sorted((set(before) | set(after)) - free, key=str):
            if before.get(key) != after.get(key):
                yield f"{section}.{key} was {quoted(before.get(key), _VALUE)}, is {quoted(after.get(key), _VALUE)}"


def git_commit() -> str | None:
    """Return the commit of this code's git working tree, with `-dirty` if it has changes; None outside git."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
