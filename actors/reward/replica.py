"""A replica of one metric: batches requests, and ends itself if its canary fails; Serve replaces it."""

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
"""Largest share of its time that a replica spends on canary checks."""
_FAREWELL_S = 0.5
"""Seconds between the decision to end and the end of the process, in which failed requests return their error."""


class ReplicaError(RewardError):
    """This replica cannot compute the request; another one may."""

    def __init__(self, text: str, replica: str = "", cause: str = "unfit") -> None:
        """Store the reason and the replica.

        Args:
            text: the reason.
            replica: its full name.
            cause: category of the retry: `unfit`, `nonfinite`, `memory`, `timeout` or `avoided`.
        """
        super().__init__(text)
        self.replica, self.cause = replica, cause


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """Constructor arguments of a replica."""

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
    """Software that the machine must have; None skips the comparison."""


class RewardReplica:
    """Serve deployment around `RewardWorker`."""

    def __init__(self, plan: ReplicaPlan) -> None:
        """Set up the process, load metric and decoder, and score the canary.

        Raises:
            RewardError: the canary's score is not finite, or differs from that of earlier replicas.
            SoftwareError: this machine runs other software than the driver.
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
        self._canary = Canary(self._worker)
        self._canary.compare(shared_reference(context.app_name, self._canary.reference), "on earlier replicas")
        self._timeout_s = plan.attempt_timeout_s
        self._sick, self._cause = "", ""
        self._ready, self._probed = time.monotonic(), time.monotonic()
        self._probe_pause_s = _PROBE_EVERY_S
        self._batcher = Batcher(
            self._compute, max_images=plan.max_batch, wait_s=plan.batch_wait_s, between=self._probe_if_due
        )
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    async def score(self, images: list[Any], prompts: tuple[str, ...], avoid: frozenset[str]) -> list[float]:
        """Score images in the object store; takes a list of one reference, since Serve fetches plain references.

        For a metric on latents it is the reference of their `RolloutBatch`.
        """
        await self._admit(avoid)
        try:
            images_BCHW: Any = await asyncio.to_thread(ray.get, images[0], timeout=self._timeout_s)
        except GetTimeoutError as error:
            raise ReplicaError("the images did not arrive", self._id, "timeout") from error
        if self._worker.on_latents:
            # The rollout's states, of which x_0 is scored.
            images_BCHW = images_BCHW.latents_BCHW
        kind = ("score", images_BCHW.dtype, tuple(images_BCHW.shape[1:]))
        return await asyncio.wrap_future(self._batcher.submit(kind, len(images_BCHW), (images_BCHW, prompts)))

    async def value_and_grad(self, sent: Any, prompts: tuple[str, ...], avoid: frozenset[str]) -> Any:
        """Run `RewardWorker.value_and_grad` in a batch."""
        await self._admit(avoid)
        kind = ("value_and_grad", sent.data.dtype.str, sent.data.shape[1:])
        return await asyncio.wrap_future(self._batcher.submit(kind, len(sent.data), (sent, prompts)))

    async def check_health(self) -> None:
        """Serve's health check: outcome of the last canary check, which runs between batches.

        Raises:
            ReplicaError: the canary failed.
        """
        if self._sick:
            raise ReplicaError(self._sick, self._id)

    async def vitals(self) -> dict[str, Any]:
        """Return the state of this replica, and its work since it became ready."""
        found, now = self._batcher.vitals(), time.monotonic()
        return {
            "replica": self._id, "pid": os.getpid(), "queue": self._batcher.waiting, "requests": found.requests,
            "batches": found.batches, "images": found.images, "busy_s": found.busy_s,
            "up_s": now - self._ready, "answered_s_ago": None if found.answered is None else now - found.answered,
            "known_score": self._canary.reference, "sick": self._sick,
        }  # fmt: skip

    async def _admit(self, avoid: frozenset[str]) -> None:
        if self._sick:
            # A replica that rejects requests immediately looks idle to Serve, which would route more to it.
            await asyncio.sleep(_FAREWELL_S)
            raise ReplicaError(self._sick, self._id)
        if self._id in avoid:
            raise ReplicaError(f"reward `{self._worker.name}`: the caller avoids this replica", self._id, "avoided")

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
            # The canary shows whether the image or the replica is at fault.
            self._probe("nonfinite")
            raise ReplicaError(self._sick or str(error), self._id, "nonfinite") from error
        except OutOfMemoryError as error:
            # Only the end of the process reliably frees the memory.
            self._leave(str(error), "memory")
            raise ReplicaError(str(error), self._id, "memory") from error

    def _probe_if_due(self) -> None:
        if not self._sick and time.monotonic() - self._probed >= self._probe_pause_s:
            self._probe()

    def _probe(self, cause: str = "unfit") -> None:
        started = time.monotonic()
        try:
            self._canary.check()
        except RewardError as error:
            self._leave(str(error), cause)
        self._probed = time.monotonic()
        self._probe_pause_s = max(_PROBE_EVERY_S, (self._probed - started) / _PROBE_SHARE)

    def _watch(self) -> None:
        """End the process when a batch hangs, since a thread cannot be cancelled."""
        while self._batcher.running_s() <= self._timeout_s:
            time.sleep(min(1.0, self._timeout_s / 10))
        logger.error("reward %s: one batch took more than %g s", self._worker.name, self._timeout_s)
        os._exit(1)

    def _leave(self, reason: str, cause: str) -> None:
        """Stop accepting requests, and end soon; Serve starts another replica."""
        if not self._sick:
            self._sick, self._cause = reason, cause
            logger.error("replica ends itself: %s", reason)
            timer = threading.Timer(_FAREWELL_S, os._exit, (1,))
            timer.daemon = True
            timer.start()


def shared_reference(app: str, mine: float) -> float:
    """Return the canary score of the first replica of an application; `mine` for the first one."""
    write_key(reference_key(app), repr(mine), overwrite=False)
    found = read_key(reference_key(app))
    return float(found) if found else mine


def reference_key(app: str) -> str:
    """Return the key of that score in the cluster's key-value store."""
    return f"acpo/{app}/known_score"
