"""The files of the learner's training state: weights, averages and moments by name, as safetensors."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save, save_file
from torch import Tensor

from acpo_dist.core.files import on_storage, sync_file

EARLIER = "version-"
"""Start of the names of files with weights of earlier versions."""
TrainingState = Mapping[str, dict[str, Tensor]]
"""Tensors by name, by file name without suffix; empty on ranks other than 0."""
SerialisedState = Mapping[str, NDArray[np.uint8]]
"""Bytes by file name. Arrays, since Ray passes these without a copy."""


def write_state(folder: Path, state: TrainingState) -> None:
    """Write the files to a folder, which is created; nothing for an empty state.

    Raises:
        StorageError: the disk is full or gone.
    """
    if not state:
        return
    with on_storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in state.items():
            save_file(tensors, folder / f"{name}.safetensors")
            # Older checkpoints are deleted as soon as this one is complete.
            sync_file(folder / f"{name}.safetensors")


def serialise(state: TrainingState) -> SerialisedState:
    """Return the bytes of the files that `write_state` writes."""
    return {f"{name}.safetensors": np.frombuffer(save(tensors), np.uint8) for name, tensors in state.items()}


def write_serialised(folder: Path, files: SerialisedState) -> None:
    """Write the result of `serialise` to a folder, which is created.

    Raises:
        StorageError: the disk is full or gone.
    """
    with on_storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content.data)
            sync_file(folder / name)


def earlier_files(folder: Path) -> dict[int, Path]:
    """Return the files with weights of earlier versions, by version."""
    return {int(path.stem.removeprefix(EARLIER)): path for path in folder.glob(f"{EARLIER}*.safetensors")}
