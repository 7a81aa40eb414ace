"""Run `acpo` in this process and write its memory and seconds: python -m tests.helpers.measured OUT.json ARGUMENTS."""

import json
import resource
import sys
import threading
import time
from pathlib import Path

from acpo_dist.cli import main

_INTERVAL = 0.05


def memory_gib(field: str) -> float:
    """A field of this process's /proc status, such as VmRSS (with pages of mapped files) or RssAnon (without)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 2**20


def _measured(out: Path) -> None:
    done, peak, clock = threading.Event(), 0.0, time.monotonic()

    def watch() -> None:
        nonlocal peak
        # The kernel keeps no peak of anonymous memory.
        while not done.wait(_INTERVAL):
            peak = max(peak, memory_gib("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        main()
    finally:
        done.set()
        watcher.join()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found = {"peak_rss_gib": resident, "peak_anonymous_gib": peak, "seconds": time.monotonic() - clock}
        out.write_text(json.dumps({name: round(value, 2) for name, value in found.items()}))


if __name__ == "__main__":
    target = Path(sys.argv.pop(1))
    _measured(target)
