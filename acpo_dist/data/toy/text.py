"""A CLIP tokenizer for the vocabulary of the toy world, with byte-pair merges that build exactly its words."""

import json
from pathlib import Path

from acpo_dist.data.toy.world import BACKGROUNDS, COLOURS, SHAPES

MAX_TOKENS = 12
_WORD_END = "</w>"
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """Return CLIP `vocab` and `merges`: single letters, the prefixes of the toy world's words, and the words."""
    # Longest first: merges apply by rank, and the pairs of a short word must not split a longer word.
    words = sorted(["a", "on", "background", *COLOURS, *SHAPES, *BACKGROUNDS], key=len, reverse=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = dict.fromkeys([*letters, *(letter + _WORD_END for letter in letters)])
    merges: dict[str, None] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + _WORD_END]
        merged = pieces[0]
        for piece in pieces[1:]:
            merges.setdefault(f"{merged} {piece}")
            merged += piece
            tokens.setdefault(merged)
    tokens.update(dict.fromkeys(_SPECIAL))
    return {token: index for index, token in enumerate(tokens)}, list(merges)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer folder that transformers' `CLIPTokenizer.from_pretrained` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    start, end = _SPECIAL
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": start,
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
