"""LoKr and LoHa layers, as LyCORIS and peft store them: their parts, and the update of a weight that they make."""

from collections.abc import Mapping

import torch
from peft.tuners.loha import layer as loha
from peft.tuners.lokr import layer as lokr
from torch import Tensor

PARTS = r"lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12]"
"""Regular expression of the names of the parts, which are equal in both libraries."""


def kind_of(parts: Mapping[str, Tensor]) -> str | None:
    """Return `LoKr` or `LoHa`; None if there are parts of neither."""
    marks = {name.partition("_")[0] for name in parts}
    return "LoKr" if "lokr" in marks else "LoHa" if "hada" in marks else None


def rank_of(parts: Mapping[str, Tensor]) -> int | None:
    """Return the rank of a layer; None for a LoKr of two whole matrices, whose alpha has no effect."""
    factors = (parts.get(name) for name in ("lokr_w1_b", "lokr_w2_b", "hada_w1_b"))
    return next((len(value) for value in factors if value is not None), None)


def scaled_parts(parts: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Multiply the update of a layer by a factor."""
    first = next(name for name in ("lokr_w1", "lokr_w1_a", "hada_w1_a") if name in parts)
    return {**parts, first: parts[first] * factor}


def update_of(parts: Mapping[str, Tensor]) -> Tensor:
    """Compute the update of a weight, with the weight's first axis and number of elements.

    Raises:
        KeyError: a part is missing.
        RuntimeError: the shapes of the parts do not fit each other.
    """
    if kind_of(parts) == "LoKr":
        first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        if "lokr_w2" in parts:
            second = parts["lokr_w2"]
        elif "lokr_t2" in parts:
            second = lokr.make_weight_cp(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
        else:
            second = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        return lokr.make_kron(first, second)
    left, right = ((parts[f"hada_w{index}_a"], parts[f"hada_w{index}_b"]) for index in (1, 2))
    one = torch.ones((), device=left[0].device)
    if "hada_t1" in parts or "hada_t2" in parts:
        return loha.make_weight_cp(parts["hada_t1"], *left, parts["hada_t2"], *right, one)
    return loha.make_weight(*left, *right, one)
