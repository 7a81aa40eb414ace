"""CPU seconds of a new process that reads a configuration, and of one that refuses a typo; the goal is 1.5.

Run: python -m benchmarks.config_load
"""

import resource
import subprocess
import sys

_CODE = "import sys; from acpo_dist.config.load import load_config; load_config('sdxl_2node', sys.argv[1:])"


def cpu_seconds(*overrides: str) -> float:
    """User and system time of one process that loads `configs/sdxl_2node.yaml`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", _CODE, *overrides], stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    sys.stdout.write(f"read {cpu_seconds():.2f} s, typo refused {cpu_seconds('run.iteratons=3'):.2f} s\n")
