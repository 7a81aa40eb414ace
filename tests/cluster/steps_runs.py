"""Steps: runs as jobs, scaling of the reward pool under one of them, comparison of two, stop and resume of one."""

import json
import re
import shutil
import time
from typing import Any

from tests.cluster.cluster import Cluster
from tests.cluster.hosts import until
from tests.cluster.install import copy_code
from tests.cluster.runs import JOBS, Run, labels

_ONE_ROLE_EACH = (*labels(learner="learner", rollout="rollout", reward="head"),
                  "cluster.roles.reward.near_rollout=false")  # fmt: skip
_STOPPED_S = 90
"""Longest wait, after `acpo submit --stop`, for the end of the job; node.sh gives it 60 s to release its workers."""
_MARK = """
import os as _os
import pathlib as _pathlib
import socket as _socket

_marks = _pathlib.Path("/mnt/acpo/shipped")
_marks.mkdir(exist_ok=True)
(_marks / f"{_socket.gethostname()} {_os.getpid()}").touch()
"""
"""Marker that shipped code prints, which shows the processes it runs in."""


def plan(cluster: Cluster) -> dict[str, Any]:
    """`acpo plan --address` compares a run with the live cluster."""
    fits = Run(cluster, "planned", 0, _ONE_ROLE_EACH).arguments
    found = cluster.head_json(f"acpo plan {fits} --address auto")["cluster"]
    machines = {one["address"]: one["labels"]["acpo-role"] for one in found["machines"]}
    assert machines == {cluster.net.addresses[name]: role for name, role in cluster.roles.items()}, machines
    assert not found["missing"] and not found["missing_by_role"] and not found["missing_now"], found
    odd = labels(learner="gpu")[0]
    found = cluster.head_json(f"acpo plan {fits} '{odd}' rollout.num_workers=40 --address auto")["cluster"]
    short = " ".join(found["missing_by_role"])
    assert "gpu" in short and "rollout" in short and found["missing"]["CPU"] > 0, found
    return {"short_of": found["missing_by_role"]}


def first(cluster: Cluster) -> dict[str, Any]:
    """Ray's own `ray job submit`, workers of each role on a machine of its own, the pool from 1 to 3 and back."""
    started = time.monotonic()
    run = Run(cluster, "first", 0, _ONE_ROLE_EACH)
    command = f"ray job submit --address {JOBS} --no-wait --submission-id first -- acpo train {run.arguments}"
    cluster.at_desk(command)
    run.await_rows(1)
    places = cluster.places()
    expected = {role: {cluster.net.addresses[name]} for name, role in
                (("h1", "reward"), ("h2", "learner"), ("h3", "rollout"))}  # fmt: skip
    assert places == expected, places
    pools = {pool["metric"]: len(pool["replicas"]) for pool in cluster.head_json("acpo rewards status")["pools"]}
    assert pools == {"two_stream": 1, "strided_judge": 1}, pools
    counts = [cluster.head_json(f"acpo rewards scale two_stream {count}")["running"] for count in (3, 1)]
    assert counts == [3, 1], counts
    seen = len(run.rows())
    assert seen < 40, "the run was over before the pool was scaled"
    run.finish()
    said = [row["reward_pool/two_stream/replicas"] for row in run.rows() if "reward_pool/two_stream/replicas" in row]
    assert 3 in said and said[-1] == 1, said
    return {"workers": {role: sorted(where) for role, where in places.items()}, "replicas_by_iteration": said,
            "seconds": time.monotonic() - started}  # fmt: skip


def second(cluster: Cluster) -> dict[str, Any]:
    """`acpo submit` follows a run with another seed to its end; MLflow has both runs, side by side."""
    started = time.monotonic()
    run = Run(cluster, "second", 1, _ONE_ROLE_EACH)
    said = cluster.at_desk(f"acpo submit {run.arguments} --name second", timeout=600)
    assert "iteration 40/40" in said, said[-4000:]
    took_s = time.monotonic() - started
    jobs = {one["job"]: one["status"] for one in json.loads(cluster.at_desk("acpo submit --list --json"))["jobs"]}
    assert jobs["second"] == "SUCCEEDED", jobs
    runs = cluster.head_json("acpo runs --experiment acpo")["runs"]
    table = cluster.head_json("acpo compare --experiment acpo --out /tmp/compare.html")
    names = sorted(each["label"] for each in table["runs"])
    assert {"first", "second"} <= set(names) and len(runs) == len(names), (names, runs)
    page = cluster.head.run("cat /tmp/compare.html && rm /tmp/compare.html")
    assert "first" in page and "second" in page
    changed = set(table["differences"])
    # `acpo submit` says --backend ray; the plain form leaves it to `auto`.
    assert len(names) > 2 or changed == {"run.seed", "cluster.backend"}, changed
    return {"seconds": took_s, "compared": names, "differences": sorted(changed)}


def stop(cluster: Cluster) -> dict[str, Any]:
    """`acpo submit --stop` frees the workers and keeps the checkpoints; `--resume auto` goes on from the newest."""
    run = Run(cluster, "stopped", 0).submit()
    run.await_rows(7)
    asked = time.monotonic()
    cluster.at_desk("acpo submit --stop stopped")
    until(lambda: run.status() == "STOPPED", _STOPPED_S, lambda: f"{run.status()} {_STOPPED_S} s after --stop")
    stopped_s = time.monotonic() - asked
    until(lambda: not any(cluster.places().values()), 60, lambda: f"still there: {cluster.workers()}")
    again = f"acpo submit {run.arguments} --resume auto --name again"
    said = cluster.at_desk(again, timeout=600)
    found = re.search(r"checkpoints/0*(\d+)\b", said)
    assert found and int(found[1]) >= 5 and "iteration 40/40" in said, said[-4000:]
    assert [row["iteration"] for row in run.rows()] == list(range(len(run.rows()))), "lines are missing or double"
    return {"stopped_s": stopped_s, "went_on_after": int(found[1])}


def ship_code(cluster: Cluster) -> dict[str, Any]:
    """`acpo submit --ship-code` runs the code of a checkout in every process instead of the installed code."""
    folder, marks = cluster.folder / "working", cluster.net.shared / "shipped"
    for old in (folder, marks):
        shutil.rmtree(old, ignore_errors=True)
    copy_code(folder, _MARK)
    run = Run(cluster, "shipped", 0, ("run.iterations=20",))
    cluster.at_desk(f"acpo submit {run.arguments} --ship-code --no-follow --name shipped", folder=folder)
    run.await_rows(1)
    workers = cluster.workers()
    names = {host.address: host.name for host in cluster.net.hosts.values()}
    wanted = {f"{names[one.address]} {one.pid}" for one in workers}
    found = {mark.name for mark in marks.iterdir()}
    assert {one.role for one in workers} == {"learner", "rollout", "reward"}, workers
    assert wanted <= found, f"installed code runs in {sorted(wanted - found)} of {workers}"
    run.finish()
    return {"processes_with_shipped_code": len(wanted)}
