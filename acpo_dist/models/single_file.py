"""Convert single-file checkpoints and LoRAs to pipeline folders, once, in a cache on the local disk.

Names are converted by diffusers' own functions, with configurations and tokenizers that are part of this package, so
nothing is downloaded. Tensors keep their data type and are written one by one.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    Flux2Transformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from acpo_dist.core.errors import ModelError
from acpo_dist.models.architectures import PUBLISHED
from acpo_dist.models.checkpoint_files import UNET, VAE, CheckpointFile, configurations, inspect
from acpo_dist.models.clip_tokenizer import write_clip_tokenizer
from acpo_dist.models.loading import cached_snapshot, resolve_path
from acpo_dist.models.module_names import text_name
from acpo_dist.models.tensor_files import Entry, open_tensors, write_tensors
from acpo_dist.models.text import content_digest

_TITLES = {
    "sdxl": "SDXL", "sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sd3": "Stable Diffusion 3",
    "zimage": "Z-Image", "flux2_klein": "FLUX.2",
}  # fmt: skip
_TRANSFORMERS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "sd3": (convert_sd3_transformer_checkpoint_to_diffusers, SD3Transformer2DModel),
    "zimage": (convert_z_image_transformer_checkpoint_to_diffusers, ZImageTransformer2DModel),
    "flux2_klein": (convert_flux2_transformer_checkpoint_to_diffusers, Flux2Transformer2DModel),
}
"""Conversion of names and class of the network by family."""
_VERSION = 1
"""Changes when a conversion changes, so that older results are not used."""


def cache_root() -> Path:
    """Folder of converted models: `ACPO_CACHE`, or `acpo_dist` in the user's cache folder."""
    given = os.environ.get("ACPO_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(home) / "acpo_dist"


def cached_folder(name: str, facts: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, and build it if it does not exist.

    Processes of one host that need the same folder wait for the one that builds it.

    Args:
        name: readable part of the folder's name.
        facts: JSON values that determine the content.
        build: writes the content into an existing, empty folder.
    """
    digest = hashlib.sha256(json.dumps([_VERSION, facts], sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_root() / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    with _locked(folder):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
            partial.mkdir(parents=True)
            try:
                build(partial)
                os.rename(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def single_file_folder(config: Any) -> Path:
    """Pipeline folder of the single file that `model.path` names.

    Args:
        config: the `model` section.

    Raises:
        ModelError: the file cannot be read, is another kind of model, or does not fit its configuration.
    """
    path = Path(resolve_path(config.path))
    file = inspect(path)
    _require_usable(file, config)
    found = configurations(file, config)
    if file.transformer:
        source = Path(resolve_path(config.config)).resolve()
        facts = {"content": content_digest(path), "configurations": found, "config": str(source)}
        return cached_folder(path.stem, facts, lambda folder: _convert_transformer(file, source, found, folder))
    vae = config.vae if not file.has_vae else None
    facts = {"content": content_digest(path), "configurations": found, "config": config.config, "vae": vae}
    return cached_folder(path.stem, facts, lambda folder: _convert(file, config, found, folder))


def tokenizer_source(config: Any, part: str = "tokenizer") -> str:
    """Return what tokenizers are loaded from: a folder, also that of a cached hub id or a single file, or a hub id.

    transformers reads a file that it is given as JSON, and a checkpoint has several GB.

    Args:
        config: the `model` section.
        part: folder of the tokenizer, which must be in the cache for the folder of a cached hub id.
    """
    path = resolve_path(config.path)
    if Path(path).is_file():
        return str(single_file_folder(config))
    return cached_snapshot(path, f"{part}/tokenizer_config.json", config.revision)


def check_single_file(config: Any) -> None:
    """Check the single file that `model.path` names by its header, without converting it.

    Raises:
        ModelError: see `single_file_folder`.
    """
    file = inspect(Path(resolve_path(config.path)))
    _require_usable(file, config)
    configurations(file, config)


def _require_usable(file: CheckpointFile, config: Any) -> None:
    if file.family != config.type:
        raise ModelError(
            f"model.path: `{file.path}` holds {_TITLES[file.generation]}, and model.type is {config.type}; "
            f"set model.type={file.family}."
        )
    if config.variant is not None:
        raise ModelError(f"model.variant={config.variant} selects files of a folder, and model.path is a single file.")
    if not file.has_vae and config.vae is None and not file.transformer:
        raise ModelError(f"model.path: `{file.path}` holds no VAE; set model.vae to a folder, hub id or file of one.")


def _convert(file: CheckpointFile, config: Any, found: Mapping[str, Any], folder: Path) -> None:
    with open_tensors(file.path) as (entries, _):
        renamed: Any = convert_ldm_unet_checkpoint(_under(entries, UNET), found["unet"])
        _write(folder / "unet", renamed, found["unet"], UNet2DConditionModel, file.path)
        if file.has_vae:
            _write_vae(folder / "vae", _under(entries, VAE), found["vae"], file.path)
        for part, prefix in file.text_prefixes.items():
            kind = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
            weights = {name: entry.read() for name, entry in _under(entries, prefix).items()}
            _write(folder / part, _text(weights, prefix, found[part]["hidden_size"]), found[part], kind, file.path)
    if not file.has_vae:
        from acpo_dist.models.vae import load_vae

        vae = load_vae("", config.vae, dtype="float32", device="cpu", offline=config.offline, family=file.family)
        vae.save_pretrained(folder / "vae", safe_serialization=True)
    for part in file.text_prefixes:
        _tokenizer(
            folder, part.replace("text_encoder", "tokenizer"), prefix_is_open=file.generation == "sd2", config=config
        )
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(found["scheduler"], indent=2) + "\n")
    scheduler = ["diffusers", found["scheduler"]["_class_name"]]
    index = {**found["model_index"], "scheduler": scheduler}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _convert_transformer(file: CheckpointFile, source: Path, found: Mapping[str, Any], folder: Path) -> None:
    """Write transformer and VAE of the file; the other components are links into the pipeline folder `source`."""
    convert, kind = _TRANSFORMERS[file.family]
    written = {"transformer"}
    with open_tensors(file.path) as (entries, _):
        names = _under(entries, UNET) or {name: entry for name, entry in entries.items() if not name.startswith(VAE)}
        # The converters split and join tensors, so they need the values.
        weights = {name.removeprefix(UNET): entry.read() for name, entry in names.items()}
        try:
            renamed = convert(weights)
        except KeyError as error:
            raise ModelError(
                f"model.path: `{file.path}` lacks or does not know the tensor {error} of {_TITLES[file.generation]}."
            ) from error
        named = {name: Entry.of(value.contiguous()) for name, value in renamed.items()}
        _write(folder / "transformer", named, found["transformer"], kind, file.path)
        if file.has_vae:
            _write_vae(folder / "vae", _under(entries, VAE), found["vae"], file.path)
            written.add("vae")
    for part in source.iterdir():
        if part.is_dir() and part.name in found["model_index"] and part.name not in written:
            (folder / part.name).symlink_to(part, target_is_directory=True)
    (folder / "model_index.json").write_text(json.dumps(found["model_index"], indent=2) + "\n", encoding="utf-8")


def _under(entries: Mapping[str, Entry], prefix: str) -> dict[str, Entry]:
    return {name: entry for name, entry in entries.items() if name.startswith(prefix)}


def _text(weights: dict[str, torch.Tensor], prefix: str, width: int) -> dict[str, Entry]:
    if prefix.endswith(".model."):
        model: Any = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
        renamed = convert_open_clip_checkpoint(model, weights, prefix=prefix)
    else:
        renamed = convert_ldm_clip_checkpoint(weights)
    # Older files hold the position numbers 0 to 76 too.
    return {text_name(name): Entry.of(value) for name, value in renamed.items() if not name.endswith("position_ids")}


def _write_vae(folder: Path, entries: Mapping[str, Entry], config: Mapping[str, Any], path: Path) -> None:
    weights: Any = {name: entry.read() for name, entry in entries.items()}
    renamed = convert_ldm_vae_checkpoint(weights, config)
    named = {name: Entry.of(value) for name, value in renamed.items()}
    _write(folder, named, config, AutoencoderKL, path)


def _write(folder: Path, weights: Mapping[str, Entry], config: Mapping[str, Any], kind: Any, path: Path) -> None:
    """Write a component, after a comparison of names and shapes with the network of the configuration."""
    transformer = kind in (CLIPTextModel, CLIPTextModelWithProjection)
    with torch.device("meta"):
        network = kind(CLIPTextConfig(**config)) if transformer else kind.from_config(dict(config))
    state = network.state_dict()
    wanted = {text_name(name) if transformer else name: tuple(value.shape) for name, value in state.items()}
    wanted = {name: shape for name, shape in wanted.items() if not name.endswith("position_ids")}
    given = {name: entry.shape for name, entry in weights.items() if not transformer or name in wanted}
    odd = sorted(set(wanted) ^ set(given)) or [name for name, shape in wanted.items() if given[name] != shape]
    if odd:
        shape = f"{given.get(odd[0], 'nothing')}, expected {wanted.get(odd[0], 'nothing')}"
        raise ModelError(
            f"model.path: `{path}` does not fit the {folder.name} of its configuration: `{odd[0]}` has shape {shape} "
            f"({len(odd)} tensors differ). Set model.config to a pipeline folder with the right architecture."
        )
    folder.mkdir(parents=True)
    name = "model" if transformer else "diffusion_pytorch_model"
    write_tensors(folder / f"{name}.safetensors", {key: weights[key] for key in wanted})
    said = dict(config) | ({"architectures": [kind.__name__], "model_type": "clip_text_model"} if transformer else {})
    said |= {} if transformer else {"_class_name": kind.__name__}
    (folder / "config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tokenizer(folder: Path, part: str, *, prefix_is_open: bool, config: Any) -> None:
    if config.config is not None:
        shutil.copytree(Path(resolve_path(config.config)) / part, folder / part)
    else:
        write_clip_tokenizer(folder / part, **({"pad_token": "!"} if prefix_is_open or part == "tokenizer_2" else {}))


def vae_folder(path: Path, config: Mapping[str, Any] | None, family: str | None) -> Path:
    """Folder of a VAE that is a single file, with the names of the original code or of diffusers.

    Args:
        path: the file.
        config: configuration of the pipeline's own VAE; None takes the published one of `family`.
        family: value of `model.type`.

    Raises:
        ModelError: the file cannot be read or is no VAE.
    """
    used = config or PUBLISHED[family or "sdxl"].vae or {}

    def build(folder: Path) -> None:
        with open_tensors(path) as (entries, _):
            entries = _under(entries, VAE) or entries
            if any(name.startswith("encoder.down_blocks.") for name in entries):
                _write(folder / "vae", entries, used, AutoencoderKL, path)
            elif any(name.removeprefix(VAE).startswith("encoder.down.") for name in entries):
                kept = {
                    n: e for n, e in entries.items() if n.removeprefix(VAE).startswith(("enc", "dec", "quant", "post"))
                }
                _write_vae(folder / "vae", kept, used, path)
            else:
                raise ModelError(f"model.vae: `{path}` holds no VAE of Stable Diffusion.")

    return cached_folder(path.stem, {"content": content_digest(path), "vae": dict(used)}, build) / "vae"
