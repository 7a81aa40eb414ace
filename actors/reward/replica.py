"""A replica of one metric: batches, watches itself, and leaves when it cannot be trusted; Serve starts another."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import GetTimeoutError

from acpo_dist.core.errors import RewardError
from actors.cluster.software import Software, require_same
from actors.process import set_up
from actors.ray_private import read_key, write_key

logger = logging.getLogger(__name__)

_PROBE_EVERY_S = 5.0
_PROBE_SHARE = 0.05
"""Most of the time that a replica spends on watching itself."""
_FAREWELL_S = 0.5
"""Between the decision to leave and the end of the process, so that callers whose request failed learn why."""


class ReplicaError(RewardError):
    """This replica cannot answer, another may."""

    def __init__(self, text: str, replica: str = "", cause: str = "unfit") -> None:
        """Say why, and which replica it was.

        Args:
            replica: its full name.
            cause: under what the retry is counted: `unfit`, `nonfinite`, `memory`, `timeout` or `avoided`.
        """
        super().__init__(text)
        self.replica, self.cause = replica, cause


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """Everything a replica is built from."""

    metric: Any
    model: Any | None
    cut: str
    wire_dtype: str
    cpus: float
    gpus: float
    max_batch: int
    batch_wait_s: float
    attempt_timeout_s: float
    software: Software | None = None
    """What its machine must run; None takes anything."""


class RewardReplica:
    """Shell round `RewardWorker`."""

    def __init__(self, plan: ReplicaPlan) -> None:
        """Set the process up, load metric and decoder, and score the known image.

        Raises:
            RewardError: the metric has no finite score for it, or another one than the replicas before.
            SoftwareError: this machine does not run what the driver runs.
        """
        require_same(plan.software)
        device = set_up(cpus=plan.cpus, gpus=plan.gpus)
        from acpo_dist.workers.reward.canary import Canary
        from acpo_dist.workers.reward.worker import RewardWorker
        from actors.reward.batcher import Batcher

        context = serve.get_replica_context()
        self._id = context.replica_id.to_full_id_str()
        self._worker = RewardWorker(
            plan.metric, model=plan.model, cut=plan.cut, wire_dtype=plan.wire_dtype, device=device,
            max_batch=plan.max_batch,
        )  # fmt: skip
        self._known = Canary(self._worker)
        self._known.compare(shared_reference(context.app_name, self._known.reference), "on the replicas before")
        self._timeout_s = plan.attempt_timeout_s
        self._sick, self._cause = "", ""
        self._ready, self._probed = time.monotonic(), time.monotonic()
        self._probe_pause_s = _PROBE_EVERY_S
        self._batcher = Batcher(
            self._compute, max_images=plan.max_batch, wait_s=plan.batch_wait_s, between=self._probe_if_due
        )
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    async def score(self, images: list[Any], prompts: tuple[str, ...], avoid: frozenset[str]) -> list[float]:
        """Score images that lie in the object store (a list of one reference, which Serve leaves alone)."""
        await self._admit(avoid)
        try:
            images_BCHW: Any = await asyncio.to_thread(ray.get, images[0], timeout=self._timeout_s)
        except GetTimeoutError as error:
            raise ReplicaError("the images do not come", self._id, "timeout") from error
        kind = ("score", images_BCHW.dtype, tuple(images_BCHW.shape[1:]))
        return await asyncio.wrap_future(self._batcher.submit(kind, len(images_BCHW), (images_BCHW, prompts)))

    async def value_and_grad(self, sent: Any, prompts: tuple[str, ...], avoid: frozenset[str]) -> Any:
        """See `RewardWorker.value_and_grad`."""
        await self._admit(avoid)
        kind = ("value_and_grad", sent.data.dtype.str, sent.data.shape[1:])
        return await asyncio.wrap_future(self._batcher.submit(kind, len(sent.data), (sent, prompts)))

    async def check_health(self) -> None:
        """Asked by Serve. The known image is scored between batches; here only its outcome is told.

        Raises:
            ReplicaError: this replica cannot be trusted.
        """
        if self._sick:
            raise ReplicaError(self._sick, self._id)

    async def vitals(self) -> dict[str, Any]:
        """What this replica has done since it was ready."""
        found, now = self._batcher.vitals(), time.monotonic()
        return {
            "replica": self._id, "pid": os.getpid(), "queue": self._batcher.waiting, "requests": found.requests,
            "batches": found.batches, "images": found.images, "busy_s": found.busy_s,
            "up_s": now - self._ready, "answered_s_ago": None if found.answered is None else now - found.answered,
            "known_score": self._known.reference, "sick": self._sick,
        }  # fmt: skip

    async def _admit(self, avoid: frozenset[str]) -> None:
        if self._sick:
            # A replica that refuses at once looks idle, and would be asked again and again until it is gone.
            await asyncio.sleep(_FAREWELL_S)
            raise ReplicaError(self._sick, self._id)
        if self._id in avoid:
            raise ReplicaError(f"reward `{self._worker.name}`: another replica is wanted", self._id, "avoided")

    def _compute(self, kind: Hashable, payloads: Sequence[Any]) -> Sequence[Any]:
        from acpo_dist.workers.reward.batches import gradients_together, score_together
        from acpo_dist.workers.reward.memory import OutOfMemoryError
        from acpo_dist.workers.reward.worker import NonFiniteScoreError

        if self._sick:
            raise ReplicaError(self._sick, self._id, self._cause)
        together = score_together if isinstance(kind, tuple) and kind[0] == "score" else gradients_together
        try:
            return together(self._worker, payloads)
        except NonFiniteScoreError as error:
            # Is it the image or the replica? The known image tells.
            self._probe("nonfinite")
            raise ReplicaError(self._sick or str(error), self._id, "nonfinite") from error
        except OutOfMemoryError as error:
            # What filled the memory goes with the process.
            self._leave(str(error), "memory")
            raise ReplicaError(str(error), self._id, "memory") from error

    def _probe_if_due(self) -> None:
        if not self._sick and time.monotonic() - self._probed >= self._probe_pause_s:
            self._probe()

    def _probe(self, cause: str = "unfit") -> None:
        started = time.monotonic()
        try:
            self._known.check()
        except RewardError as error:
            self._leave(str(error), cause)
        self._probed = time.monotonic()
        self._probe_pause_s = max(_PROBE_EVERY_S, (self._probed - started) / _PROBE_SHARE)

    def _watch(self) -> None:
        """End the process when a batch hangs: nothing else frees a thread that does not come back."""
        while self._batcher.running_s() <= self._timeout_s:
            time.sleep(min(1.0, self._timeout_s / 10))
        logger.error("reward %s: one batch took more than %g s", self._worker.name, self._timeout_s)
        os._exit(1)

    def _leave(self, reason: str, cause: str) -> None:
        """Take no further request, and end soon; Serve starts another replica in this one's place."""
        if not self._sick:
            self._sick, self._cause = reason, cause
            logger.error("replica leaves: %s", reason)
            timer = threading.Timer(_FAREWELL_S, os._exit, (1,))
            timer.daemon = True
            timer.start()


def shared_reference(app: str, mine: float) -> float:
    """Score of the known image that the first replica of an application found; `mine` for the first."""
    write_key(reference_key(app), repr(mine), overwrite=False)
    found = read_key(reference_key(app))
    return float(found) if found else mine


def reference_key(app: str) -> str:
    """Where that score is kept while the application lives."""
    return f"acpo/{app}/known_score"
