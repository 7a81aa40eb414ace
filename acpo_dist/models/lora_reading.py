"""Read LoRA files of other tools: kohya's scripts, A1111, diffusers (old and new) and peft names.

LoRA, DoRA, LoKr and LoHa are read.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acpo_dist.core.errors import ModelError, shorten
from acpo_dist.core.json_text import json_object, read_object
from acpo_dist.models.lycoris import PARTS, kind_of, rank_of, scaled_parts, update_of
from acpo_dist.models.module_names import TEXT_PARTS, original_name, text_name
from acpo_dist.models.tensor_files import Entry, open_tensors

_KINDS = {
    "lora_A": "down", "lora_down": "down", "lora.down": "down", "_lora.down": "down", "lora_linear_layer.down": "down",
    "lora_B": "up", "lora_up": "up", "lora.up": "up", "_lora.up": "up", "lora_linear_layer.up": "up",
    "alpha": "alpha", "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude",
}  # fmt: skip
_PARAMETER = re.compile(
    r"(?:\.|(?=_lora\.))(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|_lora\.down|_lora\.up|"
    rf"lora_linear_layer\.down|lora_linear_layer\.up|alpha|dora_scale|lora_magnitude_vector|{PARTS})"
    r"(\.default)?(\.weight)?$"
)
_OTHERS = {
    "oft_": "OFT", "boft": "BOFT", "glora": "GLoRA", "on_input": "(IA)3",
    "lora_mid": "LoCon with Tucker decomposition", ".diff": "full-difference", "vera_": "VeRA",
}  # fmt: skip
_PREFIXES = {
    "lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder",
    "unet.": "unet", "text_encoder_2.": "text_encoder_2", "text_encoder.": "text_encoder",
    "base_model.model.": "unet", "diffusion_model.": "unet",
}  # fmt: skip

Layers = dict[str, dict[str, Tensor]]
"""Component -> layers by name, as `adapter_layers` returns them; the file's alpha is multiplied into lora_B.

LoKr and LoHa have the names of `lycoris.PARTS` behind the module's.
"""


def lora_file(path: Path, key: str) -> Path:
    """Find the file of a LoRA that is given as a file or as a folder of diffusers or peft.

    Raises:
        ModelError: there is none.
    """
    path = path.expanduser()
    names = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
    found = path if path.is_file() else next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise ModelError(
            f"{key}: expected a LoRA file or a folder with {' or '.join(names)}, found nothing at `{path}`."
        )
    return found


def read_lora(path: Path, modules: Mapping[str, Mapping[str, tuple[int, ...]]], unet: Any, *, key: str) -> Layers:
    """Read a LoRA file for a model.

    Args:
        path: file, or a folder of diffusers or peft.
        modules: component -> module -> shape of its weight, for every module of the model.
        unet: configuration of the U-Net.
        key: configuration key of the path, for messages.

    Raises:
        ModelError: the file cannot be read, holds another kind of adapter, or belongs to another architecture.
    """
    file = lora_file(path, key)
    with open_tensors(file) as (entries, metadata):
        _require_lora(file, entries, key)
        groups: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
        for name, entry in entries.items():
            found = _PARAMETER.search(name)
            if found is None:
                raise ModelError(f"{key}: `{file}` holds the tensor `{name}`, which is not part of a LoRA or DoRA.")
            groups[_split(name[: found.start()])][_KINDS.get(found[1], found[1])] = entry.read().float()
    tables = {part: _table(part, names, unet) for part, names in modules.items()}
    layers: Layers = defaultdict(dict)
    unknown = []
    if any(part not in modules for part, _ in groups):
        raise ModelError(
            f"{key}: `{file}` also adapts text encoders, which are not trained. Merge it into the base instead "
            "(model.loras), or remove these layers."
        )
    for (part, stem), values in groups.items():
        module = tables.get(part, {}).get(_plain(stem))
        if module is None:
            unknown.append(f"{part}.{stem}")
            continue
        shape = modules[part][module]
        _check_shape(file, key, module, values, shape)
        factor = _finite_factor(values, part, metadata, file)
        if kind_of(values):
            parts = {name: value for name, value in values.items() if name not in ("alpha", "magnitude")}
            layers[part] |= {f"{module}.{name}": value for name, value in scaled_parts(parts, factor).items()}
        else:
            pair = {"lora_A": values["down"], "lora_B": values["up"] * factor}
            layers[part] |= {f"{module}.{name}.weight": value for name, value in pair.items()}
        if "magnitude" in values:
            layers[part][f"{module}.lora_magnitude_vector"] = _magnitude(file, key, module, values, shape[0])
    if unknown:
        raise ModelError(
            f"{key}: `{file}` adapts {len(unknown)} modules that the model does not have, such as `{unknown[0]}`: it "
            "belongs to another architecture."
        )
    return dict(layers)


def _require_lora(file: Path, names: Iterable[str], key: str) -> None:
    names = list(names)
    for mark, kind in _OTHERS.items():
        if any(mark in name for name in names):
            raise ModelError(
                f"{key}: `{file}` holds {kind} layers. LoRA, DoRA, LoKr and LoHa are read; merge it with its own tool."
            )
    if not any(_PARAMETER.search(name) for name in names):
        raise ModelError(f"{key}: `{file}` holds no LoRA layers ({len(names)} tensors, such as `{names[0]}`).")


def _split(stem: str) -> tuple[str, str]:
    """(component, rest of the name)."""
    for prefix, part in _PREFIXES.items():
        if stem.startswith(prefix):
            rest = stem.removeprefix(prefix)
            # peft saves `base_model.model.` before the names of a whole pipeline's component too.
            return (
                _split(rest)
                if prefix == "base_model.model." and rest.startswith(("unet.", *TEXT_PARTS))
                else (part, rest)
            )
    return "unet", stem


def _plain(stem: str) -> str:
    """Name for comparison: underscores, without the processors of old diffusers and the `text_model` level."""
    plain = stem.replace(".", "_").replace("_processor_", "_")
    plain = re.sub(r"_to_out$", "_to_out_0", re.sub(r"(to_[qkv]|to_out)_lora$", r"\1", plain))
    return plain.removeprefix("text_model_")


def _table(part: str, modules: Iterable[str], unet: Any) -> dict[str, str]:
    """Plain name, diffusers' or the original code's -> module."""
    table = {}
    for module in modules:
        if part in TEXT_PARTS:
            table[_plain(text_name(module))] = module
            continue
        table[_plain(module)] = module
        try:
            table[_plain(original_name(module, unet))] = module
        except ModelError:
            continue
    return table


def _check_shape(file: Path, key: str, module: str, values: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    kind = kind_of(values) or "LoRA"
    try:
        if kind != "LoRA":
            # Without values: the update is as large as the weight.
            update = update_of({name: value.to("meta") for name, value in values.items()})
            fits, given = (update.shape[0], update.numel()) == (shape[0], math.prod(shape)), str(tuple(update.shape))
        else:
            down, up = values["down"], values["up"]
            fits = (up.shape[0], down[0].numel(), down.shape[0]) == (shape[0], math.prod(shape[1:]), up.shape[1])
            given = f"{tuple(up.shape)} x {tuple(down.shape)}"
    except KeyError as error:
        raise ModelError(
            f"{key}: `{file}` has only a part of the {kind} of `{module}`; is the file complete?"
        ) from error
    except (RuntimeError, IndexError) as error:
        raise ModelError(f"{key}: `{file}` has a {kind} of `{module}` whose matrices do not fit together.") from error
    if not fits:
        raise ModelError(
            f"{key}: `{file}` has a {kind} of shape {given} for `{module}`, whose weight has shape {tuple(shape)}: it "
            "belongs to another architecture."
        )


def _finite_factor(values: Mapping[str, Tensor], part: str, metadata: Mapping[str, str], file: Path) -> float:
    """Scale of a layer, as `_factor`.

    Raises:
        ModelError: alpha or rank is no number, or the scale is not finite.
    """
    try:
        factor = _factor(values, part, metadata, file)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(f"`{file}`: the alpha or rank of `{part}` is no number: {shorten(str(error), 200)}") from error
    if not math.isfinite(factor):
        raise ModelError(f"`{file}`: the scale alpha / rank of `{part}` is {factor}. Save the LoRA again.")
    return factor


def _factor(values: Mapping[str, Tensor], part: str, metadata: Mapping[str, str], file: Path) -> float:
    """Scale of a layer: alpha / rank with the file's alpha, or as its metadata or peft's configuration say."""
    lycoris = kind_of(values) is not None
    rank = rank_of(values) if lycoris else values["down"].shape[0]
    if "alpha" in values:
        return float(values["alpha"]) / rank if rank else 1.0
    said = json_object(metadata.get("lora_adapter_metadata", "{}"), f"lora_adapter_metadata of {file}")
    said = {name.removeprefix(f"{part}."): value for name, value in said.items() if name.startswith(f"{part}.")}
    beside = file.with_name("adapter_config.json")
    if not said and beside.is_file():
        said = read_object(beside)
    if said.get("rank_pattern") or said.get("alpha_pattern"):
        raise ModelError(f"`{file}` has ranks or alphas by pattern, which is not supported; save it in kohya's layout.")
    if lycoris or not rank:
        # peft divides by the rank that was set, also where the matrices are whole.
        return float(said["alpha"]) / float(said["r"]) if {"alpha", "r"} <= said.keys() else 1.0
    alpha = float(said.get("lora_alpha") or rank)
    return alpha / math.sqrt(rank) if said.get("use_rslora") else alpha / rank


def _magnitude(file: Path, key: str, module: str, values: Mapping[str, Tensor], outputs: int) -> Tensor:
    magnitude = values["magnitude"]
    if magnitude.numel() != outputs or (magnitude.ndim == 2 and magnitude.shape[0] == 1 and outputs != 1):
        raise ModelError(
            f"{key}: `{file}` holds DoRA with one norm per input of `{module}`; only norms per output are read."
        )
    return magnitude.flatten()


def module_shapes(weights: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of all linear layers and convolutions of a component."""
    return {
        name.removesuffix(".weight"): entry.shape
        for name, entry in weights.items()
        if name.endswith(".weight") and len(entry.shape) in (2, 4) and "embedding.weight" not in name
    }


def scaled(layers: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Multiply the update of LoRA layers by a factor."""
    return {name: value * factor if ".lora_B." in name else value for name, value in layers.items()}


def ranks_of(layers: Mapping[str, Tensor]) -> dict[str, int]:
    """Rank by module."""
    suffix = ".lora_A.weight"
    return {name.removesuffix(suffix): len(value) for name, value in layers.items() if name.endswith(suffix)}


def load_into(network: torch.nn.Module, layers: Mapping[str, Tensor], adapter: str) -> None:
    """Copy LoRA layers into the adapters of a network."""
    own = dict(network.named_parameters())
    with torch.no_grad():
        for name, value in layers.items():
            module, _, kind = name.removesuffix(".weight").rpartition(".")
            target = own[f"{module}.{kind}.{adapter}.weight"]
            target.copy_(value.reshape(target.shape))
