"""The NCP encoder: the down stack of the frozen base U-Net, in full float32 whatever surrounds it."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acpo_dist.core.errors import ModelError
from acpo_dist.models.family import Condition, switched

NcpOutput = Literal["down", "middle", "stages"]


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """No autocast and no TF32 inside.

    On CUDA, convolutions use TF32 unless told otherwise; it rounds their input to 11 bits, far coarser than the
    displacement that NCP measures.
    """
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    with ExitStack() as stack:
        if torch.amp.is_autocast_available(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        # torch 2.9 brought new names for both switches, and refuses a mixture of old and new.
        if hasattr(cudnn, "conv"):
            stack.enter_context(switched([cudnn.conv, cublas], "fp32_precision", "ieee"))
        else:
            stack.enter_context(switched([cudnn, cublas], "allow_tf32", False))
        yield


class NcpEncoder:
    """f(x, t, c) of NCP: a frozen float32 copy of the base model's down stack. Gradients flow to x alone.

    The copy costs the memory of the parts that are used (no up blocks), in float32. The encoder's forward is that of
    diffusers with the rest taken out, so every kind of embedding is the model's own.
    """

    def __init__(self, unet: nn.Module, *, output: NcpOutput = "down", checkpointing: bool = False) -> None:
        """Copy what is needed of the base weights.

        Args:
            unet: the family's network. LoRA adapters are left out of the copy; a network whose own weights train must
                be given before its first step (and before a checkpoint is put into it, or DeepSpeed shards it).
            output: `down` the state after the last down block, `middle` the state after the middle block, `stages`
                every down block's output and the middle block's, apart.
            checkpointing: recompute the blocks in the backward pass: less memory, one more encoder forward.

        Raises:
            ModelError: not a U-Net of diffusers, or no middle block where one is asked for.
        """
        if not isinstance(unet, UNet2DConditionModel | UNet2DModel):
            raise ModelError(f"the NCP encoder needs a U-Net of diffusers, found {type(unet).__name__}")
        if output != "down" and unet.mid_block is None:
            raise ModelError(f"ncp output `{output}` needs a middle block, which this U-Net lacks; take `down`")
        # diffusers' models are typed as unions that never occur.
        source: Any = unet
        skipped = [source.up_blocks] if output != "down" else [source.up_blocks, source.mid_block]
        # deepcopy takes what its memo already holds for a copy: the large unused half is never duplicated.
        memo = {id(part): nn.ModuleList() for part in skipped if part is not None}
        network: Any = copy.deepcopy(source, memo)
        if output == "down":
            network.mid_block = None
        network.conv_norm_out = network.conv_act = network.conv_out = nn.Identity()
        for name, module in list(network.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                setattr(network.get_submodule(parent), child, module.get_base_layer())
        network.requires_grad_(False).float().eval()
        if checkpointing:
            network.enable_gradient_checkpointing(_checkpoint)
        else:
            network.disable_gradient_checkpointing()
        self.network: Any = network
        self._stages: list[Tensor] = []
        if output == "stages":
            for block in network.down_blocks:
                block.register_forward_hook(lambda _module, _inputs, result: self._stages.append(result[0]))

    def features(self, latents: Tensor, timesteps_B: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        """Features of a batch.

        Args:
            latents: x_{t'}, (B, C, H, W), float32; carries the gradient if it is the policy's.
            timesteps_B: t'.
            condition: as the family's `encode` gives it; empty for an unconditional model.

        Returns:
            One tensor (B, C', H', W'), or one per stage, in float32.
        """
        dtype = self.network.dtype
        arguments: dict[str, Any] = {}
        if condition.tensors:
            arguments["encoder_hidden_states"] = condition.tensors["prompt_embeds"].to(dtype)
        if "pooled_prompt_embeds" in condition.tensors:
            arguments["added_cond_kwargs"] = {
                "text_embeds": condition.tensors["pooled_prompt_embeds"].to(dtype),
                "time_ids": condition.tensors["time_ids"],
            }
        self._stages.clear()
        with full_float32(latents.device.type):
            last = self.network(latents.to(dtype), timesteps_B, return_dict=False, **arguments)[0]
        stages, self._stages[:] = (*self._stages, last), []
        return stages


def _checkpoint(module: nn.Module, *arguments: Any) -> Any:
    # The recomputation runs in the backward pass, outside of `features`, and must not fall back to TF32 there.
    def run(*inner: Any) -> Any:
        device = next(value.device.type for value in inner if isinstance(value, Tensor))
        with full_float32(device):
            return module(*inner)

    return checkpoint(run, *arguments, use_reentrant=False)
