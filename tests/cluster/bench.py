"""A cluster of three separate machines, from `ray up` to `ray down`, with everything that docs/cluster.md documents.

    python -m tests.cluster.bench                                # all steps, then clean up; half an hour on two cores
    python -m tests.cluster.bench --only up undisturbed learner_host     # some, and leave the machines on
    python -m tests.cluster.bench --only down

The machines are Linux namespaces (`hosts.py`), so root is needed. What differs from three real machines: they share one
kernel and one disk, and the Python packages that `acpo_install` would download are taken from this checkout's .venv;
the project itself is installed from its wheel.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cluster import steps_cluster, steps_loss, steps_runs, steps_software
from tests.cluster.cluster import Cluster
from tests.cluster.hosts import why_not

FOLDER = Path("/var/tmp/acpo-bench")
STEPS: dict[str, Callable[[Cluster], dict[str, Any]]] = {
    step.__name__: step
    for step in (
        steps_cluster.up, steps_cluster.listeners, steps_cluster.token, steps_software.same_software, steps_runs.plan,
        steps_runs.first, steps_runs.second, steps_runs.stop, steps_runs.ship_code, steps_software.other_software,
        steps_loss.undisturbed, steps_loss.rollout_host,
        steps_loss.reward_host, steps_loss.learner_host, steps_loss.cut_rollout, steps_loss.cut_learner,
        steps_cluster.down,
    )
}  # fmt: skip
"""In this order; each step leaves the machines ready for the next."""


def main(arguments: list[str] | None = None) -> int:
    """Run steps; one JSON object at the end. Exit codes: 0 done or not possible here, 1 failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the machines' files; emptied by the step `up`")
    parser.add_argument("--keep", action="store_true", help="leave the machines on when a step fails")
    options = parser.parse_args(arguments)
    reason = why_not()
    if reason:
        sys.stdout.write(f"skipped: {reason}\n")
        return 0
    cluster, found = Cluster(options.folder), {}
    failed = ""
    try:
        for name in options.only or STEPS:
            failed, started = name, time.monotonic()
            found[name] = STEPS[name](cluster)
            seconds = time.monotonic() - started
            found[name]["step_s"] = seconds
            sys.stderr.write(f"ok {name} {seconds:.0f} s\n")
        failed = ""
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"FAILED {failed}: {error}\n")
    finally:
        # What is left by a failure, or by Ctrl-C, would be in the way of the next attempt.
        if failed and not options.keep:
            steps_cluster.clean(cluster)
        sys.stdout.write(json.dumps(found, indent=2, default=str) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
