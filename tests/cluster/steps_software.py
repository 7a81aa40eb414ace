"""Steps: every machine runs the same software, and a different one is named and rejected."""

import json
import shutil
import time
from typing import Any

from tests.cluster.cluster import Cluster
from tests.cluster.hosts import until
from tests.cluster.install import copy_code
from tests.cluster.runs import Run, labels

_ONE_ROLE_EACH = (*labels(learner="learner", rollout="rollout", reward="head"),
                  "cluster.roles.reward.near_rollout=false", "run.iterations=2")  # fmt: skip
_BACK_S = 300
_REFUSED_S = 300
_EXTRA = "\nOTHER = True\n"
"""A line of code that changes the digest."""


def same_software(cluster: Cluster) -> dict[str, Any]:
    """`acpo doctor` sees three machines with the same code, libraries and run folder."""
    found = _doctor(cluster)
    machines = [one for one in found["findings"] if one["check"].startswith("machine ") and "," not in one["check"]]
    assert found["verdict"] != "failed" and {one["verdict"] for one in machines} == {"ok"}, found
    assert len(machines) == 3 and any(one["check"] == "placement" for one in found["findings"]), found
    return {"machines": [one["check"] for one in machines]}


def other_software(cluster: Cluster) -> dict[str, Any]:
    """A machine restarts with other code: `acpo doctor` names it, and no run starts with it."""
    host = cluster.net.hosts["h3"]
    settings, other = host.home / "acpo/host.sh", host.home / "other"
    before = settings.read_text()
    copy_code(other, _EXTRA)
    settings.write_text(f"{before}export PYTHONPATH={other}\n")
    _restart(cluster, host)
    found = [one for one in _doctor(cluster)["findings"] if one["verdict"] == "failed"]
    assert len(found) == 1 and host.address in found[0]["check"] and "mixed_software" in found[0]["advice"], found
    started = time.monotonic()
    run = Run(cluster, "other-software", 0, _ONE_ROLE_EACH).submit()
    until(lambda: run.status() == "FAILED", _REFUSED_S, lambda: f"{run.status()}: {run.output()[-4000:]}")
    refused_s, said = time.monotonic() - started, run.output()
    assert "cluster.mixed_software" in said and "Traceback" not in said, said[-4000:]
    settings.write_text(before)
    shutil.rmtree(other)
    _restart(cluster, host)
    return {"refused_s": refused_s, "said": found[0]["found"]} | same_software(cluster)


def _doctor(cluster: Cluster) -> dict[str, Any]:
    asked = Run(cluster, "planned", 0, _ONE_ROLE_EACH).arguments
    done = cluster.try_on(cluster.head, f"acpo doctor {asked} --address auto --json", timeout=300)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _restart(cluster: Cluster, host: Any) -> None:
    host.power_off()
    until(lambda: len(cluster.nodes()) == 2, _BACK_S, f"{host.name} is not missed")
    cluster.net.start(host)
    until(lambda: len(cluster.nodes()) == 3, _BACK_S, f"{host.name} is not taken in again")
