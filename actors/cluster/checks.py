"""Checks of every machine of a live cluster: same software, same run folder, working GPUs."""

import os
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from acpo_dist.core.errors import AcpoError
from acpo_dist.preflight.doctor.finding import Finding, judged
from acpo_dist.preflight.doctor.machine import check_devices, check_system
from actors.cluster.connect import joined
from actors.cluster.control import bounded
from actors.cluster.software import Software, differences, software
from actors.group import fetch
from actors.placement import node_offers

_TIMEOUT_S = 180.0
_REPORTED = ("open files", "shared memory")
"""Checks of a machine that are reported; the others are irrelevant for a worker."""


@dataclass(frozen=True)
class MachineReport:
    """Report of one machine."""

    software: Software
    marker: bool
    """Whether the machine sees a file that this one wrote into the folder of runs."""
    findings: list[Finding]


def check_cluster(address: str, runs: Path) -> Iterator[Finding]:
    """Check all machines of a cluster; temporary files are removed.

    Args:
        address: address of the cluster's control service, such as `auto` on one of its machines, or HOST:6379; `local`
            starts a cluster and checks it.
        runs: folder that every machine must share.

    Raises:
        UsageError: the cluster cannot be joined.
        WorkerLostError: the cluster does not respond.
    """
    with joined(address):
        yield from _check_machines(runs)


def _check_machines(runs: Path) -> Iterator[Finding]:
    nodes = bounded(node_offers, what="list machines")
    there = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.is_dir())
    # In a separate folder: some network file systems hide files that are open.
    with tempfile.TemporaryDirectory(prefix=".acpo-doctor-", dir=there) as probe:
        marker = Path(probe) / uuid.uuid4().hex
        marker.touch()
        task = ray.remote(_report)
        calls = {}
        for node in nodes:
            node_id = node.labels["ray.io/node-id"]
            there_alone = NodeAffinitySchedulingStrategy(node_id, soft=False)
            calls[f"machine {node.address} ({node_id[:6]})"] = task.options(
                num_cpus=0, scheduling_strategy=there_alone
            ).remote(marker, bool(node.resources.get("GPU")))
        # All machines work at once; results are read one by one, so a machine that fails hides no other.
        for name, call in calls.items():
            try:
                seen: MachineReport = fetch(call, name=name, what="doctor", timeout_s=_TIMEOUT_S)
            except AcpoError as error:
                said = str(error).strip().splitlines()
                yield Finding(name, "failed", f"{said[0]} {said[-1] if len(said) > 1 else ''}".strip(),
                              "Is acpo_dist installed there, in the version of this machine?")  # fmt: skip
                continue
            yield from judge_machine(name, seen, software(), there)


def judge_machine(name: str, seen: MachineReport, mine: Software, runs: Path) -> Iterator[Finding]:
    """Yield findings from one machine's report.

    Args:
        name: name of the machine.
        seen: its report.
        mine: software of this process.
        runs: folder that the machines must share.
    """
    texts = differences(mine, seen.software)
    yield judged(
        not texts, name, "; ".join(texts) or f"same software as this machine (code {mine.code})",
        "Install the same on every machine; workers with other software refuse to start (cluster.mixed_software).",
        otherwise="failed",
    )  # fmt: skip
    if not seen.marker:
        advice = "Checkpoints would be lost: put runs on shared storage (ACPO_RUNS on every machine, or run.dir)."
        yield Finding(name, "failed", f"{runs} is another folder there than here", advice)
    for finding in seen.findings:
        yield Finding(f"{name}, {finding.check}", finding.verdict, finding.found, finding.advice)


def _report(marker: Path, has_gpu: bool) -> MachineReport:
    findings = [one for one in check_system() if one.check in _REPORTED and one.verdict != "ok"]
    if has_gpu:
        # Ray hides all GPUs from a task that reserves none.
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        findings += check_devices()
    return MachineReport(software(), marker.exists(), findings)
