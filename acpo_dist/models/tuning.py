"""LoRA and full fine-tuning of a network, and access to its frozen base model (the anchor)."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from acpo_dist.config.schema import SamplerConfig
from acpo_dist.core.allocator import return_freed_memory
from acpo_dist.core.errors import ModelError
from acpo_dist.models.config import TuningConfig
from acpo_dist.models.family import switched
from acpo_dist.models.loading import cast
from acpo_dist.models.lora_reading import load_into, ranks_of, read_lora, scaled
from acpo_dist.models.lycoris import kind_of

ADAPTER = "default"


def lora_factor(config: TuningConfig) -> float:
    """Factor of the product of the two LoRA matrices: alpha / rank, or alpha / sqrt(rank) if rank-stabilised."""
    return (config.alpha or config.rank) / (config.rank**0.5 if config.use_rslora else config.rank)


class TunedNetwork:
    """A network prepared for training, with contexts that run the frozen base model or other weights."""

    def __init__(
        self, network: nn.Module, config: TuningConfig, *, seed: int, keep_anchor: bool,
        anchor_dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        """Prepare `network` in place.

        Args:
            network: the base network.
            config: the `model.tuning` section.
            seed: seed of the adapters' initial values; must be equal on every worker.
            keep_anchor: whether the base model is needed (learner) or not (rollout).
            anchor_dtype: data type of the frozen copy in full fine-tuning.

        Raises:
            ModelError: no module name ends with a name in `config.targets`.
        """
        self.network = network
        self.active: nn.Module = network
        """The network to run: the policy, or the base model within `anchored`."""
        self.method = config.method
        self._copy: nn.Module | None = None
        self._initial: dict[str, Tensor] | None = None
        network.requires_grad_(False)
        if config.method == "full":
            if keep_anchor:
                self._copy = copy.deepcopy(network)
                cast(self._copy, anchor_dtype)
            network.requires_grad_(True)
            return
        initial = _initial_layers(network, config)
        ranks = ranks_of(initial)
        factor = lora_factor(config)
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha or config.rank,  # pyright: ignore[reportArgumentType]
            target_modules=list(ranks or config.targets),
            rank_pattern=ranks,
            # Every module has the same factor, whatever its rank.
            alpha_pattern={name: factor * (r**0.5 if config.use_rslora else r) for name, r in ranks.items()},
            init_lora_weights="gaussian" if config.init_weights == "gaussian" else True,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(lora, network, adapter_name=ADAPTER)
            except ValueError as error:
                raise ModelError(
                    f"model.tuning.targets {list(config.targets)} fit no module of the network: {error}"
                ) from error
        # Adapters are float32 even if the frozen weights are bfloat16, which would lose small updates to rounding.
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        load_into(network, scaled(initial, 1 / factor), ADAPTER)
        if initial and config.anchor == "init" and keep_anchor:
            self._initial = {
                name: value.detach().clone() for name, value in network.named_parameters() if value.requires_grad
            }  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the frozen weights of the active network; adapters can be wider."""
        return next(parameter for parameter in self.active.parameters()).dtype

    @property
    def frozen_copy(self) -> nn.Module | None:
        """The base model's own network in full fine-tuning; None for LoRA."""
        return self._copy

    @contextmanager
    def anchored(self) -> Iterator[None]:
        """Context in which the frozen base model is active: the copy, or the network with disabled or initial adapters.

        Raises:
            RuntimeError: full fine-tuning without a frozen copy (`keep_anchor=False`).
        """
        if self.method == "full":
            if self._copy is None:
                raise RuntimeError("this worker was loaded without an anchor (keep_anchor=False)")
            with switched([self], "active", self._copy):
                yield
            return
        if self._initial is not None:
            with self.substituted(self._initial):
                yield
            return
        # Set the flag directly: peft's method also changes requires_grad, which must not change under an optimiser.
        layers = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]
        with switched(layers, "_disable_adapters", True):
            yield

    @contextmanager
    def substituted(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Context in which the network runs with other values of its trainable weights, without gradients.

        Args:
            weights: values by parameter name, on the network's device.
        """
        with switched([self], "active", _Substituted(self.network, weights)):
            yield

    def merged(self) -> nn.Module:
        """Return the network in float32 with the tuned weights merged, for export.

        float32 keeps small updates that bfloat16 would lose to rounding. float32 parameters of modules without an
        adapter are shared with the trained network instead of copied.
        """
        adapted = {
            id(value)
            for module in self.network.modules() if isinstance(module, BaseTunerLayer)
            for value in module.parameters()
        }  # fmt: skip
        kept = {
            id(value): value
            for value in self.network.parameters() if value.dtype == torch.float32 and id(value) not in adapted
        }  # fmt: skip
        # deepcopy uses the entries of `memo` as copies.
        plain = copy.deepcopy(self.network, memo=kept).float()
        if self.method == "full":
            return plain
        for module in list(plain.modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
        for name, module in list(plain.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                setattr(plain.get_submodule(parent), child, module.get_base_layer())
        if hasattr(plain, "peft_config"):
            del plain.peft_config
        return plain


def shares_base(model: Any, sampler: SamplerConfig) -> bool:
    """Whether rollouts and learner of one process use one copy of the frozen base weights.

    Merged adapters change the rollouts' weights, and `memory.offload` moves each role's weights by itself. Full
    fine-tuning has no frozen weights in the rollouts.

    Args:
        model: the `model` section.
        sampler: the `sampler` section.
    """
    memory, tuning = getattr(model, "memory", None), getattr(model, "tuning", None)
    offloads = memory is not None and memory.offload
    return tuning is not None and tuning.method == "lora" and not sampler.merge_adapters and not offloads


def release_frozen(network: nn.Module) -> None:
    """Free the memory of a network's frozen parameters until `share_frozen` lends it those of another network.

    Two copies of the base model are then never held at once, also while the second network is loaded.
    """
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.new_empty(0)
    return_freed_memory()


def share_frozen(network: nn.Module, other: nn.Module) -> None:
    """Let the released frozen parameters of a network use the memory of another network with the same base model.

    Args:
        network: its frozen parameters were released.
        other: keeps its weights; they must never change.

    Raises:
        ValueError: `other` does not hold all of these parameters in the same type, or trains one of them.
    """
    held = dict(other.named_parameters())
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            continue
        twin = held.get(name)
        if twin is None or twin.requires_grad or (twin.dtype, twin.device) != (parameter.dtype, parameter.device):
            raise ValueError(f"the other network has no frozen {name} of {parameter.dtype} on {parameter.device}")
        parameter.data = twin.data


class MergedAdapters:
    """Adapters added to the weights of a network that is only sampled from, so that each call runs fewer operations.

    The weights without adapters are kept beside, because subtracting adapters again would accumulate rounding errors.
    """

    def __init__(self, network: nn.Module) -> None:
        """Merge the adapters of `network`; a network without adapters is left as it is."""
        self._layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        self._weights = [layer.get_parameter("base_layer.weight") for layer in self._layers]
        self._plain = [weight.detach().clone() for weight in self._weights]
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Merge the present values of the adapters."""
        for layer, weight, plain in zip(self._layers, self._weights, self._plain, strict=True):
            weight.copy_(plain)
            layer.merged_adapters.clear()
            layer.merge()


def _initial_layers(network: nn.Module, config: TuningConfig) -> dict[str, Tensor]:
    """Layers of `model.tuning.init`; empty without it.

    Raises:
        ModelError: the file cannot be read, does not fit the network, or is of another kind than the run trains.
    """
    if config.init is None:
        return {}
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }  # fmt: skip
    layers = read_lora(config.init, {"unet": shapes}, network.config, key="model.tuning.init").get("unet", {})
    if kind := kind_of({name.rpartition(".")[2]: value for name, value in layers.items()}):
        raise ModelError(
            f"model.tuning.init: `{config.init}` holds {kind} layers, which no LoRA equals. Merge them into the base "
            "model instead (model.loras) and train a new LoRA."
        )
    dora = any("lora_magnitude_vector" in name for name in layers)
    if dora != config.use_dora:
        raise ModelError(
            f"model.tuning.init: `{config.init}` holds {'DoRA' if dora else 'LoRA without DoRA'}, and "
            f"model.tuning.use_dora is {str(config.use_dora).lower()}; set it to {str(dora).lower()}."
        )
    return layers


class _Substituted(nn.Module):
    """Runs a network with other values of some of its parameters, without changing the parameters."""

    def __init__(self, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network, self._values = network, dict(weights)

    def forward(self, *args: object, **kwargs: object) -> object:
        return functional_call(self.network, self._values, args, kwargs)
