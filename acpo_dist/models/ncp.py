"""The NCP encoder: the down blocks of the frozen base U-Net, always in float32 without autocast or TF32."""

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
    """Context that disables autocast and TF32.

    On CUDA, convolutions use TF32 by default. It rounds their input to 11 bits, which is coarser than the displacement
    that NCP measures.

    Args:
        device_type: `cpu` or `cuda`.
    """
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    with ExitStack() as stack:
        if torch.amp.is_autocast_available(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        # torch 2.9 renamed both settings and raises an error if old and new names are mixed.
        if hasattr(cudnn, "conv"):
            stack.enter_context(switched([cudnn.conv, cublas], "fp32_precision", "ieee"))
        else:
            stack.enter_context(switched([cudnn, cublas], "allow_tf32", False))
        yield


class NcpEncoder:
    """Encoder f(x, t, c) of NCP: a frozen float32 copy of the base model's down blocks. Only x gets a gradient.

    The copy does not include the up blocks. The forward pass is that of the diffusers model without the removed
    modules, so all embeddings are computed as in the model.
    """

    def __init__(self, unet: nn.Module, *, output: NcpOutput = "down", checkpointing: bool = False) -> None:
        """Copy the required blocks of the base model.

        Args:
            unet: the family's network. The copy has no LoRA adapters. With full fine-tuning, create the encoder before
                the first step, before loading a checkpoint, and before DeepSpeed shards the network.
            output: `down` is the output of the last down block, `middle` the output of the middle block, `stages` the
                outputs of every down block and of the middle block.
            checkpointing: recompute the blocks in the backward pass: less memory, one additional forward pass.

        Raises:
            ModelError: not a U-Net of diffusers, or `output` needs a middle block that the U-Net lacks.
        """
        if not isinstance(unet, UNet2DConditionModel | UNet2DModel):
            raise ModelError(
                f"algorithm.space is ncp, whose features are the down blocks of a U-Net, and the model's network is a "
                f"{type(unet).__name__}; transformers have no such blocks. Set algorithm.space=eps."
            )
        if output != "down" and unet.mid_block is None:
            raise ModelError(f"ncp output `{output}` needs a middle block, which this U-Net lacks; take `down`")
        # diffusers types its models as unions that do not occur.
        source: Any = unet
        skipped = [source.up_blocks] if output != "down" else [source.up_blocks, source.mid_block]
        # deepcopy uses the entries of `memo` as copies, so the large unused blocks are not duplicated.
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
        """Compute the features of a batch.

        Args:
            latents: x_{t'}, shape (B, C, H, W), float32; gradients flow to it if it requires them.
            timesteps_B: t' per sample.
            condition: result of the family's `encode`; empty for an unconditional model.

        Returns:
            One tensor of shape (B, C', H', W'), or one per stage, in float32.
        """
        dtype = self.network.dtype
        arguments: dict[str, Any] = {}
        if condition.tensors:
            arguments["encoder_hidden_states"] = condition.tensors["prompt_embeds"].to(dtype)
            arguments["encoder_attention_mask"] = condition.mask(latents.device)
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
    # The recomputation runs in the backward pass, outside of `features`, and must disable TF32 again.
    def run(*inner: Any) -> Any:
        device = next(value.device.type for value in inner if isinstance(value, Tensor))
        with full_float32(device):
            return module(*inner)

    return checkpoint(run, *arguments, use_reentrant=False)
