"""Checksums of weights: what the learner sent and what a worker holds must be the same bytes."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from acpo_dist.core.errors import WeightSyncError
from acpo_dist.core.types import WeightBundle, WeightEcho


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in name order."""
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


def require_echoes(version: int, wanted: str, echoes: list[WeightEcho]) -> None:
    """Check that every worker holds the published version.

    Raises:
        WeightSyncError: names every worker that does not, with what it holds.
    """
    wrong = [echo for echo in echoes if (echo.version, echo.checksum) != (version, wanted)]
    if wrong:
        said = "; ".join(f"{echo.worker} holds version {echo.version} ({echo.checksum[:12]})" for echo in wrong)
        raise WeightSyncError(
            f"weights version {version} ({wanted[:12]}) was published, but {said}. No sample is drawn from old "
            "weights; resume the run from its last checkpoint with `--resume auto`."
        )
