"""Checkpoints: one folder per iteration with a manifest of SHA-256 sums, which is written last."""

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from acpo_dist.core.errors import CheckpointError, shorten
from acpo_dist.core.types import WeightBundle
from acpo_dist.core.weights import make_bundle

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
LEARNER = "learner"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint."""

    folder: Path
    iteration: int
    """Number of completed iterations, which is the index of the next one."""
    state: dict[str, Any]

    @property
    def learner_folder(self) -> Path:
        """Folder with the learner's files."""
        return self.folder / LEARNER

    @property
    def made(self) -> float:
        """Time at which it was written, in seconds since the epoch."""
        return (self.folder / MANIFEST).stat().st_mtime

    def bundle(self, kind: str = "policy") -> WeightBundle:
        """Return the trainable weights with their version.

        Args:
            kind: `policy`, or `ema` for their moving average.
        """
        return make_bundle(int(self.state["version"]), load_file(self.learner_folder / f"{kind}.safetensors"))

    @property
    def best_iteration(self) -> int:
        """Iteration of the checkpoint with the best judge scores when this one was written; 0 is the base model."""
        return int(self.state["guard"]["state"]["best"][0])


class CheckpointStore:
    """The `checkpoints/` folder of a run."""

    def __init__(self, root: Path, *, keep: int) -> None:
        """Use the folder `root` and keep at most `keep` checkpoints."""
        self._root, self._keep = root, keep

    def prepare(self, iteration: int) -> Path:
        """Return an empty folder for the files of an iteration; `commit` turns it into a checkpoint."""
        folder = self._root / f".{iteration:06d}.partial"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / LEARNER).mkdir(parents=True)
        return folder

    def discard(self, folder: Path) -> None:
        """Delete a folder of `prepare` that was not committed."""
        shutil.rmtree(folder, ignore_errors=True)

    def commit(self, folder: Path, iteration: int, state: dict[str, Any], *, protect: int | None = None) -> Path:
        """Write state and manifest, rename the folder, and delete the oldest beyond `keep` except `protect`."""
        _write(folder / STATE, json.dumps({"iteration": iteration, **state}, indent=2))
        _sync(folder / LEARNER)
        sums = {str(path.relative_to(folder)): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        _write(folder / MANIFEST, json.dumps({"files": sums}, indent=2))
        _sync(folder)
        final = self._root / f"{iteration:06d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(folder, final)
        _sync(self._root)
        for old in self._folders()[: -self._keep]:
            if protect is None or old.name != f"{protect:06d}":
                shutil.rmtree(old)
        return final

    def open(self, iteration: int) -> Checkpoint:
        """Return the checkpoint of an iteration.

        Raises:
            CheckpointError: the checkpoint is missing or damaged.
        """
        return open_checkpoint(self._root / f"{iteration:06d}")

    def newest(self) -> Checkpoint | None:
        """Return the newest valid checkpoint, or None; damaged ones are logged and skipped."""
        for folder in reversed(self._folders()):
            try:
                return open_checkpoint(folder)
            except CheckpointError as error:
                logger.warning("%s; trying the previous one", error)
        return None

    def adopt(self, checkpoint: Checkpoint) -> Checkpoint:
        """Copy a checkpoint of another run into this store; a failed copy leaves no checkpoint."""
        folder = self._root / f".{checkpoint.iteration:06d}.partial"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            shutil.copytree(checkpoint.folder, folder)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            # `shutil.Error` collects the errors of all files; the first one is reported.
            raise _first_of(error) from error
        final = self._root / f"{checkpoint.iteration:06d}"
        os.replace(folder, final)
        _sync(self._root)
        return open_checkpoint(final)

    def set_aside(self, *, after: int) -> list[Path]:
        """Rename checkpoints of later iterations, so that they are not used as this run's newest.

        Returns:
            Their new paths; folders of an earlier call at these paths are replaced.
        """
        moved = []
        for folder in self._folders():
            if int(folder.name) > after:
                aside = self._root / f"superseded.{folder.name}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(folder, aside)
                moved.append(aside)
        return moved

    def _folders(self) -> list[Path]:
        return sorted(path for path in self._root.glob("[0-9]*") if path.is_dir()) if self._root.is_dir() else []


def _first_of(error: BaseException) -> BaseException:
    """Return the first cause of a `shutil.Error`, which has no errno and lists (source, target, text) by file."""
    if isinstance(error, shutil.Error) and error.args and (said := re.match(r"\[Errno (\d+)\]", error.args[0][0][2])):
        return OSError(int(said[1]), os.strerror(int(said[1])), error.args[0][0][1])
    return error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint and verify every file against the manifest.

    Raises:
        CheckpointError: the manifest or a file is missing, or a checksum differs.
    """
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        named = {folder / name: str(wanted) for name, wanted in sums.items()}
        iteration = int(state["iteration"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} is no complete checkpoint: {MANIFEST} or {STATE} cannot be read ({shorten(str(error))})"
        ) from error
    # A file that the manifest does not name is not checked, so every file that is read must be named.
    found_files = {path for path in folder.rglob("*") if path.is_file()} - {folder / MANIFEST}
    if unnamed := sorted({folder / STATE, *found_files} - named.keys()):
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} does not name {unnamed[0].relative_to(folder)}")
    for path, wanted in named.items():
        name = shorten(os.path.relpath(path, folder))
        if not path.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing")
        found = _sha256(path)
        if found != wanted:
            raise CheckpointError(
                f"{folder} is damaged: {name} has sha256 {found[:12]}, the manifest says {wanted[:12]}"
            )
    return Checkpoint(folder=folder, iteration=iteration, state=state)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
