"""Prompt embeddings: cached in memory and on disk; text encoders may be freed between uses."""

import hashlib
import json
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from acpo_dist.models.loading import load_part

REMEMBERED = 1024
"""Prompts whose embeddings stay on the device (0.3 MB each for SDXL in bfloat16)."""
_WHOLE = 64 << 20
"""Files up to this size are hashed whole, larger ones in blocks."""
_BLOCK, _BLOCKS = 64 << 10, 1024


@dataclass(frozen=True)
class Encoder:
    """One tokenizer with its CLIP text model."""

    tokenizer: Any
    model: Any

    def __call__(self, prompt: str, *, hidden: bool = False) -> Any:
        """Output of the text model for one prompt, truncated and padded as in diffusers."""
        tokens = self.tokenizer(
            prompt, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        device = next(self.model.parameters()).device
        # A few encoders (not CLIP's own) say in their configuration that they read the mask.
        mask = tokens.attention_mask.to(device) if getattr(self.model.config, "use_attention_mask", False) else None
        return self.model(tokens.input_ids.to(device), attention_mask=mask, output_hidden_states=hidden)


Encoders = Sequence[Encoder]
Embed = Callable[[Encoders, str], dict[str, Tensor]]
"""(encoders, prompt) -> tensors with a batch of one."""


def load_encoders(
    path: str, parts: Sequence[tuple[str, str, Any]], *, dtype: torch.dtype, device: str, revision: str | None,
    variant: str | None, tokenizer: Any,
) -> Encoders:  # fmt: skip
    """Load tokenizers and frozen encoders.

    Args:
        parts: (tokenizer's folder, encoder's folder, encoder's class) of each.
        tokenizer: the class that loads tokenizers.

    Raises:
        ModelError: a part is missing or unreadable.
    """
    loaded = []
    for tokens, name, kind in parts:
        model = load_part(kind.from_pretrained, path, name, dtype=dtype, revision=revision, variant=variant)
        loaded.append(
            Encoder(
                load_part(tokenizer.from_pretrained, path, tokens, revision=revision),
                model.to(device).eval().requires_grad_(False),
            )
        )
    return loaded


class PromptEmbeddings:
    """Embeddings by prompt."""

    def __init__(
        self, load: Callable[[], Encoders], embed: Embed, *, device: str, folder: Path | None, free: bool
    ) -> None:
        """Load the encoders now, unless they are to be freed between uses.

        Args:
            load: loads the encoders.
            embed: runs them on one prompt.
            folder: keeps one file per prompt; None keeps nothing on disk.
            free: load the encoders only for prompts that are not cached, and free them afterwards.
        """
        self._load, self._embed, self._device = load, embed, device
        self.folder, self._free = folder, free
        self._encoders: Encoders | None = None if free else load()
        self._known: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()

    @property
    def resident(self) -> bool:
        """Whether the encoders are in memory."""
        return self._encoders is not None

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of a batch, by name, joined along the first axis."""
        found = self._gather(dict.fromkeys(prompts))
        names = next(iter(found.values()))
        return {name: torch.cat([found[prompt][name] for prompt in prompts]) for name in names}

    def fill(self, prompts: Sequence[str], advance: Callable[[int], None] | None = None) -> int:
        """Write the embeddings of these prompts that the folder lacks.

        Returns:
            Number of prompts that had to be encoded.

        Raises:
            ValueError: there is no folder.
        """
        if self.folder is None:
            raise ValueError("no folder for embeddings")
        made = 0
        for prompt in dict.fromkeys(prompts):
            if self._read(prompt) is None:
                self._make(prompt)
                made += 1
            if advance:
                advance(1)
        self._release()
        return made

    def _gather(self, prompts: Mapping[str, None]) -> dict[str, Mapping[str, Tensor]]:
        found = {}
        for prompt in prompts:
            entry = self._known.get(prompt) or self._read(prompt) or self._make(prompt)
            found[prompt] = self._known[prompt] = entry
            self._known.move_to_end(prompt)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        self._release()
        return found

    @torch.no_grad()
    def _make(self, prompt: str) -> Mapping[str, Tensor]:
        if self._encoders is None:
            self._encoders = self._load()
        made = self._embed(self._encoders, prompt)
        if self.folder is not None:
            _write(self._path(prompt), made, prompt)
        return made

    def _release(self) -> None:
        if self._free and self._encoders is not None:
            self._encoders = None
            if self._device.startswith("cuda"):
                torch.cuda.empty_cache()

    def _read(self, prompt: str) -> Mapping[str, Tensor] | None:
        if self.folder is None or not self._path(prompt).is_file():
            return None
        try:
            return load_file(self._path(prompt), device=self._device)
        except (SafetensorError, OSError):
            # Truncated by another writer: encode again.
            return None

    def _path(self, prompt: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"


def _write(path: Path, tensors: Mapping[str, Tensor], prompt: str) -> None:
    """Write atomically; several processes may write the same prompt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{secrets.token_hex(8)}.partial")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial, metadata={"prompt": prompt})
    os.replace(partial, path)


def fingerprint(folder: str, parts: Sequence[str], **facts: Any) -> str:
    """Name of an embedding folder: a hash of the contents of the text parts' files and of `facts`.

    File times are not used, since a copy of a model may keep them or not.
    """
    found = []
    for part in parts:
        files = (path for path in sorted(Path(folder, part).glob("*")) if path.is_file())
        found += [(part, path.name, _content(path)) for path in files]
    text = json.dumps([found, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _content(path: Path) -> str:
    """SHA-256 of a file's size and bytes; of a large one, of blocks spread evenly from its first byte to its last.

    Training changes at least one layer, which is larger than the gaps between blocks.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for index in range(_BLOCKS):
                file.seek((size - _BLOCK) * index // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
