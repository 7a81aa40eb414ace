"""CLIP's tokenizer as files, for models that come without one."""

import gzip
import json
from pathlib import Path

_MERGES = Path(__file__).resolve().parent / "assets" / "clip_merges.txt.gz"
_START, _END = "<|startoftext|>", "<|endoftext|>"


def write_clip_tokenizer(folder: Path, *, pad_token: str = _END) -> None:
    """Write the folder of a CLIP tokenizer.

    Args:
        folder: folder to write.
        pad_token: token behind the end of a prompt: the end token for CLIP-L, `!` for the OpenCLIP encoders of SDXL and
            Stable Diffusion 2.x.
    """
    merges = gzip.decompress(_MERGES.read_bytes()).decode().splitlines()
    letters = list(_byte_letters().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate([*tokens, _START, _END])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": _START, "eos_token": _END, "pad_token": pad_token, "unk_token": _END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def _byte_letters() -> dict[int, str]:
    """Printable character of each byte, as in byte-level BPE: the byte's own, or one beyond 255."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}
