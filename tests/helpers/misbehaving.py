"""A real metric that fails in one replica, or at its start, when a file requests it."""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from acpo_dist.config.plugins import MetricConfig
from acpo_dist.core.errors import RewardConfigError
from acpo_dist.rewards.config import SharpnessConfig
from acpo_dist.rewards.statistics import Sharpness

FAULTS = ("hang", "nan", "nan_on_requests", "memory", "memory_of_batches")
CANARY = 64
"""Side of the replica's canary image; requests of the tests have another size."""


class Misbehaving(Sharpness):
    """Sharpness, until a file named after a fault exists: the first replica that scores then keeps the fault."""

    class Config(SharpnessConfig):
        type: str = "tests.helpers.misbehaving:Misbehaving"
        folder: Path
        seconds: float = 0.0
        """Minimum duration of a batch, as with a larger network."""
        start_seconds: float = 0.0
        """Duration of loading the metric."""
        prefer: str = "more"

    def __init__(self, config: MetricConfig, *, device: str = "cpu") -> None:
        super().__init__(config, device=device)
        assert isinstance(config, Misbehaving.Config)
        self._folder, self._seconds, self._fault = config.folder, config.seconds, ""
        if (config.folder / "refuse").exists():
            raise RewardConfigError("this machine cannot load the metric")
        time.sleep(config.start_seconds)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if images.shape[-1] != CANARY:
            self._take_a_fault()
        if self._fault == "hang":
            threading.Event().wait()
        if self._fault == "nan" or (self._fault == "nan_on_requests" and images.shape[-1] != CANARY):
            return torch.full((len(images),), torch.nan)
        if self._fault == "memory" or (self._fault == "memory_of_batches" and len(images) > 1):
            raise MemoryError("no memory left")
        time.sleep(self._seconds)
        return super().__call__(images, prompts)

    def _take_a_fault(self) -> None:
        for fault in FAULTS if not self._fault else ():
            try:
                # One process alone can rename a file.
                os.rename(self._folder / fault, self._folder / f"{fault}.{os.getpid()}")
            except FileNotFoundError:
                continue
            self._fault = fault
            return
