"""Write a pipeline folder from another one: untouched components are copied, tuned weights are merged one by one.

The result opens with current and with older releases of diffusers and transformers.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acpo_dist.core.errors import ModelError
from acpo_dist.core.json_text import read_object
from acpo_dist.models.lycoris import update_of
from acpo_dist.models.module_names import text_name
from acpo_dist.models.tensor_files import Entry, open_tensors, weight_shards, write_tensors

STEMS = ("diffusion_pytorch_model", "model")
"""File names of weights without ending: diffusers' and transformers'."""
_WEIGHTS = (".safetensors", ".bin", ".msgpack", ".h5", ".index.json", ".ckpt", ".onnx", ".pb")


@contextmanager
def component(folder: Path, variant: str | None) -> Iterator[dict[str, Entry]]:
    """Context with the weights of a component, from one file or from shards.

    Args:
        folder: folder of the component.
        variant: file variant, such as fp16; files without it are taken where it does not exist.

    Raises:
        ModelError: there are no weights, or a file cannot be read.
    """
    with ExitStack() as stack:
        found: dict[str, Entry] = {}
        for file in weight_files(folder, variant):
            found |= stack.enter_context(open_tensors(file))[0]
        yield found


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Weight files of a component.

    Raises:
        ModelError: there are none.
    """
    for marked in dict.fromkeys((f".{variant}" if variant else "", "")):
        for stem in STEMS:
            if (folder / f"{stem}{marked}.safetensors").is_file():
                return [folder / f"{stem}{marked}.safetensors"]
            index = folder / f"{stem}.safetensors.index{marked}.json"
            if index.is_file():
                return [folder / name for name in weight_shards(index)]
        for stem in ("diffusion_pytorch_model", "pytorch_model"):
            if (folder / f"{stem}{marked}.bin").is_file():
                return [folder / f"{stem}{marked}.bin"]
    raise ModelError(f"model.path: `{folder}` has no weights{f' of the variant {variant}' if variant else ''}.")


def write_pipeline(
    source: Path, out: Path, *, dtype: torch.dtype, variant: str | None, tuned: Mapping[str, Mapping[str, Tensor]],
    without: Sequence[str] = (), index: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write a pipeline folder with tuned weights.

    Args:
        source: folder of the base model.
        out: folder to write.
        dtype: data type of all weights; one type, because an encoder in half precision does not fit a float32 U-Net.
        variant: file variant of the base model.
        tuned: component -> layers to merge (`adapter_layers`), or weights that replace the component's.
        without: components that are left out.
        index: entries of `model_index.json` that differ from the base model's.

    Raises:
        ModelError: the base model has no weights, or lacks a module that a layer adapts.
    """
    entries = read_object(source / "model_index.json")
    entries |= {part: [None, None] for part in without if part in entries} | dict(index or {})
    for part, kind in entries.items():
        if isinstance(kind, list) and len(kind) == 2 and kind[1] and (source / part).is_dir():
            copy_component(source / part, out / part, kind[1], dtype=dtype, variant=variant, tuned=tuned.get(part))
    out.mkdir(parents=True, exist_ok=True)
    # Last: a folder without it does not count as a pipeline.
    (out / "model_index.json").write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_component(
    source: Path, out: Path, kind: str, *, dtype: torch.dtype | None, variant: str | None = None,
    tuned: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Copy one component of a pipeline.

    Args:
        source: folder of the component.
        out: folder to write.
        kind: class name in `model_index.json`.
        dtype: data type of the weights; None keeps that of the files.
        variant: file variant of the base model.
        tuned: layers to merge or weights that replace the component's; see `write_pipeline`.
    """
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, out / file.name)
    if "Tokenizer" in kind:
        write_vocabulary(out)
    if not (source / "config.json").is_file():
        return
    if dtype is not None:
        _state_dtype(out / "config.json", str(dtype).removeprefix("torch."))
    with component(source, variant) as weights:
        if tuned:
            weights = merged(weights, tuned) if any(".lora_A." in name for name in tuned) else _of(tuned)
        if kind == "CLIPTextModel":
            weights = {text_name(name): entry for name, entry in weights.items()}
        if dtype is not None:
            weights = {name: entry.cast(dtype) for name, entry in weights.items()}
        diffusers = weight_files(source, variant)[0].name.startswith(STEMS[0])
        write_tensors(out / f"{STEMS[0] if diffusers else STEMS[1]}.safetensors", weights)


def _state_dtype(file: Path, dtype: str) -> None:
    """Write the data type of the weights into the configuration, by which transformers 5 loads them."""
    config = read_object(file)
    if keys := [key for key in ("dtype", "torch_dtype") if key in config]:
        file.write_text(json.dumps(config | dict.fromkeys(keys, dtype), indent=2) + "\n", encoding="utf-8")


def _of(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    return {name: Entry.of(value) for name, value in tensors.items()}


def merged(weights: Mapping[str, Entry], layers: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Entry]:
    """Weights of a component with LoRA layers merged; each is computed in float32 when it is written.

    Args:
        weights: weights by name.
        layers: `<module>.lora_A.weight`, `<module>.lora_B.weight`, and for DoRA `<module>.lora_magnitude_vector`; or
            the parts of LoKr and LoHa.
        scale: strength: 0 keeps the weights, 1 is the LoRA as it was trained.

    Raises:
        ModelError: a module does not exist.
    """
    found = dict(weights)
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in layers.items():
        module, _, part = name.removesuffix(".weight").rpartition(".")
        modules[module][part] = value
    for module, parts in modules.items():
        target = f"{module}.weight"
        if target not in found:
            raise ModelError(f"the base model has no module `{module}`, which the LoRA adapts.")
        found[target] = _merge(found[target], parts, scale)
    return found


def _merge(base: Entry, parts: Mapping[str, Tensor], scale: float) -> Entry:
    def read() -> Tensor:
        pair = [parts[name].flatten(1).float() for name in ("lora_B", "lora_A") if name in parts]
        update = (pair[0] @ pair[1] if pair else update_of(parts)).reshape(base.shape)
        plain, magnitude = base.read().float(), parts.get("lora_magnitude_vector")
        if magnitude is None:
            return plain + scale * update
        weight = plain + update
        norm = weight.flatten(1).norm(dim=1)
        weight = weight * (magnitude.flatten().float() / norm).reshape(-1, *[1] * (weight.ndim - 1))
        return weight if scale == 1 else plain + scale * (weight - plain)

    return Entry(shape=base.shape, dtype=torch.float32, read=read)


def make_portable(folder: Path) -> None:
    """Rewrite text encoders and tokenizers that transformers 5 saved so that transformers 4 reads them too."""
    index = read_object(folder / "model_index.json")
    for part, kind in index.items():
        if not isinstance(kind, list) or not (folder / part).is_dir():
            continue
        if kind[1] == "CLIPTextModel":
            (file,) = weight_files(folder / part, None)
            with open_tensors(file) as (weights, _):
                write_tensors(file, {text_name(name): entry for name, entry in weights.items()})
        elif "Tokenizer" in kind[1]:
            write_vocabulary(folder / part)


def write_vocabulary(folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` of a CLIP tokenizer, which transformers 4 reads, from `tokenizer.json`."""
    whole = folder / "tokenizer.json"
    if (folder / "vocab.json").is_file() or not whole.is_file():
        return
    model = read_object(whole)["model"]
    if "merges" not in model:
        # T5's tokenizer has no merges, and a file of its own.
        return
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
