"""Durable writes, and conversion of storage errors (disk full or unavailable) to `StorageError`."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from acpo_dist.core.errors import StorageError

_NUMBERS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE})
_NAME_BYTES = 200
"""Longest name of a run in the name of its folder; file systems allow 255 bytes per component."""
_IN_WORDS = re.compile(r"\(os error (\d+)\)")
"""Format in which safetensors (Rust) reports an operating system error."""


def storage_errno(error: BaseException) -> int | None:
    """Return the errno of an error that means that storage cannot be written, or None."""
    if isinstance(error, OSError):
        number = error.errno
    else:
        said = _IN_WORDS.search(str(error)) if type(error).__name__ == "SafetensorError" else None
        number = int(said[1]) if said else None
    return number if number in _NUMBERS else None


@contextmanager
def on_storage(folder: Path) -> Generator[None, None, None]:
    """Convert a storage error into a `StorageError` that states which files are intact and the remedy.

    Args:
        folder: folder of the run.

    Raises:
        StorageError: the storage cannot be written.
    """
    try:
        yield
    except Exception as error:
        number = storage_errno(error)
        if number is None:
            raise
        raise StorageError(_explain(error, number, folder)) from error


def sync_file(path: Path) -> None:
    """Flush a file to disk, which raises write errors that the system reports late."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file in one step, durably; a reader sees either the old or the new content."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def legal_name(name: str) -> str:
    """Return the name of a run as one path component that every file system accepts.

    Characters that some file systems refuse become `_`; a long name is cut and gets a hash, so that it stays unique.
    """
    legal = re.sub(r"[^\w .,+=@()\[\]{}#~!-]", "_", name).strip(" .") or "run"
    if len(legal.encode()) > _NAME_BYTES:
        mark = hashlib.sha256(name.encode()).hexdigest()[:8]
        legal = f"{legal.encode()[: _NAME_BYTES - 9].decode(errors='ignore')}-{mark}"
    return legal


def folder_name(name: str, seed: int) -> str:
    """Name of the folder of a run: `name-seed`."""
    return f"{legal_name(name)}-{seed}"


def _explain(error: Exception, number: int, folder: Path) -> str:
    said, named = os.strerror(number), getattr(error, "filename", None)
    file = Path(os.fsdecode(named)).absolute() if named else folder
    if file != folder and not file.is_relative_to(folder.absolute()):
        return (
            f"{file} can no longer be written: {said}{_free(file.parent)}. Files that the run saved in {folder} are "
            "intact: free space, then continue with `acpo train ... --resume auto`."
        )
    return (
        f"{folder} can no longer be written: {said}{_free(folder)}. Files saved earlier are intact. Free space "
        "(checkpoint.keep limits the number of checkpoints; HF_HOME, TMPDIR and /dev/shm can lie on other disks), "
        "then continue with `acpo train ... --resume auto`. A run folder can be moved; set run.dir to its new path."
    )


def _free(folder: Path) -> str:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return ""
    return f" ({usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB free)"
