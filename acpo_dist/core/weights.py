"""Checksums of weights, which verify that a worker holds the same bytes that the learner sent."""

import hashlib
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from acpo_dist.core.errors import WeightSyncError
from acpo_dist.core.types import WeightAck, WeightBundle

Kept = TypeVar("Kept")


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, shapes, dtypes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(value.shape)}|{value.dtype}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_bundle(version: int, tensors: Mapping[str, Tensor]) -> WeightBundle:
    """Bundle CPU copies of the tensors with their checksum."""
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    return WeightBundle(version=version, checksum=checksum(copies), tensors=copies)


def with_version(kept: Mapping[int, Kept], version: int, new: Kept, *, earlier: int) -> dict[int, Kept]:
    """Return what is kept by version with a new one, and without versions that are more than `earlier` older.

    Later versions are left out too: after the loss of the learner, versions are published again.
    """
    return {number: one for number, one in kept.items() if version - earlier <= number < version} | {version: new}


def require_acks(version: int, wanted: str, acks: list[WeightAck]) -> None:
    """Check that every worker holds the published version.

    Raises:
        WeightSyncError: a worker holds another version or checksum; the message names each such worker.
    """
    wrong = [ack for ack in acks if (ack.version, ack.checksum) != (version, wanted)]
    if wrong:
        said = "; ".join(f"{ack.worker} holds version {ack.version} ({ack.checksum[:12]})" for ack in wrong)
        raise WeightSyncError(
            f"weights version {version} ({wanted[:12]}) was published, but {said}. No sample is drawn from old "
            "weights; resume the run from its last checkpoint with `--resume auto`."
        )
