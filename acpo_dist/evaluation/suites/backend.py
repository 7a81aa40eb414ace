"""Where an evaluation runs: what it asks of a backend, and the backend of this process."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from acpo_dist.config.schema import Config
from acpo_dist.core.ports import RolloutPool
from acpo_dist.evaluation.suites.judges import JudgePool, LocalJudges
from acpo_dist.training.local import LocalRollouts, default_device


class Backend(Protocol):
    """Opens the pools of an evaluation."""

    name: str
    chunks_at_once: int
    """Chunks that are drawn before their images are fetched; enough to keep every worker busy."""

    def open(self) -> AbstractContextManager[Any]:
        """What all pools need, for as long as it is entered."""
        ...

    def rollouts(self, config: Config) -> AbstractContextManager[RolloutPool]:
        """Workers with the model of `config` and untouched weights; freed on leaving."""
        ...

    def judges(self, sections: Sequence[Any]) -> AbstractContextManager[JudgePool]:
        """The judges, loaded; freed on leaving."""
        ...


class LocalBackend:
    """This process."""

    name = "local"
    chunks_at_once = 1

    @contextmanager
    def open(self) -> Iterator["LocalBackend"]:
        """See `Backend.open`."""
        yield self

    @contextmanager
    def rollouts(self, config: Config) -> Iterator[RolloutPool]:
        """See `Backend.rollouts`."""
        pool = LocalRollouts(config, device=default_device())
        try:
            yield pool
        finally:
            pool.close()

    @contextmanager
    def judges(self, sections: Sequence[Any]) -> Iterator[JudgePool]:
        """See `Backend.judges`."""
        yield LocalJudges(sections, device=default_device())
