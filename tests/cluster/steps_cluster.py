"""Steps: the cluster starts, accepts only authorised clients, and stops."""

import shutil
import time
from typing import Any

from tests.cluster.cluster import Cluster
from tests.cluster.hosts import Host, until
from tests.cluster.install import CONFIG, prepare
from tests.cluster.runs import JOBS

_JOINED_S = 300
_GONE_S = 180
"""Longest wait for the processes of a cluster to end after `ray down`."""


def up(cluster: Cluster) -> dict[str, Any]:
    """Three machines, the real `ray up` over ssh, a cluster of three nodes, MLflow, and access from outside."""
    cluster.net.down()
    shutil.rmtree(cluster.folder, ignore_errors=True)
    prepare(cluster.net, cluster.checkout, cluster.roles)
    cluster.net.up()
    token = cluster.at_desk("ray get-auth-token --generate").strip().splitlines()[-1]
    assert len(token) >= 32
    started = time.monotonic()
    cluster.at_desk(f"RAY_UP_enable_autoscaler_v2=0 ray up -y --no-config-cache {CONFIG}", timeout=600)
    took_s = time.monotonic() - started
    until(lambda: len(cluster.nodes()) == 3, _JOINED_S, "not all machines joined; see monitor.out of the head's Ray")
    joined_s = time.monotonic() - started
    health = "curl -fs $MLFLOW_TRACKING_URI/health"
    until(lambda: cluster.try_on(cluster.head, health).returncode == 0, 180,
          f"MLflow does not answer; see {cluster.head.home}/acpo/mlflow.log")  # fmt: skip
    cluster.forward()
    return {"ray_up_s": took_s, "all_nodes_joined_s": joined_s}


def listeners(cluster: Cluster) -> dict[str, Any]:
    """Dashboard, jobs and MLflow are on loopback; only ssh is reachable from outside."""
    found = {name: {where for where, _ in host.listeners()} for name, host in cluster.net.hosts.items()}
    for name, rows in found.items():
        odd = [where for where in rows if where.endswith((":8265", ":5000")) and not where.startswith("127.0.0.1:")]
        assert not odd, f"{name} listens on {odd}"
    assert {"127.0.0.1:8265", "127.0.0.1:5000"} <= found["h1"], found["h1"]
    ports = sorted({int(where.rsplit(":", 1)[1]) for where in found["h1"]})
    outside = _reached(cluster.desk, cluster.net.door, ports)
    assert outside == [22], outside
    inside = _reached(cluster.net.hosts["h2"], cluster.head.address, ports)
    assert 6379 in inside and 22 in inside and not {8265, 5000} & set(inside), inside
    return {"listening_ports_of_head": len(ports), "reached_from_outside": outside, "reached_from_h2": len(inside)}


def _reached(host: Host, address: str, ports: list[int]) -> list[int]:
    script = (
        f'for port in {" ".join(map(str, ports))}; do timeout 1 bash -c "echo > /dev/tcp/{address}/$port" '
        "2>/dev/null && echo $port; done; true"
    )
    return [int(port) for port in host.run(script, timeout=len(ports) * 2 + 30).split()]


def token(cluster: Cluster) -> dict[str, Any]:
    """Without the token, the job service refuses requests through the tunnel and Ray refuses connections."""
    assert cluster.try_at_desk("acpo submit --list").returncode == 0
    strangers = ("RAY_AUTH_TOKEN=wrong" + "0" * 30, "RAY_AUTH_MODE=disabled")
    for env in strangers:
        done = cluster.try_at_desk(f"export {env} && acpo submit --list")
        assert done.returncode == 2 and "RAY_AUTH_TOKEN_PATH" in done.stderr, (env, done.returncode, done.stderr)
    code = cluster.desk.run(f"curl -s -o /dev/null -w '%{{http_code}}' {JOBS}/api/jobs/")
    assert code == "401", code
    join = f"python -c \"import ray; ray.init('{cluster.head.address}:6379', log_to_driver=False); print('in')\""
    for env in strangers:
        command = f"unset RAY_AUTH_TOKEN_PATH && export {env} && timeout 60 {join}"
        done = cluster.try_on(cluster.net.hosts["h2"], command)
        assert done.returncode != 0 and "in\n" not in done.stdout, (env, done.stdout)
    return {"refused": ["wrong token", "no token"]}


def down(cluster: Cluster) -> dict[str, Any]:
    """`ray down` ends everything that `ray up` started, and `acpo_remove` deletes its files."""
    if cluster.desk.init is None or not (cluster.checkout / CONFIG).exists():
        clean(cluster)
        return {}
    cluster.end_forward()
    started = time.monotonic()
    cluster.at_desk(f"ray down -y {CONFIG}", timeout=300)
    took_s = time.monotonic() - started
    hosts = cluster.net.hosts.values()
    for host in hosts:
        until(lambda host=host: not host.processes(), _GONE_S, lambda host=host: f"{host.name}: {host.processes()}")
        until(lambda host=host: _ports(host) == {22}, 10, lambda host=host: f"{host.name}: {host.listeners()}")
        assert host.run("find /dev/shm -type f") == "", host.name
    ended_s = time.monotonic() - started
    for host in hosts:
        cluster.try_on(host, "acpo_remove")
    stays = {host.name: host.run("ls -Ap ~ ~/.ray /tmp").split() for host in hosts}
    rules = [host.run("nft list ruleset") for host in hosts]
    assert rules == [""] * 3, rules
    clean(cluster)
    return {"ray_down_s": took_s, "all_ended_s": ended_s, "files_that_stay": stays}


def _ports(host: Host) -> set[int]:
    return {int(where.rsplit(":", 1)[1]) for where, _ in host.listeners()}


def clean(cluster: Cluster) -> None:
    """End the machines."""
    cluster.net.down()
    assert cluster.net.leftovers() == []
