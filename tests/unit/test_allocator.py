"""Memory that is freed is kept for the next tensor."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from acpo_dist.core.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def take():
    return torch.empty(10_000_000).fill_(1.0) + 1
# Until blocks of this size have found their places.
for _ in range(8):
    take()
before = faults()
for _ in range(5):
    take()
print(faults() - before)
"""


def _faults(how: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, how], env={"PATH": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_the_next_tensor_of_40_megabytes_faults_in_no_page_again():
    # 10,000 pages each, five times, and as many for the sum.
    assert int(_faults("plain").stdout) > 50_000
    assert int(_faults("keep").stdout) < 5_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_who_has_chosen_an_allocator_keeps_it():
    assert _faults("keep", MALLOC_ARENA_MAX="1").returncode == 3
