"""A cluster of three separate machines, from `ray up` to `ray down`, with everything that docs/cluster.md promises.

    python -m tests.cluster.bench                     # all steps, then clean up; a quarter of an hour on two cores
    python -m tests.cluster.bench --steps up,job      # some, and leave the machines on
    python -m tests.cluster.bench --steps down

The machines are Linux namespaces (`hosts.py`), so root is needed. What differs from three real machines: they share one
kernel and one disk, and the Python packages that `acpo_install` would download are taken from this checkout's .venv;
the project itself is installed from its wheel.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.cluster.hosts import USER, Host, Network, until, why_not

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("/var/tmp/acpo-bench")
CONFIG = "clusters/local.yaml"
NETWORK = "10.77.0.0/24"
JOBS = "http://127.0.0.1:8265"
SMALL = [
    "run.iterations=60", "checkpoint.every=10", "sampler.num_steps=4", "sampler.t_max=0.5", "sampler.late_per_sample=2",
    "rollout.prompts_per_iteration=16", "rollout.batch_size=4", "rollout.num_workers=2", "learner.micro_batch=4",
    "learner.global_batch=16", "rewards.calibration_samples=16", "tracking.num_images=4", "tracking.images_every=100",
    "learner.cpus_per_rank=0.5", "rollout.cpus_per_worker=0.5", "rewards.cpus_per_replica=0.25",
    "cluster.place_timeout_s=300", "rewards.attempt_timeout_s=30",
]  # fmt: skip
"""A toy run of seconds per iteration."""
ONE_HOST_EACH = [
    "cluster.roles.learner.labels={acpo-role: learner}", "cluster.roles.rollout.labels={acpo-role: rollout}",
    "cluster.roles.reward.labels={acpo-role: head}", "cluster.roles.reward.near_rollout=false",
]  # fmt: skip
MOVABLE = [
    "cluster.roles.learner.labels={acpo-role: 'in(learner,rollout)'}",
    "cluster.roles.rollout.labels={acpo-role: 'in(learner,rollout)'}", "cluster.roles.rollout.late_s=10",
    "cluster.roles.reward.labels={acpo-role: 'in(head,rollout)'}", "cluster.roles.reward.near_rollout=false",
]  # fmt: skip
"""What is lost on one machine finds room on another."""
NOTICE_S = 240
"""Longest time, on two busy cores, from the loss of a machine to the next finished iteration."""


class Bench:
    """The steps; each leaves the machines ready for the next."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.net = Network(folder, ["h1", "h2", "h3"], outside="desk")
        self.roles = {"h1": "head", "h2": "learner", "h3": "rollout"}
        self.desk = self.net.desk
        self.checkout = folder / "checkout"
        self.results: dict[str, object] = {}

    @property
    def head(self) -> Host:
        return self.net.hosts["h1"]

    # -- bringing up ------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Three machines, the real `ray up` over ssh, and a cluster of three nodes."""
        self.net.down()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._prepare_files()
        self.net.up()
        token = (
            self.desk.run(f"{self._activate} && ray get-auth-token --generate", timeout=120).strip().splitlines()[-1]
        )
        assert len(token) >= 32
        started = time.monotonic()
        launch = f"RAY_UP_enable_autoscaler_v2=0 ray up -y --no-config-cache {CONFIG}"
        self.desk.run(f"{self._activate} && cd {self.checkout} && {launch}", timeout=600)
        self.results["ray_up_s"] = round(time.monotonic() - started, 1)
        until(lambda: len(self._nodes()) == 3, 300, "not all machines joined; see monitor.out of the head's Ray")
        self.results["three_nodes_s"] = round(time.monotonic() - started, 1)
        until(lambda: self.head.call(f"{self._node} && curl -fs $MLFLOW_TRACKING_URI/health").returncode == 0, 180,
              f"MLflow does not answer; see {self.head.home}/acpo/mlflow.log")  # fmt: skip
        self.forward()

    def forward(self) -> None:
        """`ray dashboard` on the desk: the only way to the job service."""
        self.desk.spawn(
            f"{self._activate} && cd {self.checkout} && exec ray dashboard {CONFIG}", self.folder / "dashboard.log"
        )
        until(lambda: self.desk.listens(8265), 60, f"`ray dashboard` does not forward; see {self.folder}/dashboard.log")

    def _prepare_files(self) -> None:
        (self.checkout / "clusters").mkdir(parents=True)
        shutil.copy(ROOT / "requirements.txt", self.checkout)
        for name in ("env.sh", "node.sh"):
            shutil.copy(ROOT / "clusters" / name, self.checkout / "clusters")
        subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(self.checkout / "dist")],
                       cwd=ROOT, check=True, capture_output=True)  # fmt: skip
        config = yaml.safe_load((ROOT / CONFIG).read_text())
        # What everybody has to put in: addresses, user, key.
        config["provider"] |= {
            "head_ip": self.head.address, "worker_ips": [self.net.addresses[name] for name in ("h2", "h3")],
            "external_head_ip": self.net.door,
        }  # fmt: skip
        config["auth"] = {"ssh_user": USER, "ssh_private_key": str(self.folder / "key")}
        (self.checkout / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
        venv = self._make_venv()
        stamp = subprocess.run("cat requirements.txt dist/*.whl | sha256sum", shell=True, cwd=self.checkout, check=True,
                               capture_output=True, text=True).stdout  # fmt: skip
        (venv / ".acpo-installed").write_text(stamp)
        for name, host in {**self.net.hosts, "desk": self.desk}.items():
            (host.home / "acpo").mkdir(parents=True)
            (host.home / "acpo/venv").symlink_to(venv)
            if name in self.roles:
                (host.home / "acpo/host.sh").write_text(
                    f"export ACPO_RAY_OPTIONS='--num-cpus=2 --labels=acpo-role={self.roles[name]} "
                    f"--object-store-memory=200000000 --node-ip-address={host.address}'\n"
                    f"export ACPO_NETWORK={NETWORK}\n"
                )

    def _make_venv(self) -> Path:
        """What `acpo_install` makes, but with the packages of this checkout's environment."""
        venv, own = self.folder / "venv", Path(sys.prefix)
        subprocess.run([os.path.realpath(sys.executable), "-m", "venv", "--without-pip", str(venv)], check=True)
        site = next(venv.glob("lib/python*/site-packages"))
        (wheel,) = (self.checkout / "dist").glob("*.whl")
        shutil.unpack_archive(wheel, site, "zip")
        (site / "packages.pth").write_text(f"{next(own.glob('lib/python*/site-packages'))}\n")
        for name, module in (("acpo", "acpo_dist.cli"), ("ray", "ray.scripts.scripts"), ("mlflow", "mlflow.cli")):
            call = "main" if name != "mlflow" else "cli"
            script = venv / "bin" / name
            script.write_text(f"#!{venv}/bin/python\nimport sys\nfrom {module} import {call}\nsys.exit({call}())\n")
            script.chmod(0o755)
        return venv

    # -- small things -----------------------------------------------------------------------------------------------

    @property
    def _activate(self) -> str:
        return "export PATH=$HOME/acpo/venv/bin:$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0"

    @property
    def _node(self) -> str:
        """What a command on a machine of the cluster begins with."""
        return ". ~/acpo/node.sh"

    def _nodes(self) -> list[str]:
        done = self.head.call(f"{self._node} && ray list nodes --filter state=ALIVE --format json", timeout=90)
        try:
            return sorted(node["node_ip"] for node in json.loads(done.stdout[done.stdout.index("[") :]))
        except ValueError:
            return []

    def _workers(self) -> dict[str, set[str]]:
        """Role -> addresses of the machines on which it has live actors."""
        where = {node["node_id"]: node["node_ip"] for node in json.loads(self._list("nodes"))}
        found: dict[str, set[str]] = {"learner": set(), "rollout": set(), "reward": set()}
        names = {"LearnerActor": "learner", "RolloutActor": "rollout"}
        for actor in json.loads(self._list("actors --filter state=ALIVE --detail")):
            role = names.get(actor["class_name"]) or ("reward" if "ServeReplica" in actor["class_name"] else None)
            if role:
                found[role].add(where.get(actor["node_id"], "?"))
        return found

    def _list(self, what: str) -> str:
        text = self.head.run(f"{self._node} && ray list {what} --format json --limit 1000", timeout=90)
        return text[text.index("[") :]

    def _submit(self, name: str, seed: int, extra: list[str], *, ours: bool) -> str:
        """Start a run with `acpo submit`, or with Ray's own command."""
        overrides = [f"run.name={name}", f"run.seed={seed}", *SMALL, *extra]
        words = " ".join(f"'{word}'" if "'" not in word else f'"{word}"' for word in overrides)
        if ours:
            command = f"acpo submit toy_sdxl {words} --address {JOBS} --no-follow --name {name} --json"
        else:
            command = f"ray job submit --address {JOBS} --no-wait --submission-id {name} -- acpo train toy_sdxl {words}"
        self.desk.run(f"{self._activate} && {command}", timeout=180)
        return name

    def _status(self, job: str) -> str:
        # Asked every few seconds: curl costs a hundredth of a Python that imports Ray.
        token = (self.desk.home / ".ray/auth_token").read_text().strip()
        found = self.desk.run(f"curl -fs -H 'Authorization: Bearer {token}' {JOBS}/api/jobs/{job}")
        return json.loads(found)["status"]

    def _logs(self, job: str) -> str:
        return self.desk.run(f"{self._activate} && acpo submit --logs {job} --no-follow --address {JOBS}", timeout=120)

    def _rows(self, name: str, seed: int) -> list[dict]:
        file = self.net.shared / f"runs/{name}-{seed}/metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def _await_rows(self, job: str, seed: int, count: int, timeout_s: float = 400) -> None:
        until(
            lambda: len(self._rows(job, seed)) >= count or self._ended(job),
            timeout_s,
            f"{job} has no iteration {count}",
        )
        assert len(self._rows(job, seed)) >= count, self._logs(job)[-4000:]

    def _ended(self, job: str) -> bool:
        time.sleep(1)
        return self._status(job) in ("FAILED", "STOPPED")

    def _finish(self, job: str, timeout_s: float = 600) -> None:
        def over() -> bool:
            time.sleep(3)
            return self._status(job) in ("SUCCEEDED", "FAILED", "STOPPED")

        until(over, timeout_s, f"{job} does not end")
        assert self._status(job) == "SUCCEEDED", self._logs(job)[-6000:]

    # -- steps ------------------------------------------------------------------------------------------------------

    def job(self) -> None:
        """Ray's own `ray job submit`, workers of each role on a machine of its own, the pool from 1 to 3 and back."""
        started = time.monotonic()
        job = self._submit("first", 0, ["run.iterations=200", *ONE_HOST_EACH], ours=False)
        self._await_rows(job, 0, 1)
        found = self._workers()
        expected = {role: {self.net.addresses[name]} for name, role in
                    (("h1", "reward"), ("h2", "learner"), ("h3", "rollout"))}  # fmt: skip
        assert found == expected, found
        self.results["workers"] = {role: sorted(where) for role, where in found.items()}
        counts = [self._scale(3), self._scale(1)]
        assert counts == [3, 1], counts
        assert len(self._rows("first", 0)) < 200, "the run was over before the pool was scaled"
        self._finish(job)
        replicas = [row.get("reward_pool/two_stream/replicas") for row in self._rows("first", 0)]
        self.results |= {"first_s": round(time.monotonic() - started, 1), "replicas_by_iteration": replicas}

    def _scale(self, count: int) -> int:
        answer = self.head.run(f"{self._node} && acpo rewards scale two_stream {count} --json", timeout=240)
        return int(json.loads(answer.strip().splitlines()[-1])["running"])

    def second(self) -> None:
        """`acpo submit` with another seed, and both runs compared from the MLflow server."""
        self._finish(self._submit("second", 1, MOVABLE, ours=True))
        table = self.head.run(f"{self._node} && acpo compare --experiment acpo --json", timeout=180)
        names = {run["label"] for run in json.loads(table.strip().splitlines()[-1])["runs"]}
        assert names == {"first", "second"}, table[:2000]
        self.results["compared"] = sorted(names)

    def undisturbed(self) -> None:
        """What the disturbed runs must come out as."""
        self._finish(self._submit("calm", 0, MOVABLE, ours=True))

    def rollout_host(self) -> None:
        """The machine of a rollout worker and a reward replica goes away for good in the middle of a run."""
        self._lose("lost-rollout", lambda: self._with("rollout", but="learner"), restarts=0)

    def learner_host(self) -> None:
        """The learner's machine goes away: the same job goes on from its newest checkpoint."""
        self._lose("lost-learner", lambda: self._with("learner"), restarts=1)

    def network_cut(self) -> None:
        """A machine is cut off for 20 s and comes back."""
        job = self._submit("cut-off", 0, MOVABLE, ours=True)
        self._await_rows(job, 0, 1)
        host = self._with("rollout")
        before = len(self._rows(job, 0))
        host.cut()
        time.sleep(20)  # the cut is the experiment
        host.join()
        healed = time.monotonic()
        self._await_rows(job, 0, before + 1, NOTICE_S)
        self.results["cut_off"] = {"next_iteration_s": round(time.monotonic() - healed, 1)}
        self._finish(job)
        self._same_as_calm(job)
        self._all_back()

    def _lose(self, name: str, victim, *, restarts: int) -> None:
        job = self._submit(name, 0, MOVABLE, ours=True)
        self._await_rows(job, 0, 1)
        host = victim()
        self._await_rows(job, 0, 12)
        before = len(self._rows(name, 0))
        host.power_off()
        gone = time.monotonic()
        self._await_rows_again(job, before, NOTICE_S)
        self.results[name] = {"host": host.name, "next_iteration_s": round(time.monotonic() - gone, 1)}
        self._finish(job)
        self._same_as_calm(name)
        said = self._logs(job)
        assert said.count("going on from the newest checkpoint") == restarts, said[-4000:]
        assert restarts == 0 or "continuing from" in said
        host.start(self.net.shared, {**self.net.addresses, "desk": self.desk.address})
        self._all_back()

    def _await_rows_again(self, job: str, count: int, timeout_s: float) -> None:
        """An iteration beyond `count`; a restart first takes lines away."""
        until(lambda: len(self._rows(job, 0)) > count or self._ended(job), timeout_s, f"{job} hangs after the loss")

    def _with(self, role: str, but: str = "") -> Host:
        """A machine other than the head with workers of a role."""
        found = self._workers()
        wanted = found[role] - (found[but] if but else set()) - {self.head.address}
        assert wanted, found
        return next(host for host in self.net.hosts.values() if host.address == sorted(wanted)[-1])

    def _same_as_calm(self, name: str) -> None:
        def figures(rows: list[dict]) -> list[dict]:
            return [{k: v for k, v in row.items() if not k.startswith(("time/", "reward_pool/"))} for row in rows]

        calm, found = figures(self._rows("calm", 0)), figures(self._rows(name, 0))
        assert len(calm) == len(found), (len(calm), len(found))
        for mine, theirs in zip(calm, found, strict=True):
            odd = {key: (value, theirs.get(key)) for key, value in mine.items()
                   if abs(value - theirs.get(key, float("inf"))) > 1e-3 * max(1, abs(value))}  # fmt: skip
            assert not odd, f"{name}, iteration {mine['iteration']}: {odd}"

    def _all_back(self) -> None:
        """A machine that comes back is taken in again by Ray's autoscaler, which runs on the head."""
        started = time.monotonic()
        until(lambda: len(self._nodes()) == 3, 400, "not all machines are there again")
        self.results["taken_in_again_s"] = round(time.monotonic() - started, 1)

    def token(self) -> None:
        """Who does not hold the token is refused: the job service through the tunnel, and Ray on the wire."""
        ask = f"acpo submit --list --address {JOBS}"
        assert self.desk.call(f"{self._activate} && {ask}", timeout=120).returncode == 0
        for env in ("RAY_AUTH_TOKEN=wrong" + "0" * 30, "RAY_AUTH_MODE=disabled"):
            done = self.desk.call(f"{self._activate} && export {env} && {ask}", timeout=120)
            assert done.returncode == 2 and "wants its token" in done.stderr, (env, done.returncode, done.stderr)
        code = self.desk.run(f"curl -s -o /dev/null -w '%{{http_code}}' {JOBS}/api/jobs/")
        assert code == "401", code
        join = "python -c \"import ray; ray.init('10.77.0.1:6379', log_to_driver=False); print('in')\""
        for env in ("RAY_AUTH_TOKEN=wrong" + "0" * 30, "RAY_AUTH_MODE=disabled"):
            done = self.net.hosts["h2"].call(
                f"{self._node} && unset RAY_AUTH_TOKEN_PATH && export {env} && timeout 60 {join}", timeout=120
            )
            assert done.returncode != 0 and "in\n" not in done.stdout, (env, done.stdout)

    def listeners(self) -> None:
        """Dashboard, jobs and MLflow are on loopback; the outside reaches ssh alone, the other machines Ray."""
        found = {name: host.listeners() for name, host in self.net.hosts.items()}
        self.results["listeners"] = {name: sorted({where for where, _ in rows}) for name, rows in found.items()}
        for name, rows in found.items():
            private = [where for where, _ in rows if where.endswith((":8265", ":5000"))]
            odd = [where for where in private if not where.startswith("127.0.0.1:")]
            assert not odd, f"{name} listens on {odd}"
        on_head = {where for where, _ in found["h1"]}
        assert {"127.0.0.1:8265", "127.0.0.1:5000"} <= on_head, on_head
        ports = sorted({int(where.rsplit(":", 1)[1]) for where in on_head})
        assert self._reached(self.desk, self.net.door, ports) == [22]
        inside = self._reached(self.net.hosts["h2"], self.head.address, ports)
        assert 6379 in inside and 22 in inside and not {8265, 5000} & set(inside), inside
        self.results["reached_from_outside"], self.results["reached_from_h2"] = [22], inside

    def _reached(self, host: Host, address: str, ports: list[int]) -> list[int]:
        script = (
            f'for port in {" ".join(map(str, ports))}; do timeout 1 bash -c "echo > /dev/tcp/{address}/$port" '
            "2>/dev/null && echo $port; done; true"
        )
        return [int(port) for port in host.run(script, timeout=len(ports) * 2 + 30).split()]

    def down(self) -> None:
        """`ray down` ends everything that `ray up` began, and the machines leave nothing behind."""
        if self.desk.init is not None and (self.checkout / CONFIG).exists():
            started = time.monotonic()
            self.desk.run(f"{self._activate} && cd {self.checkout} && ray down -y {CONFIG}", timeout=300)
            for name, host in self.net.hosts.items():
                until(lambda host=host: not host.processes(), 180, f"still on {name}: {host.processes()}")
            self.results["ray_down_s"] = round(time.monotonic() - started, 1)
        self.clean()

    def clean(self) -> None:
        """End the machines."""
        self.net.down()
        assert self.net.leftovers() == []

    STEPS = (
        "up",
        "listeners",
        "token",
        "job",
        "second",
        "undisturbed",
        "rollout_host",
        "learner_host",
        "network_cut",
        "down",
    )


def main(arguments: list[str] | None = None) -> int:
    """Run steps; one JSON object at the end. Exit codes: 0 done or not possible here, 1 failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(Bench.STEPS), help="comma-separated; default: all")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--keep", action="store_true", help="leave the machines on when a step fails")
    options = parser.parse_args(arguments)
    reason = why_not()
    if reason:
        sys.stdout.write(f"skipped: {reason}\n")
        return 0
    bench, steps = Bench(options.folder), options.steps.split(",")
    for step in steps:
        started = time.monotonic()
        try:
            getattr(bench, step)()
        except BaseException as error:
            sys.stderr.write(f"FAILED {step}: {error}\n")
            if not options.keep:
                bench.clean()
            sys.stdout.write(json.dumps(bench.results, indent=2) + "\n")
            if not isinstance(error, AssertionError | subprocess.SubprocessError):
                raise
            return 1
        sys.stderr.write(f"ok {step} {time.monotonic() - started:.0f} s\n")
    sys.stdout.write(json.dumps(bench.results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
