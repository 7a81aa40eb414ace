"""Freed memory is kept for the next tensor."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
PROGRAM = """
import resource, statistics, sys
from acpo_dist.core.allocator import keep_freed_memory, return_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def take():
    before = faults()
    torch.empty(10_000_000).fill_(1.0) + 1
    return faults() - before
# The first few go where no block of this size has been: how many do depends on where the heap begins.
print(statistics.median(take() for _ in range(30)))
if sys.argv[1] == "plain":
    sys.exit()
def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
blocks = [torch.ones(5_000_000) for _ in range(20)]
before = held()
del blocks[:-1]
kept = held()
return_freed_memory()
print(before - kept, before - held())
"""


def _said(how: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, how], env={"PATH": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def kept() -> list[float]:
    """Faults of a tensor where freed memory is kept; MiB that freed blocks give back by themselves, and when asked."""
    return [float(figure) for figure in _said("keep").stdout.split()]


def test_the_next_tensor_of_40_megabytes_faults_in_few_pages_again(kept):
    # Nearly 10,000 pages of 4 KiB for the tensor and as many for the sum.
    plain = float(_said("plain").stdout)
    if plain < 1_000:
        pytest.skip("this kernel maps large pages, so that fresh memory costs few faults")
    assert kept[0] < plain / 10


def test_a_configured_allocator_is_not_changed():
    assert _said("keep", MALLOC_ARENA_MAX="1").returncode == 3


def test_blocks_freed_between_others_go_back_to_the_system_when_asked(kept):
    _, unasked, asked = kept
    # 19 blocks of 19 MiB.
    assert unasked < 100 and asked > 300
