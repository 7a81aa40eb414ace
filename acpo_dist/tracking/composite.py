"""Several trackers behind one; an error in one affects neither the run nor the others."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from acpo_dist.core.errors import ConfigError
from acpo_dist.core.ports import Tracker

logger = logging.getLogger(__name__)


def optional_trackers(section: Any, root: Path, name: str, params: Mapping[str, Any], first: int) -> list[Tracker]:
    """Open the trackers besides MLflow that a configuration selects.

    Args:
        section: the `tracking` section.
        root: run folder.
        name: name of the run.
        params: the configuration.
        first: first iteration that is recorded.

    Raises:
        ConfigError: a selected tracker is not installed.
    """
    found: list[Tracker] = []
    if section.tensorboard:
        from acpo_dist.tracking.tensorboard_tracker import TensorboardTracker

        found.append(TensorboardTracker(root / "tensorboard", first=first))
    if section.wandb != "off":
        from acpo_dist.tracking.wandb_tracker import WandbTracker

        try:
            found.append(
                WandbTracker(root, mode=section.wandb, project=section.wandb_project, name=name, params=params)
            )
        except ConfigError:
            raise
        except Exception as error:  # the port's promise: a tracker never stops training
            logger.warning(
                "Weights & Biases cannot be used (%s: %s); training goes on without it. tracking.wandb=offline needs "
                "no network.", type(error).__name__, str(error).partition("\n")[0][:200],
            )  # fmt: skip
    return found


class CompositeTracker(Tracker):
    """Forwards every call to every tracker, in order.

    The first exception of a tracker is logged with the name of its class and not raised. The tracker is still called
    afterwards, since disks and services may recover.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)
        self._failed: set[int] = set()

    @override
    def log_metrics(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._each("log_metrics", lambda tracker: tracker.log_metrics(iteration, metrics))

    @override
    def log_image(self, name: str, iteration: int, path: Path) -> None:
        self._each("log_image", lambda tracker: tracker.log_image(name, iteration, path))

    @override
    def log_text(self, name: str, text: str) -> None:
        self._each("log_text", lambda tracker: tracker.log_text(name, text))

    @override
    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._each("set_tags", lambda tracker: tracker.set_tags(tags))

    @override
    def close(self, status: str) -> None:
        self._each("close", lambda tracker: tracker.close(status))

    def _each(self, what: str, call: Callable[[Tracker], None]) -> None:
        for index, tracker in enumerate(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # A tracker never stops training.
                self._report(index, what, error)

    def _report(self, index: int, what: str, error: Exception) -> None:
        level = logging.DEBUG if index in self._failed else logging.WARNING
        self._failed.add(index)
        name = type(self._trackers[index]).__name__
        logger.log(
            level, "%s.%s failed and may miss records from now on; training continues: %s: %s",
            name, what, type(error).__name__, error,
        )  # fmt: skip
        logger.debug("%s.%s", name, what, exc_info=error)
