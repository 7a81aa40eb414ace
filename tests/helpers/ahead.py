"""Runs on Ray that draw ahead and lose one process in their second iteration, with an account of the samples.

`python -m tests.helpers.ahead CONFIG RECORD` drives a resolved configuration on the cluster of RAY_ADDRESS, and kills
itself after the second update.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from acpo_dist.config.load import load_config
from acpo_dist.core.ports import Ports
from acpo_dist.tracking.console import Console
from acpo_dist.training.run import OpenPorts, drive

LOST_IN = 1
"""Iteration during which a process is killed."""


def recording(opened: OpenPorts, record: Path, lose: Callable[[Ports], None] = lambda ports: None) -> OpenPorts:
    """Ports that record what is drawn and trained, and lose a process once, between an update and its publication.

    Args:
        opened: the real ports.
        record: JSON lines: `drawn` (version, sample ids) of every generated chunk of an iteration, and `trained`
            (iteration, sample ids) of every finished update.
        lose: called with the ports after the update of iteration `LOST_IN`, while the next samples are drawn.
    """
    lost: list[int] = []

    def note(**facts) -> None:
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    @contextmanager
    def opening(config, tracker):
        with opened(config, tracker) as ports:
            generate, train = ports.rollout.generate, ports.learner.train

            def generated(groups, advance=None, *, version=None):
                handles = generate(groups, advance, version=version)
                # Grids and calibration draw with the newest version.
                if version is not None:
                    for handle in handles:
                        note(drawn=handle.policy_version, ids=handle.sample_ids)
                return handles

            def trained(handles, task, advance=None):
                report = train(handles, task, advance)
                note(trained=task.iteration, ids=task.sample_ids)
                if task.iteration == LOST_IN and not lost:
                    lost.append(task.iteration)
                    lose(ports)
                return report

            ports.rollout.generate, ports.learner.train = generated, trained
            yield ports

    return opening


def account(record: Path) -> tuple[set[tuple[int, tuple[str, ...]]], list[tuple[int, tuple[str, ...]]]]:
    """Return (version, ids) of every chunk that was drawn, and (iteration, ids) of every update, in order."""
    rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    drawn = {(row["drawn"], tuple(row["ids"])) for row in rows if "drawn" in row}
    return drawn, [(row["trained"], tuple(row["ids"])) for row in rows if "trained" in row]


if __name__ == "__main__":
    from actors.launch import open_ports

    given = load_config(sys.argv[1])
    ports = recording(open_ports, Path(sys.argv[2]), lambda _: os.kill(os.getpid(), signal.SIGKILL))
    drive(given, ports, Console(quiet=True))
