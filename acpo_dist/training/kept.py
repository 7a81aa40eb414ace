"""Training states that outlive the learner's ranks, for runs that lose ranks between two checkpoints."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from acpo_dist.core.errors import WorkerLostError
from acpo_dist.core.ports import KeptState
from acpo_dist.workers.learner.checkpoint import LEARNER, CheckpointStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Kept:
    iteration: int
    learner: KeptState
    driver: Mapping[str, Any]


class KeptStates:
    """The states after the newest iterations since the last checkpoint."""

    def __init__(self) -> None:
        """Start without a state."""
        self._states: list[_Kept] = []

    def add(self, iteration: int, learner: KeptState, driver: Mapping[str, Any]) -> None:
        """Store the state after an iteration.

        Args:
            iteration: number of completed iterations.
            learner: the learner's part, which may still be under way.
            driver: the other part of a checkpoint's state.
        """
        # If a rank is lost while the newest is under way, the one before is complete.
        newest = _Kept(iteration=iteration, learner=learner, driver=deepcopy(driver))
        self._states = [*self._states[-1:], newest]

    def clear(self) -> None:
        """Release all states: a checkpoint replaces them."""
        self._states = []

    def save(self, checkpoints: CheckpointStore) -> None:
        """Write the newest complete state, if there is one, as a checkpoint, and release all."""
        states, self._states = self._states, []
        for kept in reversed(states):
            partial = checkpoints.prepare(kept.iteration)
            try:
                kept.learner.write(partial / LEARNER)
                best = int(kept.driver["guard"]["state"]["best"][0])
                checkpoints.commit(partial, kept.iteration, dict(kept.driver), protect=best)
            except WorkerLostError as error:
                checkpoints.discard(partial)
                logger.warning("the training state after iteration %d is lost: %s", kept.iteration, error)
            except BaseException:
                checkpoints.discard(partial)
                raise
            else:
                return
