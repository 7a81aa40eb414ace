"""Code and library versions of a machine, so that workers with different software refuse to start."""

import hashlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import acpo_dist
from acpo_dist.core.errors import SoftwareError
from acpo_dist.core.packages import installed_versions

PACKAGES = (
    "torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow",
    "deepspeed", "bitsandbytes", "pyiqa",
)  # fmt: skip
"""Packages that metrics depend on. Ray compares its own version and Python's when a machine joins."""
_REMEDY = (
    "Install the same on every machine (for code under development, `acpo submit --ship-code`), or set "
    "cluster.mixed_software=true to skip this check."
)


@dataclass(frozen=True)
class Software:
    """Code and libraries of one machine."""

    code: str
    """Digest of the modules of `acpo_dist` and `actors`, and of the embedded models."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Version by distribution; missing ones are left out."""

    def code_alone(self) -> "Software":
        """Return only the code, for a worker with its own environment."""
        return replace(self, packages={})


@cache
def software() -> Software:
    """Return code and libraries of this process."""
    root = Path(acpo_dist.__file__).resolve().parent
    files = sorted(
        [*root.rglob("*.py"), *(root.parent / "actors").rglob("*.py"), *(root / "data" / "toy" / "assets").rglob("*.*")]
    )
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root.parent).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    found = {}
    for name, number in installed_versions(PACKAGES).items():
        # `+cpu` and `+cu128` are builds of one version, and a head node needs no GPU.
        found[name] = number.partition("+")[0]
    return Software(digest.hexdigest()[:12], found)


def differences(expected: Software, found: Software) -> list[str]:
    """Return one text per difference. A missing package is no difference: it fails where it is needed."""
    texts = []
    if expected.code != found.code:
        texts.append(f"acpo_dist has other code ({found.code}, not {expected.code})")
    for name, wanted in expected.packages.items():
        there = found.packages.get(name, wanted)
        if there != wanted:
            texts.append(f"{name} is {there}, not {wanted}")
    return texts


def require_same(expected: Software | None) -> None:
    """Compare this machine's software with the driver's.

    Args:
        expected: the driver's; None skips the comparison.

    Raises:
        SoftwareError: names this machine and the differences.
    """
    if expected is not None and (texts := differences(expected, software())):
        raise SoftwareError(
            f"{socket.gethostname()} runs other software than the driver: {'; '.join(texts)}. {_REMEDY}"
        )
