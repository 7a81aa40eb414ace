"""A frozen transformers CLIP for metrics: unit vectors of images with their exact gradient, and of texts, cached.

Preprocessing (resize, crop, normalise) uses torch only, so the gradient reaches the pixels and no image is converted to
8 bits or PIL. Shapes: B images of H x W pixels, N views of S x S pixels (S the model's own size), D embedding width.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import SafetensorError
from torch import Tensor

from acpo_dist.core.errors import RewardConfigError
from acpo_dist.core.json_text import read_object
from acpo_dist.rewards.clip_source import clip_unusable, is_downloaded, local_folder

# Values of OpenAI's models; a checkpoint's own preprocessor_config.json has priority.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
CACHED_TEXTS = 8192
"""Number of cached text vectors; the least recently used are dropped."""
_TEXT_CHUNK = 64
_PROBE_TIMEOUT_S = 10.0
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError)


class ClipBackbone:
    """Weights are float32, frozen, in eval mode."""

    def __init__(self, source: str, *, name: str, texts: bool, tokenizer: str | None = None, device: str = "cpu"):
        """Load the model.

        Args:
            source: folder or hub id.
            name: name of the metric, for messages.
            texts: whether a tokenizer is needed.
            tokenizer: folder or hub id of the tokenizer if it is not in `source`.

        Raises:
            RewardConfigError: the model or tokenizer is missing, cannot be reached, or is no complete CLIP.
        """
        self._name = name
        self._device = device
        for wanted in [source, tokenizer] if tokenizer else [source]:
            if reason := clip_unusable(wanted):
                raise RewardConfigError(f"`{name}`: {reason}.")
        folder = _fetch(source, name, weights=True)
        self._model = _load_model(folder, source, name).to(device)
        self._tokenizer = None
        if texts:
            words = _fetch(tokenizer, name, weights=False) if tokenizer else folder
            self._tokenizer = _load_tokenizer(words, tokenizer or source, self._model.config, name)
        preparation = _preparation(folder)
        self.image_size: int = int(self._model.config.vision_config.image_size)
        """S: side of the model's input in pixels."""
        self.width: int = int(self._model.config.projection_dim)
        """D: embedding width."""
        self.scale = float(self._model.logit_scale.detach().exp())
        """e to the power of the learned logit scale."""
        self._mean, self._std = (
            torch.tensor(preparation.get(key) or default, device=device)[:, None, None]
            for key, default in (("image_mean", OPENAI_MEAN), ("image_std", OPENAI_STD))
        )
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def model(self) -> Any:
        """The transformers model, for training."""
        return self._model

    def save(self, folder: Path) -> None:
        """Write model, tokenizer and preprocessing to a folder that this class can open."""
        self._model.save_pretrained(folder)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)
        settings = {"image_mean": self._mean.flatten().tolist(), "image_std": self._std.flatten().tolist()}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))

    def single_view(self, images: Tensor) -> Tensor:
        """CLIP's preprocessing, (B, 3, H, W) -> (B, 3, S, S): bicubic resize of the shorter side to S, centre crop."""
        height, width = images.shape[2:]
        size = self.image_size
        short = min(height, width)
        scaled = resize(images, (size * height // short, size * width // short), "bicubic")
        top, left = (scaled.shape[2] - size) // 2, (scaled.shape[3] - size) // 2
        return scaled[..., top : top + size, left : left + size]

    def image_vectors(self, views: Tensor) -> Tensor:
        """Return unit vectors of views in [0, 1]: (N, 3, S, S) -> (N, D), with gradient."""
        pixels = (views.float() - self._mean) / self._std
        pooled = self._model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self._model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def text_vectors(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (N, D) of texts, constant and cached; texts are truncated to the model's context."""
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        for start in range(0, len(new), _TEXT_CHUNK):
            chunk = new[start : start + _TEXT_CHUNK]
            self._cache.update(zip(chunk, self.encode_texts(chunk), strict=True))
        for text in texts:
            self._cache.move_to_end(text)
        vectors = torch.stack([self._cache[text] for text in texts])
        while len(self._cache) > CACHED_TEXTS:
            self._cache.popitem(last=False)
        return vectors

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Return unit vectors (N, D) of texts, with the graph if the model is trained; nothing is cached."""
        if self._tokenizer is None:
            raise RewardConfigError(f"`{self._name}` was loaded without a tokenizer, so it cannot read texts")
        # Padded to the full context, so that a vector does not depend on the other texts of the batch.
        tokens = self._tokenizer(
            texts, padding="max_length", truncation=True,
            max_length=int(self._model.config.text_config.max_position_embeddings), return_tensors="pt",
        ).to(self._device)  # fmt: skip
        pooled = self._model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return F.normalize(self._model.text_projection(pooled), dim=-1)


def resize(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize with antialiasing as PIL does, in [0, 1] and differentiable: (B, 3, H, W) -> (B, 3, *size).

    Bicubic weights overshoot at edges; like 8-bit images, the result saturates there.
    """
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size=size, mode=mode, align_corners=False, antialias=True).clamp(0, 1)


def _fetch(source: str, name: str, *, weights: bool) -> Path:
    """Return the folder of `source`, downloaded if necessary and possible.

    A cached model is used without network access: a machine without network must not hang, and many workers must not
    repeat the same requests to the hub.
    """
    folder = local_folder(source)
    if folder is not None:
        return folder
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        if is_downloaded(source):
            cached = Path(hf_hub_download(source, "config.json", local_files_only=True)).parent
            if not weights or any(any(cached.glob(pattern)) for pattern in _WEIGHTS):
                return cached
        # A short request first: it has a deadline and no retries, which the download itself lacks.
        HfApi().model_info(source, timeout=_PROBE_TIMEOUT_S)
        kinds = [["*.safetensors"], ["pytorch_model*.bin"]] if weights else [[]]
        for kind in kinds:
            fetched = Path(snapshot_download(source, allow_patterns=["*.json", "*.txt", *kind], ignore_patterns="*/*"))
            if not weights or any(any(fetched.glob(pattern)) for pattern in kind):
                return fetched
        raise FileNotFoundError("it contains no weights in a format of transformers")
    except Exception as error:  # the exceptions of the hub's http library change between versions
        raise RewardConfigError(
            f"`{name}`: `{source}` is not in the hub's cache and cannot be downloaded: {_first_line(error)} Run `hf "
            f"download {source}` on a machine with network access, or give the path of a folder with the model."
        ) from error


def _load_model(folder: Path, source: str, name: str) -> Any:
    from transformers import CLIPConfig, CLIPModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # Many workers load at once, so their progress bars would overwrite each other.
    try:
        kind = CLIPConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type")
        if kind != "clip":
            raise ValueError(f"its config.json says model_type `{kind}`, expected `clip`.")
        loaded: Any = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        model, report = loaded
        # transformers initialises missing weights at random and only warns.
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(f"its weights lack {len(missing)} tensors, such as `{missing[0]}`.")
    except _LOAD_ERRORS as error:
        raise RewardConfigError(
            f"`{name}`: no CLIP can be loaded from `{source}`: {_first_line(error)} For a hub id, `hf download "
            f"{source}` downloads all of it; for a folder, check that it is complete."
        ) from error
    return model.eval().requires_grad_(False)


def _load_tokenizer(folder: Path, source: str, config: Any, name: str) -> Any:
    from transformers import CLIPTokenizer

    try:
        tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        # Without its files a tokenizer still opens, with special tokens only. The model reads a text's vector at the
        # end token, which old configurations (end token 2) define as the highest one.
        end = int(config.text_config.eos_token_id)
        expected = int(config.text_config.vocab_size) - 1 if end == 2 else end
        if tokenizer.eos_token_id != expected:
            raise ValueError(f"its end token is number {tokenizer.eos_token_id}, the model expects {expected}.")
    except _LOAD_ERRORS as error:
        raise RewardConfigError(
            f"`{name}`: no tokenizer for the model in `{source}`: {_first_line(error)} It needs tokenizer.json, or "
            "vocab.json and merges.txt; set `tokenizer` to a folder or hub id with these files."
        ) from error
    return tokenizer


def _preparation(folder: Path) -> dict[str, Any]:
    """Return the checkpoint's preprocessor_config.json, or OpenAI's values without one."""
    file = folder / "preprocessor_config.json"
    return read_object(file, RewardConfigError) if file.is_file() else {}


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line if line.endswith(".") else f"{line}."
