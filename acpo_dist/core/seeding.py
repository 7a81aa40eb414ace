"""Seeds that derive from what a number is for, so any sample can be made again alone, on any worker."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a path of names and numbers, the same on every machine and in every process."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator with `derive_seed(*parts)`; noise is drawn on the CPU so that it is the same on every device."""
    return torch.Generator().manual_seed(derive_seed(*parts))
