"""A full disk ends a run with one message; saved files are intact, and the run continues once there is space."""

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from acpo_dist.core.errors import StorageError
from acpo_dist.core.files import on_storage, storage_errno
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive
from acpo_dist.workers.learner.checkpoint import CheckpointStore

LESS_THAN_WEIGHTS = 1_000_000
"""Bytes of the largest file that can be written: the toy's adapters take 1.3 million."""


def test_a_full_disk_is_distinguished_from_other_errors_for_any_writer(tmp_path):
    assert storage_errno(OSError(errno.ENOSPC, "full")) == errno.ENOSPC
    assert storage_errno(OSError(errno.ENOENT, "absent")) is None and storage_errno(ValueError("(os error 28)")) is None
    assert storage_errno(SafetensorError("I/O error: No space left on device (os error 28)")) == errno.ENOSPC
    with pytest.raises(StorageError, match=r"No space left on device \(\d+ of \d+ MiB free\).*--resume auto"):
        with on_storage(tmp_path):
            raise OSError(errno.ENOSPC, "full")
    with pytest.raises(KeyError), on_storage(tmp_path):
        raise KeyError("mine")


def test_the_message_names_the_disk_that_the_error_names(tmp_path):
    with pytest.raises(StorageError, match=r"^/elsewhere/blob can no longer be written"):
        with on_storage(tmp_path):
            raise OSError(errno.ENOSPC, "full", "/elsewhere/blob")
    with pytest.raises(StorageError, match=rf"^{tmp_path} can no longer be written"), on_storage(tmp_path):
        raise OSError(errno.ENOSPC, "full", str(tmp_path / "a" / "b"))


def test_a_checkpoint_of_another_run_that_finds_no_room_leaves_none_behind(tmp_path, monkeypatch):
    theirs, mine = CheckpointStore(tmp_path / "a", keep=1), CheckpointStore(tmp_path / "b", keep=1)
    partial = theirs.prepare(3)
    save_file({"a": torch.zeros(10)}, partial / "learner" / "policy.safetensors")
    theirs.commit(partial, 3, {})
    checkpoint = theirs.newest()
    assert checkpoint is not None

    def full(source, target, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copy2", full)
    monkeypatch.setattr(shutil.copytree, "__defaults__", (False, None, full, False, False))
    with pytest.raises(StorageError, match="No space left"), on_storage(tmp_path / "b"):
        mine.adopt(checkpoint)
    assert list((tmp_path / "b").iterdir()) == []


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """Limit the size of files that this process writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_safetensors_message_about_a_full_disk_is_recognised(tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises((OSError, SafetensorError)) as caught, largest_file(1000):
        save_file({"a": torch.zeros(1000)}, file)
    assert storage_errno(caught.value) == errno.EFBIG
    save_file({"a": torch.zeros(1000)}, file)


def test_a_run_on_a_full_disk_keeps_what_it_saved_and_resumes(tiny, tmp_path):
    root = tmp_path / "run"
    # Adapters on convolutions make the weights the largest file.
    model = ["model.path=toy-sdxl", "model.tuning.targets=[conv1, conv2]"]
    fixed = [f"run.dir={root}", "checkpoint.every=1", "rewards.judges=[]", *model]

    def train(iterations: int):
        config = tiny(*fixed, f"run.iterations={iterations}")
        return drive(config, open_ports, Console(quiet=True), resume="auto")

    train(1)
    with pytest.raises(StorageError, match=os.strerror(errno.EFBIG)), largest_file(LESS_THAN_WEIGHTS):
        train(2)
    newest = CheckpointStore(root / "checkpoints", keep=3).newest()
    assert newest is not None and newest.iteration == 1
    assert [path.name for path in (root / "checkpoints").iterdir()] == ["000001"]
    train(2)
    assert [row["iteration"] for row in read_metrics(root / "metrics.jsonl")] == [0, 1, 2]
