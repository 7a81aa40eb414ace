"""Pipelines of full size with random weights, for benchmarks and tests without access to trained ones."""

import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTokenizer, Qwen2Tokenizer

from acpo_dist.core.errors import UsageError
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.models.architectures import PUBLISHED
from acpo_dist.models.clip_tokenizer import write_clip_tokenizer
from acpo_dist.models.loading import cast
from acpo_dist.models.sd3 import T5_PARTS
from acpo_dist.models.training.toy_models import sd15_scheduler, sdxl_scheduler

_BLOCK = 1 << 22
_SCHEDULERS: dict[str, Callable[[], Any]] = {
    "sdxl": sdxl_scheduler, "sd15": sd15_scheduler, "sd3": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "zimage": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flux2_klein": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
}  # fmt: skip
_ENTRIES: dict[str, dict[str, Any]] = {
    "sdxl": {"force_zeros_for_empty_prompt": True, "add_watermarker": False},
    "sd15": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    "sd3": dict.fromkeys(T5_PARTS),
}
"""Further arguments of the pipeline class."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
"""Has the two features that the families depend on: the message, and a text that depends on `enable_thinking`."""


def write_random_pipeline(
    folder: Path, family: str, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0
) -> Path:
    """Write a pipeline folder of the family's published size, or keep an existing one.

    In bfloat16: 7 GB for `sdxl`, 2 GB for `sd15`, 6 GB for `sd3`, 20 GB for `zimage`, 16 GB for `flux2_klein`. The
    weights are in memory while they are written. Stable Diffusion 3 has no T5; a tokenizer of bytes stands for Qwen's.

    Args:
        folder: folder to write.
        family: value of `model.type` with a published architecture.
        dtype: type of the weights.
        device: device on which the weights are generated.
        seed: seed of the weights.

    Returns:
        The folder.

    Raises:
        UsageError: the folder holds other files, or the family has no published architecture.
    """
    if family not in PUBLISHED:
        raise UsageError(f"`{family}` has no published architecture; known: {', '.join(PUBLISHED)}.")
    if (folder / "model_index.json").is_file():
        return folder
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(
            f"{folder} exists and holds no pipeline (no model_index.json). Give a folder that does not exist yet."
        )
    # Written beside the final place first, so that an incomplete folder is never mistaken for a complete one.
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        _write(partial, family, dtype, device, seed)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def byte_tokenizer() -> Qwen2Tokenizer:
    """Return a tokenizer of Qwen's class whose tokens are bytes and the marks of its chat template."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocab = {symbol: index for index, symbol in enumerate([*marks, *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=marks[1:])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _write(folder: Path, name: str, dtype: torch.dtype, device: str, seed: int) -> None:
    family, architecture = resolve("model", MODELS, name), PUBLISHED[name]
    block = torch.rand(_BLOCK, generator=torch.Generator().manual_seed(seed)).to(device) - 0.5
    parts: dict[str, Any] = {}
    for part, kind, config in (
        (family.network_part, family.network_class, architecture.unet),
        ("vae", family.vae_class, architecture.vae or {}),
    ):
        parts[part] = _filled(lambda kind=kind, config=config: kind.from_config(dict(config)), dtype, block)
    kinds = [entry for entry in family.text_parts if entry[1] not in _ENTRIES.get(name, {})]
    for (tokens, part, kind), config in zip(kinds, architecture.text_encoders, strict=False):
        keys = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
        parts[part] = _filled(lambda kind=kind, keys=keys: kind(kind.config_class(**keys)), dtype, block)
        parts[tokens] = _tokenizer(folder / tokens, config)
    pipeline = family.pipeline(**parts, scheduler=_SCHEDULERS[name](), **_ENTRIES.get(name, {}))
    pipeline.save_pretrained(folder, safe_serialization=True)


def _tokenizer(folder: Path, config: Any) -> Any:
    if config.get("model_type") == "qwen3":
        return byte_tokenizer()
    write_clip_tokenizer(folder, **({"pad_token": "!"} if folder.name == "tokenizer_2" else {}))
    return CLIPTokenizer.from_pretrained(folder)


def _filled(build: Callable[[], Any], dtype: torch.dtype, block: torch.Tensor) -> Any:
    """Build without weights, then fill them with one repeated random block at the scale of a linear layer."""
    # The random start of so many weights is what takes long. Buffers are computed, such as the table of positions.
    with init_empty_weights(include_buffers=False):
        module = build()
    cast(module, dtype)
    for owner, name, empty in list(_parameters(module)):
        value = torch.empty(empty.shape, dtype=dtype, device=block.device)
        _fill(value, block, norm=name == "weight" and "Norm" in type(owner).__name__)
        setattr(owner, name, nn.Parameter(value, requires_grad=False))
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    return module.eval()


def _fill(value: torch.Tensor, block: torch.Tensor, *, norm: bool) -> None:
    if value.ndim < 2:
        # Norms start as the identity; all other one-dimensional parameters are biases.
        value.fill_(1.0 if norm else 0.0)
        return
    scale = (3 / value[0].numel()) ** 0.5
    flat = value.reshape(-1)
    for start in range(0, flat.numel(), _BLOCK):
        piece = flat[start : start + _BLOCK]
        piece.copy_(2 * scale * block[: piece.numel()])


def _parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for owner in module.modules():
        for name, value in owner.named_parameters(recurse=False):
            yield owner, name, value
