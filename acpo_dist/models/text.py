"""Prompt embeddings with caches in memory and on disk. Text encoders can be freed between uses."""

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

from acpo_dist.core.allocator import return_freed_memory
from acpo_dist.models.family import CHUNKS
from acpo_dist.models.loading import load_part

REMEMBERED = 1024
"""Number of prompts whose embeddings stay on the device (0.3 MB each for SDXL in bfloat16)."""
_WHOLE = 64 << 20
"""Size in bytes up to which files are hashed completely; larger files are hashed in blocks."""
_BLOCK, _BLOCKS = 64 << 10, 1024


@dataclass(frozen=True)
class Tokens:
    """One chunk of a prompt, with a batch of one."""

    ids: Tensor
    """(1, length)."""
    mask: Tensor
    """1 for the tokens of the prompt, 0 for padding; (1, length)."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and its CLIP text model."""

    tokenizer: Any
    model: Any

    def chunks(self, prompt: str, *, cut: bool) -> list[Tokens]:
        """Split a prompt into chunks of the tokenizer's length, each with its own begin and end token.

        Args:
            prompt: the prompt; the empty one is one chunk.
            cut: return only the first chunk, as diffusers truncates a prompt.
        """
        length = self.tokenizer.model_max_length
        ids = [] if cut else token_ids(self.tokenizer, prompt)
        room = length - self.tokenizer.num_special_tokens_to_add()
        if len(ids) <= room:
            tokens = self.tokenizer(
                prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            return [Tokens(tokens.input_ids, tokens.attention_mask)]
        begin, end, pad = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        rows = [[begin, *ids[start : start + room], end] for start in range(0, len(ids), room)]
        return [
            Tokens(
                torch.tensor([row + [pad] * (length - len(row))]),
                torch.tensor([[1] * len(row) + [0] * (length - len(row))]),
            )
            for row in rows
        ]

    def __call__(self, tokens: Tokens, *, hidden: bool = False) -> Any:
        """Run the text model on one chunk.

        Args:
            tokens: the chunk.
            hidden: whether the output includes all hidden states.

        Returns:
            Output of the text model with a batch of one.
        """
        device = next(self.model.parameters()).device
        # Some encoders (not the original CLIP) use the attention mask, as stated in their configuration.
        mask = tokens.mask.to(device) if getattr(self.model.config, "use_attention_mask", False) else None
        return self.model(tokens.ids.to(device), attention_mask=mask, output_hidden_states=hidden)


Encoders = Sequence[Encoder]
Embed = Callable[[Encoders, str | None], dict[str, Tensor]]
"""(encoders, prompt) -> tensors with a batch of one; None is the empty chunk that pads shorter prompts."""


def token_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of a prompt without begin and end token, however many."""
    return tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids


def describe_long(counts: Sequence[int], mode: str) -> str | None:
    """Describe the prompts that do not fit into one chunk; None if all fit.

    Args:
        counts: number of chunks of each prompt.
        mode: `model.long_prompts`.
    """
    long = [count for count in counts if count > 1]
    if not long:
        return None
    share = f"{len(long)} of {len(counts)} prompts are longer than the text encoder's limit"
    if mode == "cut":
        return f"{share} and are cut there (model.long_prompts=chunk encodes them whole)"
    return f"{share} and are encoded in up to {max(long)} chunks (model.long_prompts)"


def encode_chunks(
    encoders: Encoders, prompt: str, states: Callable[[Encoder, Any], Tensor], *, cut: bool, hidden: bool
) -> tuple[dict[str, Tensor], Any]:
    """Encode a prompt in chunks, concatenated along the tokens, and the encoders along the features.

    All encoders get the same number of chunks: an encoder with fewer ones is padded with encoded empty chunks.

    Args:
        encoders: the text encoders.
        prompt: the prompt.
        states: (encoder, output of one chunk) -> states (1, length, D).
        cut: encode only the first chunk.
        hidden: whether `states` needs all hidden states.

    Returns:
        (`prompt_embeds` and, for several chunks, `chunks`; output of the last encoder for the first chunk).
    """
    split = [encoder.chunks(prompt, cut=cut) for encoder in encoders]
    count = max(map(len, split))
    parts, first = [], None
    for encoder, chunks in zip(encoders, split, strict=True):
        chunks += encoder.chunks("", cut=True) * (count - len(chunks))
        outputs = [encoder(tokens, hidden=hidden) for tokens in chunks]
        parts.append(torch.cat([states(encoder, output) for output in outputs], 1))
        first = outputs[0]
    found = {"prompt_embeds": torch.cat(parts, -1)}
    return found | ({CHUNKS: torch.tensor([count])} if count > 1 else {}), first


def load_encoders(
    path: str, parts: Sequence[tuple[str, str, Any]], *, dtype: torch.dtype, device: str, revision: str | None,
    variant: str | None, tokenizer: Any,
) -> Encoders:  # fmt: skip
    """Load tokenizers and frozen encoders.

    Args:
        path: pipeline folder.
        parts: (folder of the tokenizer, folder of the encoder, class of the encoder) of each encoder.
        dtype: data type of the encoders.
        device: torch device.
        revision: branch, tag or commit of a hub id.
        variant: file variant, such as fp16.
        tokenizer: class that loads tokenizers.

    Raises:
        ModelError: a component is missing or cannot be read.
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
    """Computes and caches prompt embeddings."""

    def __init__(
        self, load: Callable[[], Encoders], embed: Embed, *, device: str, folder: Path | None, free: bool
    ) -> None:
        """Load the encoders, unless `free` is set.

        Args:
            load: loads the encoders.
            embed: computes the embeddings of one prompt.
            device: torch device of the embeddings.
            folder: cache folder with one file per prompt; None disables the cache on disk.
            free: load the encoders only for prompts that are not cached, and free them afterwards.
        """
        self._load, self._embed, self._device = load, embed, device
        self.folder, self._free = folder, free
        self._encoders: Encoders | None = None if free else load()
        self._known: OrderedDict[str | None, Mapping[str, Tensor]] = OrderedDict()

    @property
    def resident(self) -> bool:
        """Whether the encoders are in memory."""
        return self._encoders is not None

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings of a batch of prompts, by name, concatenated along the first axis."""
        found = self._gather(dict.fromkeys(prompts))
        entries = [found[prompt] for prompt in prompts]
        if any(CHUNKS in entry for entry in entries):
            longest = max(entry["prompt_embeds"].shape[1] for entry in entries)
            entries = [_lengthened(entry, longest) for entry in entries]
        return {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}

    def padding(self) -> Tensor:
        """Return the states of an empty chunk, (1, length, D)."""
        return self._gather({None: None})[None]["prompt_embeds"]

    def fill(self, prompts: Sequence[str], advance: Callable[[int], None] | None = None) -> int:
        """Encode the prompts that are missing in the cache folder.

        Args:
            prompts: the prompts.
            advance: called with 1 after each distinct prompt.

        Returns:
            Number of prompts that were encoded.

        Raises:
            ValueError: there is no cache folder.
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

    def _gather(self, prompts: Mapping[Any, None]) -> dict[Any, Mapping[str, Tensor]]:
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
    def _make(self, prompt: str | None) -> Mapping[str, Tensor]:
        if self._encoders is None:
            self._encoders = self._load()
        made = self._embed(self._encoders, prompt)
        if self.folder is not None:
            _write(self._path(prompt), made, prompt or "")
        return made

    def _release(self) -> None:
        if self._free and self._encoders is not None:
            self._encoders = None
            return_freed_memory()
            if self._device.startswith("cuda"):
                torch.cuda.empty_cache()

    def _read(self, prompt: str | None) -> Mapping[str, Tensor] | None:
        if self.folder is None or not self._path(prompt).is_file():
            return None
        try:
            entry = load_file(self._path(prompt), device=self._device)
            return entry | ({CHUNKS: entry[CHUNKS].cpu()} if CHUNKS in entry else {})
        except (SafetensorError, OSError):
            # Another process may have left an incomplete file: encode the prompt again.
            return None

    def _path(self, prompt: str | None) -> Path:
        assert self.folder is not None
        name = "padding" if prompt is None else hashlib.sha256(prompt.encode()).hexdigest()[:32]
        return self.folder / f"{name}.safetensors"


def _lengthened(entry: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Add zeros after the states of a prompt, which the network masks, and the number of its chunks."""
    states = entry["prompt_embeds"]
    more = states.new_zeros(1, length - states.shape[1], states.shape[2])
    return {**entry, "prompt_embeds": torch.cat([states, more], 1), CHUNKS: entry.get(CHUNKS, torch.ones(1).long())}


def _write(path: Path, tensors: Mapping[str, Tensor], prompt: str) -> None:
    """Write a file atomically, because several processes can write the same prompt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{secrets.token_hex(8)}.partial")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial, metadata={"prompt": prompt})
    os.replace(partial, path)


def fingerprint(folder: str, parts: Sequence[str], **facts: Any) -> str:
    """Name of a cache folder: a hash of the files of the text components and of `facts`.

    File times are not part of the hash, because copying a model can change them.

    Args:
        folder: pipeline folder.
        parts: subfolders of tokenizers and encoders.
        facts: JSON values that affect the embeddings.
    """
    found = []
    for part in parts:
        files = (path for path in sorted(Path(folder, part).glob("*")) if path.is_file())
        found += [(part, path.name, content_digest(path)) for path in files]
    text = json.dumps([found, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content_digest(path: Path) -> str:
    """SHA-256 of a file's size and content; for a large file, of evenly spaced blocks from the first to the last byte.

    Training changes at least one layer, and layers are larger than the gaps between the blocks.
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
