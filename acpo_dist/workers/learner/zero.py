"""The engine on DeepSpeed ZeRO 0-3. The only file that imports DeepSpeed; rank variables are set before it is used."""

import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F  # noqa: N812
from deepspeed import comm
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from packaging.version import Version
from torch import Tensor, nn
from typing_extensions import override

from acpo_dist.config.schema import LearnerConfig
from acpo_dist.core.errors import UsageError
from acpo_dist.models.family import copy_weights, trainable_tensors
from acpo_dist.workers.learner.engine import (
    MOMENTS,
    Engine,
    StateTensors,
    make_optimiser,
    put_moments,
    set_learning_rate,
)

_SKIPS_SINCE = Version("0.19.8")


def zero_settings(config: LearnerConfig, *, accumulation: int, device: str) -> dict[str, Any]:
    """Return DeepSpeed's settings for a learner section; batch identities are computed only here."""
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": config.global_batch,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.precision == "bfloat16", "check_grad_overflow": True},
        "zero_optimization": {
            "stage": config.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "round_robin_gradients": False,
            "offload_optimizer": {"device": config.offload_optimizer, "pin_memory": device != "cpu"},
        },
        # The optimiser is torch's, so that all engines compute the same update.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _require_skipping(found: str) -> None:
    """Reject a DeepSpeed version that treats a NaN gradient as one of norm 1; a wheel has no lock file."""
    if Version(found) < _SKIPS_SINCE:
        raise UsageError(
            f"DeepSpeed {found} takes optimiser steps whose gradient is not finite; expected {_SKIPS_SINCE} or "
            "newer: pip install 'acpo-dist[zero]'"
        )


class ZeroEngine(Engine):
    """One rank of a DeepSpeed group; the process group comes from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""

    def __init__(self, network: nn.Module, config: LearnerConfig, *, accumulation: int, device: str = "cpu") -> None:
        """Join the group and shard the optimiser of the parameters that require gradients.

        Raises:
            UsageError: this DeepSpeed would take steps that are not finite.
        """
        _require_skipping(deepspeed.__version__)
        self._network, self._config = network, config
        if device == "cpu":
            # Avoid a shared-memory collective that DeepSpeed would compile on first use; gloo works without a compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo" if device == "cpu" else "nccl", verbose=False)
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        parameters = trainable_tensors(network)
        settings = zero_settings(config, accumulation=accumulation, device=device)
        # The class of DeepSpeed's optimiser depends on the settings, so no type describes the engine.
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=network, optimizer=make_optimiser(list(parameters.values()), config), config=settings
        )
        # ZeRO 3 replaces parameters' storage but not the objects, so these names stay valid.
        self._parameters = parameters
        self._sharded = hasattr(self._engine.optimizer, "optimizer")

    @override
    def autocast(self) -> AbstractContextManager[None]:
        # DeepSpeed itself keeps the network in bfloat16; inputs are cast where the family calls it.
        return nullcontext()

    @override
    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        # ZeRO 3 counts micro-batches in its wrapper's forward, which a family's `predict` bypasses; without
        # this the second micro-batch's gradient would replace the first one's instead of being added to it.
        clear = getattr(self._engine.optimizer, "clear_backward_seen_flag", None)
        if clear is not None:
            clear()
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    @override
    def set_learning_rate(self, value: float) -> None:
        # DeepSpeed's wrappers share the parameter groups of the inner optimiser.
        set_learning_rate(self._engine.optimizer, value)

    @override
    def step(self) -> float:
        # DeepSpeed's own optimisers skip a step whose norm is not finite.
        if not self._sharded:
            return self._unsharded_step()
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float(norm or 0.0) if self._engine.was_step_applied() else math.inf

    @override
    def weights(self) -> StateTensors:
        return {name: self._whole(parameter) for name, parameter in self._parameters.items()}

    @override
    def optimiser_state(self) -> StateTensors:
        state: StateTensors = {"step": self._step_count()}
        # Before the first step DeepSpeed has no moments; a checkpoint then holds zeros.
        begun = bool(state["step"] > 0)
        for name, parameter in self._parameters.items():
            for moment in MOMENTS:
                if not begun:
                    state[f"{moment}.{name}"] = torch.zeros(_whole_shape(parameter))
                    continue
                if self._sharded:
                    value = safe_get_full_optimizer_state(parameter, moment)
                else:
                    value = self._engine.optimizer.state[parameter][moment]
                state[f"{moment}.{name}"] = _whole_copy(value, parameter)
        return state

    @override
    def load(self, weights: Mapping[str, Tensor], optimiser_state: Mapping[str, Tensor]) -> None:
        # The network must already hold `weights`; the float32 masters and moments are set here.
        if not self._sharded:
            copy_weights(self._network, weights)
            put_moments(self._engine.optimizer, self._parameters, optimiser_state)
            return
        self._make_flat_moments(optimiser_state["step"])
        for name, parameter in self._parameters.items():
            safe_set_full_fp32_param(parameter, self._padded(weights[name], parameter))
            for moment in MOMENTS:
                value = self._padded(optimiser_state[f"{moment}.{name}"], parameter)
                safe_set_full_optimizer_state(parameter, value, moment)

    @override
    def close(self) -> None:
        self._engine.destroy()
        if comm.is_initialized():
            comm.destroy_process_group()

    def _unsharded_step(self) -> float:
        """Skip non-finite steps for ZeRO 0, which reports no norm and leaves the update to torch's optimiser."""
        # Already averaged over ranks.
        gradients = [value.grad for value in self._parameters.values() if value.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        update = self._engine.optimizer.step
        if not math.isfinite(norm):
            self._engine.optimizer.step = lambda: None
        try:
            self._engine.step()
        finally:
            self._engine.optimizer.step = update
        return norm

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        value = safe_get_full_fp32_param(parameter) if self._sharded else parameter
        return _whole_copy(value, parameter)

    def _step_count(self) -> Tensor:
        inner = self._engine.optimizer.optimizer if self._sharded else self._engine.optimizer
        for entry in inner.state.values():
            if "step" not in entry:
                break
            return torch.as_tensor(entry["step"]).float().cpu().clone()
        return torch.zeros(())

    def _make_flat_moments(self, step: Tensor) -> None:
        """Create the state of the inner optimiser before the first step, so that it can be written."""
        inner = self._engine.optimizer.optimizer
        for group in inner.param_groups:
            for flat in group["params"]:
                inner.state[flat] = {"step": step.clone(), **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
        if self._config.zero_stage == 3:
            # Stage 3 swaps one flat group at a time into the optimiser; all groups need a state.
            for flat in self._engine.optimizer.fp32_partitioned_groups_flat:
                inner.state[flat] = {"step": step.clone(), **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
        else:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _padded(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """Pad a value for ZeRO 3, which cuts it into equal parts; the other stages accept it unchanged."""
        value = value.to(dtype=torch.float32, device=parameter.device)
        if self._config.zero_stage != 3:
            return value
        total = -(-value.numel() // self.world_size) * self.world_size
        return _Padded.wrap(F.pad(value.flatten(), (0, total - value.numel())), value.numel())


class _Padded(Tensor):
    """A padded flat tensor that reports the unpadded size, which is what DeepSpeed checks before it cuts."""

    _size: int

    @staticmethod
    def wrap(padded: Tensor, size: int) -> "_Padded":
        tensor = padded.as_subclass(_Padded)
        tensor._size = size
        return tensor

    def numel(self) -> int:
        return self._size

    def flatten(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.as_subclass(Tensor)


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter, which ZeRO 3 leaves empty, with its shape beside it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _whole_copy(value: Tensor | None, parameter: nn.Parameter) -> Tensor:
    if value is None:
        raise RuntimeError(f"DeepSpeed holds no full tensor for a parameter of shape {tuple(parameter.shape)}")
    return value.detach().float().cpu().clone().contiguous()
