"""Backend interface of an evaluation, and its implementation in the current process."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from typing_extensions import override

from acpo_dist.config.schema import Config
from acpo_dist.core.ports import RolloutPool
from acpo_dist.evaluation.suites.judges import JudgePool, LocalJudges
from acpo_dist.training.local import LocalRollouts, default_device


class Backend(Protocol):
    """Opens the pools of an evaluation."""

    name: str
    chunks_at_once: int
    """Chunks that are sampled before their images are fetched; enough to keep all workers busy."""

    def open(self) -> AbstractContextManager[Any]:
        """Return a context manager for the resources that all pools share."""
        ...

    def rollouts(self, config: Config) -> AbstractContextManager[RolloutPool]:
        """Return a context manager for workers with the original weights of the model of `config`."""
        ...

    def judges(self, sections: Sequence[Any]) -> AbstractContextManager[JudgePool]:
        """Return a context manager for the loaded judges."""
        ...


class LocalBackend(Backend):
    """Runs an evaluation in the current process."""

    name = "local"
    chunks_at_once = 1

    @override
    @contextmanager
    def open(self) -> Iterator["LocalBackend"]:
        yield self

    @override
    @contextmanager
    def rollouts(self, config: Config) -> Iterator[RolloutPool]:
        pool = LocalRollouts(config, device=default_device())
        try:
            yield pool
        finally:
            pool.close()

    @override
    @contextmanager
    def judges(self, sections: Sequence[Any]) -> Iterator[JudgePool]:
        yield LocalJudges(sections, device=default_device())
