"""Safetensors files read and written one tensor at a time, so that memory does not grow with the file."""

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acpo_dist.core.errors import ModelError
from acpo_dist.core.json_text import read_object

_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor that is computed when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Returns the tensor; it is converted to `dtype`."""

    @classmethod
    def of(cls, value: Tensor) -> "Entry":
        """Entry of a tensor in memory."""
        return cls(shape=tuple(value.shape), dtype=value.dtype, read=lambda: value)

    def cast(self, dtype: torch.dtype) -> "Entry":
        """The same tensor in another floating-point type; integers keep theirs."""
        return Entry(shape=self.shape, dtype=dtype if self.dtype.is_floating_point else self.dtype, read=self.read)


def write_tensors(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; only one tensor is in memory at a time.

    Args:
        path: the file; it appears under its name when it is complete.
        entries: tensors by name.
        metadata: texts of the header; `format: pt` is added.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, entry in entries.items():
        size = torch.Size(entry.shape).numel() * entry.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, offset + size]
        }  # fmt: skip
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    # Tensors start at a multiple of 8 bytes, as the format recommends.
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, entry in entries.items():
            value = entry.read().detach().to("cpu", entry.dtype).contiguous()
            if tuple(value.shape) != entry.shape:
                raise ValueError(f"{name}: shape {tuple(value.shape)}, expected {entry.shape}")
            data: Any = value.reshape(-1).view(torch.uint8).numpy()
            file.write(data)
    os.replace(partial, path)


@contextmanager
def open_tensors(path: Path) -> Iterator[tuple[dict[str, Entry], dict[str, str]]]:
    """Context with the tensors of a `.safetensors` or pickled (`.ckpt`, `.bin`, `.pt`) file, by name, and its metadata.

    A pickled file may hold tensors only (`weights_only`); its tensors may lie under the key `state_dict`.

    Raises:
        ModelError: the file cannot be read.
    """
    if path.suffix != ".safetensors":
        yield {name: Entry.of(value) for name, value in _unpickled(path).items()}, {}
        return
    try:
        handle = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"`{path}` cannot be read as safetensors: {error}. Is the download complete?") from error
    with handle as file:
        yield {name: _entry(file, name) for name in file.keys()}, dict(file.metadata() or {})


def _entry(file: Any, name: str) -> Entry:
    part = file.get_slice(name)
    dtype = DTYPES.get(part.get_dtype())
    if dtype is None:
        raise ModelError(f"tensor `{name}` has the type {part.get_dtype()}, which is not supported.")
    return Entry(shape=tuple(part.get_shape()), dtype=dtype, read=lambda: file.get_tensor(name))


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises what unpickling raises
        said = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"`{path}` cannot be read as a checkpoint of tensors: {said}. Pickled files that hold more than tensors "
            "are refused, since they can run code; convert the file to .safetensors."
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def weight_shards(index: Path) -> list[str]:
    """Return the sorted names of the files that the index of sharded weights lists.

    Raises:
        ModelError: the index is damaged.
    """
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ModelError(f"{index} lists no weight files: `weight_map` is missing or damaged. Download it again.")
    return sorted(set(files.values()))
