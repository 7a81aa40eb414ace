"""Requests and commands for a reward pool on Ray, and a wait for changes of its cluster."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from acpo_dist.core.types import RolloutHandle

IMAGES = 3
"""Images of one request."""


def images(seed: int, count: int = IMAGES, size: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, size, size, generator=generator) * 255).to(torch.uint8)


def until(condition: Callable[[], bool], *, within_s: float = 300.0) -> None:
    """Wait for a condition of the cluster that has no notification; the limit is for a busy machine."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.1)


def handle_of(cluster, index: int, images: torch.Tensor) -> RolloutHandle:
    # A copy: a part of a larger tensor would travel with all of it.
    return RolloutHandle(
        sample_ids=tuple(f"{index}/{row}" for row in range(len(images))), prompts=("",) * len(images),
        policy_version=0, schedule_id="", payload=(None, cluster.put(images.clone())),
    )  # fmt: skip


def acpo(*arguments: str) -> dict:
    """Return the result of a command with --json, in this process, which is already connected to the cluster."""
    from typer.testing import CliRunner

    from acpo_dist.cli import commands  # noqa: F401
    from acpo_dist.cli.app import app

    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.strip().splitlines()[-1])


class EndlessLoad:
    """Scores the same requests repeatedly in a thread until it is closed."""

    def __init__(self, pool, load: list[RolloutHandle], metric: str) -> None:
        self.tables: list[dict[str, float]] = []
        self._ended = threading.Event()
        self._threads = ThreadPoolExecutor(1)
        self._done = self._threads.submit(self._work, pool, load, metric)

    def _work(self, pool, load: list[RolloutHandle], metric: str) -> None:
        while not self._ended.is_set():
            self.tables.append(dict(pool.score(load, [metric])[metric]))

    def another_round(self) -> None:
        """Wait until one more load was started and completed."""
        now = len(self.tables)
        until(lambda: len(self.tables) >= now + 2 or self._done.done())

    def close(self) -> None:
        self._ended.set()
        self._done.result()
