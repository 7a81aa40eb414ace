"""Measure the peak tensor memory and floating-point operations of a computation, including on the meta device."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

_ITEM = torch.ops.aten._local_scalar_dense.default
_COPY = torch.ops.aten._to_copy.default
_INDEX = torch.ops.aten.index.Tensor


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Memory and arithmetic of one computation."""

    peak_bytes: int
    """Peak of allocated bytes above the bytes allocated before."""
    flops: int
    """Floating-point operations of convolutions, matrix products and attention: two per multiply-add."""


@dataclass(frozen=True)
class _Facts:
    """Metadata of a tensor, without its storage."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def _facts(value: Any) -> Any:
    """Return the metadata of a tensor; other values with their type, since 1, 1.0 and True are equal."""
    if isinstance(value, torch.Tensor):
        return _Facts(value.shape, value.stride(), value.dtype, value.device)
    return type(value), value


class LiveMemory(TorchDispatchMode):
    """Counts floating-point operations and the bytes of live storages that operations allocate.

    Views share their storage and are counted once. Workspaces inside kernels are not counted. Code under this mode may
    read values of meta tensors: every number is 1, every condition is true, and a boolean mask selects all rows.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        """Start counting.

        Args:
            known: existing tensors (weights, inputs), which are not counted; only storages on their device are counted.
        """
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._kept = [value.untyped_storage() for value in known]
        self._device = self._kept[0].device if self._kept else None
        self._seen = {id(storage) for storage in self._kept}
        self._shapes: dict[Any, Any] = {}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = _read(func, args, kwargs)
        if made is not None:
            return made
        if func is _INDEX:
            args = (args[0], [_all_rows(index) for index in args[1]])
        made = self._run(func, args, kwargs)
        # torch's own counting mode is avoided because its module hooks keep recomputed tensors alive.
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=made)
        for value in tree_iter(made):
            if isinstance(value, torch.Tensor):
                self._add(value)
        return made

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation; on the meta device, a repeated operation with the same inputs only allocates its results.

        Shape inference is slow Python code there, and a U-Net repeats the same few hundred operations.
        """
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if func._schema.is_mutable or not tensors or not all(value.is_meta for value in tensors):
            return func(*args, **kwargs)
        key = (func, spec, *map(_facts, leaves))
        known = self._shapes.get(key)
        if known is not None:
            leaves, spec = known
            return tree_unflatten([facts.empty() if isinstance(facts, _Facts) else facts[1] for facts in leaves], spec)
        made = func(*args, **kwargs)
        storages = {id(value.untyped_storage()) for value in tensors}
        results = [value for value in tree_iter(made) if isinstance(value, torch.Tensor)]
        if results and not any(id(value.untyped_storage()) in storages for value in results):
            leaves, spec = tree_flatten(made)
            self._shapes[key] = ([_facts(leaf) for leaf in leaves], spec)
        return made

    def _add(self, value: torch.Tensor) -> None:
        storage = value.untyped_storage()
        if id(storage) in self._seen or (self._device is not None and storage.device != self._device):
            return
        size = storage.nbytes()
        self._seen.add(id(storage))
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, id(storage), size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _read(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of an operation that reads values of a meta tensor; None for any other operation."""
    if func is _ITEM and args[0].is_meta:
        return 1
    if func is _COPY and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type == "cpu":
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    return None


def _all_rows(index: torch.Tensor | None) -> torch.Tensor | None:
    if index is None or not index.is_meta or index.dtype != torch.bool:
        return index
    return torch.arange(len(index), device=index.device)


def trace(run: Callable[[], Any], known: Iterable[torch.Tensor] = ()) -> Trace:
    """Run a computation once and measure it.

    Args:
        run: the computation; its result stays alive until the end.
        known: existing tensors, which are not counted.

    Returns:
        Memory and operations.
    """
    with LiveMemory(known) as memory:
        kept = run()
    del kept
    return Trace(peak_bytes=memory.peak, flops=memory.flops)
