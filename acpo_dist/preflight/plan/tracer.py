"""Live tensor memory of a computation, counted by its storages; on the meta device nothing is computed or allocated."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one computation takes."""

    peak_bytes: int
    """Most bytes alive at once beyond those that were there before."""
    flops: int
    """Floating-point operations of convolutions, matrix products and attention: two per multiply-add."""


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of storages that operations make, for as long as they live.

    Views share their storage and are counted once. What a kernel allocates inside itself is not seen.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        """Leave the storages of `known` (weights, inputs) out."""
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._seen: set[int] = set()
        self._kept = [value.untyped_storage() for value in known]
        self._seen.update(id(storage) for storage in self._kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then look at what it made."""
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        # Not torch's own counting mode: it follows modules with hooks that keep recomputed tensors alive.
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=made)
        for value in tree_iter(made):
            if isinstance(value, torch.Tensor):
                self._add(value)
        return made

    def _add(self, value: torch.Tensor) -> None:
        storage = value.untyped_storage()
        if id(storage) in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(id(storage))
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, id(storage), size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def trace(run: Callable[[], Any], known: Iterable[torch.Tensor] = ()) -> Trace:
    """Run something once and count."""
    with LiveMemory(known) as memory:
        kept = run()
    del kept
    return Trace(peak_bytes=memory.peak, flops=memory.flops)
