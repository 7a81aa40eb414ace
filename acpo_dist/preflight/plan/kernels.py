"""GPU kernels for meta tensors: fused attention and autocast."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils._pytree import tree_map

from acpo_dist.models.family import switched

# Functions on CUDA's autocast lists that these networks call.
_NARROW = ("linear", "conv2d")
_WIDE = ("group_norm", "layer_norm")


class Kernels:
    """Applies the behaviour of GPU kernels to meta tensors: fused attention, and autocast to bfloat16.

    On the meta device attention would allocate its whole matrix, and autocast has no effect. Autocast follows CUDA's
    lists: products in bfloat16, normalisations in float32 (the CPU's lists keep them in bfloat16), and one cast per
    trainable weight in each region.
    """

    def __init__(self, *, autocast: bool) -> None:
        """Prepare the replacements.

        Args:
            autocast: whether the learner computes in bfloat16 while the weights keep their own type.
        """
        self._autocast, self._inside = autocast, False
        self._remembered: dict[int, Tensor] | None = None

    @contextmanager
    def region(self) -> Iterator[None]:
        """Autocast one forward pass like `torch.autocast`: casts of trainable weights are cached until it ends."""
        with switched([self], "_inside", self._autocast), switched([self], "_remembered", {}):
            yield

    @contextmanager
    def recomputation(self) -> Iterator[None]:
        """Autocast the backward pass, in which layers are recomputed; no cast is cached."""
        with switched([self], "_inside", self._autocast):
            yield

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace the functions in `torch.nn.functional`.

        A torch function mode does not work here: autograd disables it in the backward pass, which recomputes layers.
        """
        replaced: dict[str, Callable[..., Any]] = {"scaled_dot_product_attention": self._attention}
        if self._autocast:
            replaced |= {name: self._before(getattr(F, name), self._narrow) for name in _NARROW}
            replaced |= {name: self._before(getattr(F, name), _widen) for name in _WIDE}
        with ExitStack() as stack:
            for name, function in replaced.items():
                stack.enter_context(switched([F], name, function))
            yield

    def _before(self, function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                args, kwargs = tree_map(change, (args, kwargs))
            return function(*args, **kwargs)

        return run

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
        if self._inside:
            query, key, value = (self._narrow(entry) for entry in (query, key, value))
        # Like a GPU kernel, the CPU's saves the result and one number per row for the backward pass.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=options.get("scale")
        )[0]


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
