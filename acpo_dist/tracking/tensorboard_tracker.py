"""TensorBoard tracker: event files in the run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from typing_extensions import override

from acpo_dist.core.errors import ConfigError
from acpo_dist.core.ports import Tracker


class TensorboardTracker(Tracker):
    """Writes scalars, sample grids and texts for `tensorboard --logdir`.

    Args:
        folder: folder of the event files.
        first: first iteration that is recorded; a resumed run replaces events from there on.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, first: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"`tracking.tensorboard=true` needs TensorBoard, which cannot be imported ({error}): pip install "
                "'acpo-dist[tensorboard]', or set tracking.tensorboard=false."
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=first)

    @override
    def log_metrics(self, iteration: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), iteration)
        self._writer.flush()

    @override
    def log_image(self, name: str, iteration: int, path: Path) -> None:
        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), iteration, dataformats="HWC")

    @override
    def log_text(self, name: str, text: str) -> None:
        # Markdown shows an indented block as it is.
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()))

    @override
    def set_tags(self, tags: Mapping[str, Any]) -> None:
        for name, value in tags.items():
            self._writer.add_text(f"tags/{name}", str(value))

    @override
    def close(self, status: str) -> None:
        self._writer.close()
