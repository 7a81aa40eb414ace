"""Runs on the bench: start, and results."""

import json
import math
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.hosts import until

JOBS = "http://127.0.0.1:8265"
SMALL = [
    "run.iterations=40", "checkpoint.every=5", "sampler.num_steps=4", "sampler.t_max=0.5", "sampler.late_per_sample=2",
    "rollout.prompts_per_iteration=16", "rollout.batch_size=4", "rollout.num_workers=2", "learner.micro_batch=4",
    "learner.global_batch=16", "rewards.calibration_samples=16", "tracking.num_images=4", "tracking.images_every=100",
    "learner.cpus_per_rank=0.5", "rollout.cpus_per_worker=0.5", "rewards.cpus_per_replica=0.25",
    "cluster.place_timeout_s=300", "rewards.attempt_timeout_s=30",
    "rewards.pool.two_stream.max_batch=4", "rewards.pool.strided_judge.max_batch=4",
]  # fmt: skip
"""A toy run of a second or two per iteration. Every request fills a batch of the reward pool: in other company images
score the same to 1e-7 only, which Adam made 1e-2 of in 20 iterations, whether a machine was lost or not."""
OVER = ("SUCCEEDED", "FAILED", "STOPPED")


def labels(**roles: str) -> list[str]:
    """Overrides that select the machines of a role."""
    return [f"cluster.roles.{role}.labels={{acpo-role: '{where}'}}" for role, where in roles.items()]


@dataclass(frozen=True)
class Run:
    """A run and its job."""

    cluster: Cluster
    name: str
    seed: int
    overrides: tuple[str, ...] = ()

    @property
    def _folder(self) -> Path:
        return self.cluster.net.shared / f"runs/{self.name}-{self.seed}"

    @property
    def arguments(self) -> str:
        """Return the arguments of `acpo train` or `acpo submit`."""
        words = ["toy_sdxl", f"run.name={self.name}", f"run.seed={self.seed}", *SMALL, *self.overrides]
        return shlex.join(words)

    def submit(self, *options: str) -> "Run":
        """Start it with `acpo submit` without following; results of an earlier attempt are removed first."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self.cluster.try_at_desk(f"ray job delete --address {JOBS} {self.name}")
        words = shlex.join(options)
        self.cluster.at_desk(f"acpo submit {self.arguments} --no-follow --name {self.name} --json {words}")
        return self

    def status(self, job: str = "") -> str:
        """Return the status of the job in Ray's terms."""
        # Asked every few seconds: curl costs a hundredth of a Python that imports Ray.
        token = (self.cluster.desk.home / ".ray/auth_token").read_text().strip()
        url = f"{JOBS}/api/jobs/{job or self.name}"
        return json.loads(self.cluster.desk.run(f"curl -fs -H 'Authorization: Bearer {token}' {url}"))["status"]

    def output(self, job: str = "") -> str:
        """Return its output so far."""
        return self.cluster.at_desk(f"acpo submit --logs {job or self.name} --no-follow")

    def rows(self) -> list[dict[str, float]]:
        """Return its metrics, one mapping per iteration."""
        file = self._folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def await_rows(self, count: int, timeout_s: float = 400) -> None:
        """Wait for a number of iterations; a run that ends before fails with its output."""

        def there() -> bool:
            time.sleep(0.5)
            return len(self.rows()) >= count or self.status() in OVER

        until(there, timeout_s, lambda: f"{self.name}: {len(self.rows())} lines after {timeout_s:g} s, not {count}")
        assert len(self.rows()) >= count, self.output()[-6000:]

    def finish(self, job: str = "", timeout_s: float = 600) -> "Run":
        """Wait for success."""

        def over() -> bool:
            time.sleep(2)
            return self.status(job) in OVER

        until(over, timeout_s, f"{self.name} does not end in {timeout_s:g} s")
        assert self.status(job) == "SUCCEEDED", self.output(job)[-6000:]
        return self


def largest_difference(calm: Sequence[dict[str, float]], other: Sequence[dict[str, float]]) -> tuple[float, str]:
    """Return the largest relative difference between metrics of two runs (absolute below 1), and its place.

    Times and what the reward pool says of itself are left out: these may differ.
    """
    assert len(calm) == len(other), f"{len(calm)} iterations undisturbed, {len(other)} disturbed"
    worst, where = 0.0, ""
    for mine, theirs in zip(calm, other, strict=True):
        for name, value in mine.items():
            if name.startswith(("time/", "idle/", "reward_pool/")):
                continue
            found = abs(value - theirs.get(name, math.inf)) / max(1.0, abs(value))
            if not found <= worst:
                worst, where = found, f"{name}, iteration {mine['iteration']:g}: {value}, {theirs.get(name)}"
    return worst, where
