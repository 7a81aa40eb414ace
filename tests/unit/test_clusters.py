"""Cluster files: accepted by Ray's validator, private, spot only where a loss is safe, without secrets or own paths."""

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
    """Checks that the test above can fail."""
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


def _shell(home, script, *, commands=()):
    """Run bash with node.sh and its own home; `commands` (name, body) replace the machine's."""
    binary = home / "bin"
    binary.mkdir(exist_ok=True)
    for name, body in commands:
        (binary / name).write_text(f"#!/bin/bash\n{body}\n")
        (binary / name).chmod(0o755)
    (home / "acpo").mkdir(exist_ok=True)
    (home / "acpo/env.sh").write_text((ROOT / "clusters/env.sh").read_text())
    environment = {"HOME": str(home), "USER": "me", "PATH": f"{binary}:/usr/bin:/bin", "ACPO_SHARED": f"{home}/shared"}
    return subprocess.run(["bash", "-c", f". {ROOT}/clusters/node.sh; {script}"], env=environment, text=True,
                          capture_output=True)  # fmt: skip


def test_of_several_wheels_the_one_that_was_built_last_is_installed_and_the_others_go(tmp_path):
    import os

    dist = tmp_path / "acpo/dist"
    (tmp_path / "acpo/venv/bin").mkdir(parents=True)
    dist.mkdir()
    (tmp_path / "acpo/requirements.txt").write_text("")
    for age, name in enumerate(("b-0.2.whl", "a-0.10.whl", "c-0.1.whl")):
        (dist / name).write_text(name)
        os.utime(dist / name, (1000 - age, 1000 - age))
    # The shell's `pip` is this one; the machine's is not asked.
    for name in ("pip", "python"):
        (tmp_path / "acpo/venv/bin" / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/asked\n')
        (tmp_path / "acpo/venv/bin" / name).chmod(0o755)
    found = _shell(tmp_path, "acpo_install && acpo_install")
    assert found.returncode == 0, found.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2 and asked[1].endswith(f"--force-reinstall {dist}/b-0.2.whl")
    assert [path.name for path in dist.iterdir()] == ["b-0.2.whl"]
    (dist / "b-0.2.whl").unlink()
    assert "no wheel in dist" in _shell(tmp_path, "acpo_install").stderr


AS_ROOT = ("sudo", 'exec "$@"')


def test_shared_storage_that_is_not_mounted_stops_the_machine_from_joining(tmp_path):
    quiet = [AS_ROOT, ("mount", "true"), ("mount.nfs4", "true"), ("mountpoint", f"test -e {tmp_path}/mounted"),
             ("chown", "true"), ("install", 'mkdir -p "${@: -1}"')]  # fmt: skip
    export = "export ACPO_NFS=storage:/; acpo_mount"
    found = _shell(tmp_path, export, commands=quiet)
    assert found.returncode == 1 and "ACPO_NFS=storage:/ is not mounted at" in found.stderr
    mounts = [*quiet, ("mount", f"touch {tmp_path}/mounted; echo mounted")]
    again = _shell(tmp_path, f"{export} && {export.split('; ')[1]}", commands=mounts)
    assert again.returncode == 0 and again.stdout.splitlines() == ["mounted"], again.stderr
    assert (tmp_path / "shared/runs").is_dir()
    assert _shell(tmp_path, "export ACPO_NFS=; acpo_mount").returncode == 0


@pytest.mark.parametrize("name", LAUNCHED)
@pytest.mark.parametrize("kind", ["head", "worker"])
def test_a_restarted_machine_mounts_storage_and_closes_its_ports_before_ray_starts(name, kind):
    """Ray's own updater skips the setup of a machine whose tags say that it was set up."""
    updater = pytest.importorskip("ray.autoscaler._private.updater", reason="needs the extra `ray`")
    config, ran = _read(name), []

    class Machine:
        def __init__(self):
            self.provider_config = {}
            self.tags = {"ray-runtime-config": "set up", "ray-file-mounts-contents": "files", "ray-node-status": ""}

        def node_tags(self, _):
            return dict(self.tags)

        def set_node_tags(self, _, tags):
            self.tags.update(tags)

        def get_command_runner(self, *_, **__):
            return self

        def run(self, command, *_, **__):
            ran.append(command)

        def run_init(self, **_):
            return False

        def run_rsync_up(self, *_, **__):
            pass

    one = updater.NodeUpdater(
        "one", config["provider"], Machine(), config["auth"], "acpo", {}, config["initialization_commands"],
        config["setup_commands"], config[f"{kind}_start_ray_commands"], "set up", "files", kind == "head",
    )  # fmt: skip
    one.wait_ready = lambda deadline: None
    one.do_update()
    started = next(index for index, command in enumerate(ran) if "ray start" in command)
    before = " && ".join(ran[:started])
    assert "acpo_mount && acpo_firewall" in before and "acpo_install" not in before


def test_disks_of_google_machines_are_of_a_type_that_gpu_machines_take_in_the_clusters_zone():
    config = _read("clusters/gcp.yaml")
    zone = config["provider"]["availability_zone"]
    for kind in config["available_node_types"].values():
        (disk,) = kind["node_config"]["disks"]
        assert disk["initializeParams"]["diskType"] == f"zones/{zone}/diskTypes/pd-balanced"


def test_own_machines_end_the_processes_that_ray_down_does_not_reach():
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
    # GPU pods come when they are asked for; the job's folder holds no files.
    assert config.cluster.place_timeout_s >= 1200
    assert config.data.prompts.startswith("/mnt/acpo/")
    # The job alone has the label by which it is applied after its prompts are there.
    assert [kind for kind, one in _kuberay().items() if one["metadata"].get("labels", {}).get("acpo") == "run"] == [
        "RayJob"
    ]


def test_the_versions_of_ray_agree_everywhere():
    pinned = re.search(r"^ray==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE) or re.search(
        r"^ray\[.*\]==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE
    )
    assert pinned
    assert _kuberay()["RayCluster"]["spec"]["rayVersion"] == pinned[1]
    assert f"rayproject/ray:{pinned[1]}-" in (ROOT / "clusters/Dockerfile").read_text()
