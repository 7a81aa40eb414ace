"""AdamW with moments of 8 bits per element (bitsandbytes): blocks of 256 share a float32 scale."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from acpo_dist.config.schema import LearnerConfig
from acpo_dist.core.errors import CheckpointError, ConfigError
from acpo_dist.core.packages import import_bitsandbytes

_KEPT = ("state1", "state2", "absmax1", "absmax2")
"""Keys of an entry besides its step and the code book, which is always the same. Small tensors have no scales."""


def make_eight_bit(parameters: list[nn.Parameter], config: LearnerConfig) -> torch.optim.Optimizer:
    """Return the optimiser; tensors of fewer than 4096 elements keep float32 moments.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    try:
        AdamW8bit = import_bitsandbytes().optim.AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "learner.optimizer is adamw_8bit, which needs bitsandbytes: `pip install bitsandbytes`, or set "
            "learner.optimizer=adamw."
        ) from error
    return AdamW8bit(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)


def eight_bit_state(optimiser: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the state as `<key>.<name>` on the CPU, and `step`; complete even before the first step."""
    state = {"step": torch.zeros(())}
    for name, parameter in parameters.items():
        entry = _entry(optimiser, parameter)
        state["step"] = torch.tensor(float(entry["step"]))
        state |= {f"{key}.{name}": entry[key].detach().cpu().clone() for key in _KEPT if key in entry}
    return state


def put_eight_bit(optimiser: Any, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Restore the result of `eight_bit_state` exactly.

    Raises:
        CheckpointError: the checkpoint was written by another optimiser.
    """
    for name, parameter in parameters.items():
        entry = _entry(optimiser, parameter)
        keys = [key for key in _KEPT if key in entry]
        if any(f"{key}.{name}" not in state for key in keys):
            raise CheckpointError(
                f"the checkpoint holds no 8-bit moments of `{name}`: it was written with learner.optimizer=adamw. "
                "Resume with this setting, or start a new run."
            )
        for key in keys:
            entry[key].copy_(state[f"{key}.{name}"])
        entry["step"] = int(state["step"])


def _entry(optimiser: Any, parameter: nn.Parameter) -> dict[str, Any]:
    if not optimiser.state[parameter]:
        group = optimiser.param_groups[0]
        # Compare by identity, since `==` on tensors compares their elements.
        index = next(index for index, entry in enumerate(group["params"]) if entry is parameter)
        optimiser.init_state(group, parameter, 0, index)
    return optimiser.state[parameter]
