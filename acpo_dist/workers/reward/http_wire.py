"""HTTP bodies of the reward pool: safetensors, lossless, validated when read, no pickle."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from acpo_dist.core.errors import RewardError, shorten
from acpo_dist.workers.reward.wire import WireTensor
from acpo_dist.workers.reward.worker import ScoredGradient

MEDIA_TYPE = "application/vnd.safetensors"
_LONGEST_PROMPT = 4096


class BodyError(RewardError):
    """The content of a body does not match its request."""


def encode_images(images: Tensor, prompts: Sequence[str]) -> bytes:
    """Encode a score request: uint8 images (B, 3, H, W) and one prompt per image."""
    return _encode({"images": images}, prompts)


def decode_images(body: bytes) -> tuple[Tensor, tuple[str, ...]]:
    """Decode a body of `encode_images`.

    Raises:
        BodyError: the content is invalid; names expected and found content.
    """
    tensors, prompts = _decode(body, ("images",))
    images = tensors["images"]
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise BodyError(
            f"`images` must be uint8 RGB of shape (B, 3, H, W), found {_describe(images)}; do not divide by 255"
        )
    _require_prompts(prompts, len(images))
    return images, prompts


def encode_sent(sent: WireTensor, prompts: Sequence[str]) -> bytes:
    """Encode a gradient request at `sent`, with one prompt per sample."""
    return _encode(_wire_tensors(sent), prompts)


def decode_sent(body: bytes) -> tuple[WireTensor, tuple[str, ...]]:
    """Decode a body of `encode_sent`.

    Raises:
        BodyError: the content is invalid; names expected and found content.
    """
    tensors, prompts = _decode(body, ("data", "exponent"))
    sent = _wire(tensors)
    _require_prompts(prompts, len(sent.data))
    return sent, prompts


def encode_answer(answer: ScoredGradient) -> bytes:
    """Encode scores and gradients."""
    scores = torch.tensor(answer.scores, dtype=torch.float64)
    return _encode({"scores": scores, **_wire_tensors(answer.gradient)}, ())


def decode_answer(body: bytes) -> ScoredGradient:
    """Decode a body of `encode_answer`.

    Raises:
        BodyError: the content is invalid.
    """
    tensors, _ = _decode(body, ("scores", "data", "exponent"))
    return ScoredGradient(tensors["scores"].tolist(), _wire(tensors))


def _wire_tensors(sent: WireTensor) -> dict[str, Tensor]:
    return {"data": torch.from_numpy(np.array(sent.data)), "exponent": torch.from_numpy(np.array(sent.exponent))}


def _wire(tensors: Mapping[str, Tensor]) -> WireTensor:
    data, exponent = tensors["data"], tensors["exponent"]
    if data.dtype not in (torch.float16, torch.float32) or data.ndim != 4 or data.numel() == 0:
        raise BodyError(f"`data` must be float16 or float32 of shape (B, C, H, W), found {_describe(data)}")
    if exponent.dtype != torch.int16 or exponent.shape != data.shape[:1]:
        raise BodyError(f"`exponent` must be int16 of shape ({len(data)},), found {_describe(exponent)}")
    if not bool(torch.isfinite(data).all()):
        raise BodyError("`data` is not finite")
    return WireTensor(data.numpy(), exponent.numpy())


def _encode(tensors: Mapping[str, Tensor], prompts: Sequence[str]) -> bytes:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save(whole, metadata={"prompts": json.dumps(list(prompts))})


def _decode(body: bytes, names: tuple[str, ...]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    try:
        tensors = load(body)
        # `load` has validated the header, but does not return its metadata.
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        prompts = json.loads(header.get("__metadata__", {}).get("prompts", "[]"))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BodyError(f"the body is not in the safetensors format: {shorten(str(error))}") from error
    if set(tensors) != set(names):
        found = shorten(", ".join(sorted(tensors))) or "nothing"
        raise BodyError(f"the body must hold the tensors {', '.join(names)}, found {found}")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise BodyError("the metadata `prompts` must be a JSON list of texts")
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest > _LONGEST_PROMPT:
        raise BodyError(f"a prompt has {longest} characters, the maximum is {_LONGEST_PROMPT}")
    return tensors, tuple(prompts)


def _require_prompts(prompts: tuple[str, ...], count: int) -> None:
    if len(prompts) != count:
        raise BodyError(
            f"the metadata `prompts` must hold one text per image ({count}), found {len(prompts)}; use empty texts "
            "for metrics that read none"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
