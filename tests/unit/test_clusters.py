"""The cluster files: accepted by Ray's own validator, private, spot where it is safe, without secrets or own paths."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCHED = ["cluster.yaml", "clusters/gcp.yaml", "clusters/local.yaml"]
FILES = [*LAUNCHED, "clusters/kuberay.yaml", "clusters/env.sh", "clusters/node.sh", "clusters/Dockerfile"]
CLOUDS = LAUNCHED[:2]


def _read(name):
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_a_file_that_it_is_to_launch(name):
    util = pytest.importorskip("ray.autoscaler._private.util", reason="needs the extra `ray`")
    prepared = util.prepare_config(_read(name))
    util.validate_config(prepared)


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_refuses_the_file_with_a_key_that_it_does_not_know(name):
    """So that the test above is known to look."""
    util = pytest.importorskip("ray.autoscaler._private.util", reason="needs the extra `ray`")
    with pytest.raises(Exception, match="idle_timeout_hours"):
        util.validate_config(util.prepare_config(_read(name) | {"idle_timeout_hours": 1}))


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_ray_process_starts_with_the_token_and_dashboards_stay_on_loopback(name):
    config = _read(name)
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    # node.sh sets the authentication mode, so a start without it would be an open cluster.
    assert all(". ~/acpo/node.sh && " in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "export RAY_AUTH_MODE=token" in (ROOT / "clusters/node.sh").read_text()
    assert "--host 127.0.0.1" in (ROOT / "clusters/node.sh").read_text()
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cloud_has_one_node_type_per_role_and_only_what_may_be_lost_is_spot(name):
    config = _read(name)
    types = config["available_node_types"]
    assert list(types) == ["head", "learner", "rollout", "reward"]
    assert {role: entry["labels"]["acpo-role"] for role, entry in types.items()} == {role: role for role in types}
    spot = [role for role, entry in types.items() if "spot" in str(entry["node_config"]).lower()]
    assert spot == ["rollout", "reward"]
    assert all(0 <= entry["min_workers"] <= entry["max_workers"] for entry in types.values())
    assert types["head"]["max_workers"] == 0 and types["head"]["resources"]["CPU"] == 0
    assert sum(entry["max_workers"] for entry in types.values()) <= config["max_workers"]
    assert config["idle_timeout_minutes"] <= 30


@pytest.mark.parametrize("name", LAUNCHED)
def test_what_is_copied_to_the_machines_is_in_the_checkout_or_made_by_a_documented_command(name):
    for source in _read(name)["file_mounts"].values():
        made = source in ("dist", "~/.ray/auth_token")
        assert made or (ROOT / source).is_file(), source


@pytest.mark.parametrize("script", ["clusters/node.sh", "clusters/env.sh"])
def test_the_shell_parts_are_valid_bash(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_a_login_shell_finds_ray_after_the_setup_so_that_ray_down_can_stop_it(tmp_path):
    """`ray down` calls a plain `ray stop` over ssh, and is silent when there is no `ray`."""
    home = tmp_path / "acpo"
    (home / "dist").mkdir(parents=True)
    (home / "venv/bin").mkdir(parents=True)
    for name in ("env.sh", "requirements.txt", "dist/one.whl", "venv/bin/ray"):
        (home / name).touch(mode=0o755)
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    # Nothing is to be installed: what is there is what is wanted.
    wanted = "cat ~/acpo/requirements.txt ~/acpo/dist/*.whl | sha256sum > ~/acpo/venv/.acpo-installed"
    twice = f"{wanted}; . {ROOT}/clusters/node.sh; acpo_install; acpo_install"
    subprocess.run(["bash", "-c", twice], env=environment, check=True)
    found = subprocess.run(["bash", "-c", ". ~/.bashrc; command -v ray; wc -l < ~/.bashrc"], env=environment,
                           capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    assert found == [str(home / "venv/bin/ray"), "1"]


def test_machines_of_ones_own_end_what_ray_down_does_not_reach():
    assert _read("clusters/local.yaml")["worker_start_ray_commands"][-1].endswith("acpo_end_with_head")


@pytest.mark.parametrize("name", FILES)
def test_no_file_holds_a_secret_or_the_path_of_a_machine(name):
    text = (ROOT / name).read_text()
    assert not re.search(
        r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|auth_token=[0-9a-f]{16}|password", text, re.IGNORECASE
    )
    assert not re.search(r"(?<![\w~.$}])/(work|root|home/(?!ray)\w+)/", text)


def _kuberay():
    return {(one["kind"]): one for one in yaml.safe_load_all((ROOT / "clusters/kuberay.yaml").read_text())}


def test_the_kubernetes_file_has_a_cluster_with_a_token_and_a_job_that_finds_it():
    found = _kuberay()
    assert {"RayCluster", "RayJob", "PersistentVolumeClaim", "NetworkPolicy"} == set(found)
    cluster, job = found["RayCluster"]["spec"], found["RayJob"]["spec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "acpo-token"}
    assert job["clusterSelector"] == {"ray.io/cluster": found["RayCluster"]["metadata"]["name"]}
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert set(groups) == {"learner", "rollout", "reward"}
    for name, group in groups.items():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["labels"] == {"acpo-role": name}
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert "nodeSelector" not in groups["learner"]["template"]["spec"]


def test_the_kubernetes_job_is_a_command_that_acpo_accepts():
    import shlex

    from acpo_dist.config.load import load_config

    words = shlex.split(_kuberay()["RayJob"]["spec"]["entrypoint"])
    assert words[:2] == ["acpo", "train"]
    config = load_config(words[2], [word for word in words[3:] if "=" in word])
    assert config.cluster.roles.learner.labels == {"acpo-role": "learner"}


def test_the_versions_of_ray_agree_everywhere():
    pinned = re.search(r"^ray==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE) or re.search(
        r"^ray\[.*\]==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE
    )
    assert pinned
    assert _kuberay()["RayCluster"]["spec"]["rayVersion"] == pinned[1]
    assert f"rayproject/ray:{pinned[1]}-" in (ROOT / "clusters/Dockerfile").read_text()
