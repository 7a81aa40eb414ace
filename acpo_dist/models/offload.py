"""Parts of a model that stay in host memory between uses, moved by Accelerate's hooks."""

from typing import Any

from accelerate import cpu_offload_with_hook
from torch import nn


class Offloader:
    """Moves modules to the device when they are called, and back to host memory on `release`."""

    def __init__(self, device: str) -> None:
        """Start without modules.

        Args:
            device: torch device on which the modules run.
        """
        self._device = device
        self._hooks: list[Any] = []

    def add(self, module: nn.Module) -> None:
        """Move a module to host memory; its next call moves it to the device, where it stays until `release`."""
        _, hook = cpu_offload_with_hook(module, self._device)
        self._hooks.append(hook)

    def release(self) -> None:
        """Move all modules to host memory. Results of earlier calls must not need a backward pass any more."""
        for hook in self._hooks:
            hook.offload()
