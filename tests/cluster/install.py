"""Files on the machines before `ray up`: user settings, and what would otherwise be downloaded."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from tests.cluster.hosts import USER
from tests.cluster.network import Network

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "clusters/local.yaml"
NETWORK = "10.77.0.0/24"


def prepare(net: Network, checkout: Path, roles: Mapping[str, str]) -> None:
    """Make the checkout from which the cluster is brought up, and the machines' homes.

    Args:
        roles: label of each machine, the head first.
    """
    (checkout / "clusters").mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", checkout)
    for name in ("env.sh", "node.sh"):
        shutil.copy(ROOT / "clusters" / name, checkout / "clusters")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(checkout / "dist")],
                   cwd=ROOT, check=True, capture_output=True)  # fmt: skip
    _fill_in(net, checkout, roles)
    venv = _make_venv(net.folder / "venv", checkout)
    # What `acpo_install` writes when it is through.
    stamp = subprocess.run("cat requirements.txt dist/*.whl | sha256sum", shell=True, cwd=checkout, check=True,
                           capture_output=True, text=True).stdout  # fmt: skip
    (venv / ".acpo-installed").write_text(stamp)
    for name, host in {**net.hosts, "desk": net.desk}.items():
        (host.home / "acpo").mkdir(parents=True)
        (host.home / "acpo/venv").symlink_to(venv)
        if name in roles:
            (host.home / "acpo/host.sh").write_text(
                f"export ACPO_RAY_OPTIONS='--num-cpus=2 --labels=acpo-role={roles[name]} "
                f"--object-store-memory=200000000 --node-ip-address={host.address}'\n"
                f"export ACPO_NETWORK={NETWORK}\n"
            )


def copy_code(folder: Path, extra: str) -> None:
    """Copy this checkout's code, as in a working copy.

    Args:
        extra: what this copy's `acpo_dist` does besides, when it is imported.
    """
    for name in ("acpo_dist", "actors", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "acpo_dist/__init__.py").open("a") as file:
        file.write(extra)


def _fill_in(net: Network, checkout: Path, roles: Mapping[str, str]) -> None:
    """Addresses, user and key."""
    head, *workers = (net.addresses[name] for name in roles)
    config = yaml.safe_load((ROOT / CONFIG).read_text())
    config["provider"] |= {"head_ip": head, "worker_ips": workers, "external_head_ip": net.door}
    config["auth"] = {"ssh_user": USER, "ssh_private_key": str(net.folder / "key")}
    (checkout / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))


def _make_venv(venv: Path, checkout: Path) -> Path:
    """Create the environment of `acpo_install` with the packages of this checkout."""
    own = Path(sys.prefix)
    subprocess.run([os.path.realpath(sys.executable), "-m", "venv", "--without-pip", str(venv)], check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    (wheel,) = (checkout / "dist").glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    (site / "packages.pth").write_text(f"{next(own.glob('lib/python*/site-packages'))}\n")
    for name, module in (("acpo", "acpo_dist.cli"), ("ray", "ray.scripts.scripts"), ("mlflow", "mlflow.cli")):
        call = "main" if name != "mlflow" else "cli"
        script = venv / "bin" / name
        script.write_text(f"#!{venv}/bin/python\nimport sys\nfrom {module} import {call}\nsys.exit({call}())\n")
        script.chmod(0o755)
    return venv
