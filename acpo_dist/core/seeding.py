"""Seeds derived from the purpose of a random number, so that any sample can be reproduced alone, on any worker."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed for a path of names and numbers, the same on every machine and in every process."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded with `derive_seed(*parts)`; noise is drawn on the CPU to be device-independent."""
    return torch.Generator().manual_seed(derive_seed(*parts))
