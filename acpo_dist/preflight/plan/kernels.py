"""What a GPU runs where tensors without values would take another way: fused attention, and autocast."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils._pytree import tree_map

from acpo_dist.models.family import switched

# Entries of CUDA's autocast lists that these networks call.
_NARROW = ("linear", "conv2d")
_WIDE = ("group_norm", "layer_norm")


class Kernels:
    """Meta tensors have no fused attention (they would write its whole matrix down) and know no autocast.

    Autocast follows CUDA's lists: products in bfloat16, normalisations in float32 (the processor's keeps them narrow),
    and one cast of each trainable weight until `forget`, as when the region is left.
    """

    def __init__(self, *, autocast: bool) -> None:
        """Say whether bfloat16 arithmetic is asked for on the weights as they are held."""
        self._autocast = autocast
        self._remembered: dict[int, Tensor] | None = {}

    def forget(self) -> None:
        """Leave the region: casts of weights are no longer kept, neither those there are nor those to come."""
        self._remembered = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Put them in `torch.nn.functional`'s place.

        Not a torch function mode: those are switched off in the backward pass, where layers are recomputed.
        """
        replaced: dict[str, Callable[..., Any]] = {"scaled_dot_product_attention": self._attention}
        if self._autocast:
            replaced |= {name: _before(getattr(F, name), self._narrow) for name in _NARROW}
            replaced |= {name: _before(getattr(F, name), _widen) for name in _WIDE}
        with ExitStack() as stack:
            for name, function in replaced.items():
                stack.enter_context(switched([F], name, function))
            yield

    def _narrow(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if self._remembered is None or not (value.requires_grad and value.is_leaf):
            return value.to(torch.bfloat16)
        if id(value) not in self._remembered:
            self._remembered[id(value)] = value.to(torch.bfloat16)
        return self._remembered[id(value)]

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **options: Any,
    ) -> Tensor:  # fmt: skip
        if self._autocast:
            query, key, value = (self._narrow(entry) for entry in (query, key, value))
        # The processor's kernel: it keeps as much for the way back as a GPU's, the result and one number per row.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=options.get("scale")
        )[0]


def _before(function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(change, (args, kwargs))
        return function(*args, **kwargs)

    return run


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
