"""Optimiser engines: plain torch in one process here, DeepSpeed over several in `zero.py`."""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from typing_extensions import override

from acpo_dist.config.schema import LearnerConfig
from acpo_dist.models.family import copy_weights, trainable_tensors
from acpo_dist.workers.learner.eight_bit import eight_bit_state, make_eight_bit, put_eight_bit

MOMENTS = ("exp_avg", "exp_avg_sq")
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def _launcher_ignored() -> Iterator[None]:
    """Hide the variables of a launcher that did not start this process group; Accelerate would wait for its ranks."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name in _LAUNCHER or "ACCELERATE_" in name}
    try:
        yield
    finally:
        os.environ.update(hidden)


StateTensors = dict[str, Tensor]


class Engine(Protocol):
    """Optimises the trainable parameters of one network."""

    rank: int
    world_size: int

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context of the forward passes."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss."""
        ...

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the following steps."""
        ...

    def step(self) -> float:
        """Average gradients over micro-batches and ranks, clip them, update the weights and clear the gradients.

        Returns:
            The gradient norm before clipping, the same on every rank. If it is not finite, the step is skipped and
            weights and moments do not change.
        """
        ...

    def weights(self) -> StateTensors:
        """Return the unsharded trainable parameters in float32 on the CPU. Every rank must call it."""
        ...

    def optimiser_state(self) -> StateTensors:
        """Return unsharded `exp_avg.<name>` and `exp_avg_sq.<name>` in float32, and `step`. Every rank must call it."""
        ...

    def load(self, weights: Mapping[str, Tensor], optimiser_state: Mapping[str, Tensor]) -> None:
        """Restore the results of `weights` and `optimiser_state`, written by any number of ranks."""
        ...

    def close(self) -> None:
        """Leave the process group."""
        ...


def make_optimiser(parameters: list[nn.Parameter], config: LearnerConfig) -> torch.optim.AdamW:
    """Return the optimiser of all engines. `foreach` is off for the same order of sums with and without sharding."""
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, foreach=False
    )


def set_learning_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimiser.param_groups:
        group["lr"] = value


class TorchEngine(Engine):
    """Engine on Accelerate: every process holds all weights, and gradients are averaged before each step."""

    def __init__(self, network: nn.Module, config: LearnerConfig, *, accumulation: int, device: str = "cpu") -> None:
        """Optimise the parameters of `network` that require gradients."""
        self._network, self._parameters = network, trainable_tensors(network)
        narrow = config.optimizer == "adamw_8bit"
        self._optimiser = (make_eight_bit if narrow else make_optimiser)(list(self._parameters.values()), config)
        self._narrow = narrow
        self._accumulation, self._config, self._device = accumulation, config, device
        # Accelerate shares precision and accumulation between all its objects in a process, which may hold several
        # engines: both stay here.
        with _launcher_ignored() if not torch.distributed.is_initialized() else nullcontext():
            self._accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
        self.rank, self.world_size = self._accelerator.process_index, self._accelerator.num_processes

    @override
    def autocast(self) -> AbstractContextManager[Any]:
        if self._config.precision == "float32":
            return nullcontext()
        return torch.autocast(self._device.partition(":")[0], torch.bfloat16)

    @override
    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss / self._accumulation)

    @override
    def set_learning_rate(self, value: float) -> None:
        set_learning_rate(self._optimiser, value)

    @override
    def step(self) -> float:
        self._average_gradients()
        norm = self._accelerator.clip_grad_norm_(self._parameters.values(), self._config.max_grad_norm)
        assert norm is not None, "Accelerate returns the norm"
        if torch.isfinite(norm):
            self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return float(norm)

    def _average_gradients(self) -> None:
        """Average over processes with one collective; a gradient that is not finite on one process is so on all."""
        if self.world_size == 1:
            return
        held = list(self._parameters.values())
        # A parameter may have no gradient on this process alone.
        parts = [torch.zeros_like(value) if value.grad is None else value.grad for value in held]
        whole: Any = self._accelerator.reduce(torch.cat([part.float().flatten() for part in parts]), reduction="mean")
        for value, part in zip(held, whole.split([value.numel() for value in held]), strict=True):
            value.grad = part.view_as(value).to(value.dtype)

    @override
    def weights(self) -> StateTensors:
        return {name: _copied(value) for name, value in self._parameters.items()}

    @override
    def optimiser_state(self) -> StateTensors:
        # 8-bit moments have names and scales of their own.
        if self._narrow:
            return eight_bit_state(self._optimiser, self._parameters)
        state: StateTensors = {"step": torch.zeros(())}
        for name, parameter in self._parameters.items():
            entry = self._optimiser.state.get(parameter, {})
            for moment in MOMENTS:
                value = entry.get(moment, torch.zeros_like(parameter))
                state[f"{moment}.{name}"] = _copied(value)
            state["step"] = torch.as_tensor(entry.get("step", 0.0)).float().cpu().clone()
        return state

    @override
    def load(self, weights: Mapping[str, Tensor], optimiser_state: Mapping[str, Tensor]) -> None:
        copy_weights(self._network, weights)
        (put_eight_bit if self._narrow else put_moments)(self._optimiser, self._parameters, optimiser_state)

    @override
    def close(self) -> None:
        pass


def put_moments(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Write step and moments into an AdamW whose own parameters are these."""
    for name, parameter in parameters.items():
        entry = optimiser.state[parameter]
        entry["step"] = state["step"].clone()
        for moment in MOMENTS:
            entry[moment] = state[f"{moment}.{name}"].to(parameter).clone()


def _copied(value: Tensor) -> Tensor:
    # Files hold contiguous tensors, also under model.speed.channels_last.
    return value.detach().float().cpu().clone(memory_format=torch.contiguous_format)
