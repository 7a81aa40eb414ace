"""Locate and load models: embedded toys, pipeline folders and hub ids."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import nn

from acpo_dist.core.errors import ModelError
from acpo_dist.core.json_text import read_object
from acpo_dist.models.tensor_files import weight_shards

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Many workers load at the same time, and their progress bars would overlap.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt")
"""Endings of single-file checkpoints."""
_EMBEDDED = Path(__file__).resolve().parents[1] / "data" / "toy" / "assets"


def resolve_path(path: str) -> str:
    """Resolve a model path.

    Args:
        path: embedded toy (`toy-...`), pipeline folder, single-file checkpoint, or hub id.

    Returns:
        Folder of the toy, expanded folder or file, or the unchanged hub id.

    Raises:
        ModelError: an unknown toy, or a local path that is neither a pipeline folder nor a checkpoint file.
    """
    if path.startswith("toy-"):
        folder = _EMBEDDED / path
        if not folder.is_dir():
            known = ", ".join(embedded_models()) or "none"
            raise ModelError(f"model.path: no embedded model `{path}`; embedded: {known}. `acpo toy build` makes them.")
        return str(folder)
    folder = Path(path).expanduser()
    if folder.suffix in CHECKPOINT_SUFFIXES and folder.is_file():
        return str(folder)
    if looks_local(path) and not (folder / "model_index.json").is_file():
        found = "a folder without model_index.json" if folder.is_dir() else "a file" if folder.is_file() else "nothing"
        raise ModelError(
            f"model.path: expected a diffusers pipeline folder or a checkpoint ({', '.join(CHECKPOINT_SUFFIXES)}) at "
            f"`{path}`, found {found}. Give a folder written by `save_pretrained`, a checkpoint file, a hub id "
            f"(`owner/name`), or an embedded toy ({', '.join(embedded_models())})."
        )
    return str(folder) if looks_local(path) else path


def embedded_models() -> list[str]:
    """Names of the embedded toys."""
    return sorted(entry.name for entry in _EMBEDDED.glob("toy-*"))


def looks_local(path: str) -> bool:
    """Whether a name is a local folder instead of a hub id (`owner/name`)."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).exists()


def cached_snapshot(path: str, file: str, revision: str | None) -> str:
    """Return the folder of a hub id in the local cache if a file of it is there, or the path as it is.

    transformers does not find the tokenizer of a subfolder in the cache by a hub id without network access.

    Args:
        path: result of `resolve_path`.
        file: name of the file, such as `tokenizer/tokenizer_config.json`.
        revision: branch, tag or commit of a hub id.
    """
    if Path(path).exists():
        return path
    found = try_to_load_from_cache(path, file, revision=revision)
    return str(Path(found).parents[file.count("/")]) if isinstance(found, str) else path


def pipeline_folder(
    pipeline: Any, path: str, *, revision: str | None, variant: str | None, offline: bool, without: Sequence[str] = ()
) -> str:
    """Return the folder of a resolved path; the files of a hub id are downloaded unless `offline` is set.

    Args:
        pipeline: pipeline class of diffusers, which determines the files.
        path: result of `resolve_path`.
        revision: branch, tag or commit of a hub id.
        variant: file variant, such as fp16.
        offline: use the local cache only.
        without: components that are not needed.

    Returns:
        The path if it is a folder, or the snapshot in the hub's cache.

    Raises:
        ModelError: the model is not available, or files are missing.
    """
    if not Path(path).is_dir():
        # diffusers does not download components that are passed as arguments, even as None.
        options: dict[str, Any] = dict.fromkeys(without)
        options |= {"revision": revision, "variant": variant, "local_files_only": offline, "use_safetensors": True}
        path = str(load_part(pipeline.download, path, None, **options))
    require_whole(path, variant=variant, without=without)
    return path


def require_whole(folder: str, *, variant: str | None, without: Sequence[str] = ()) -> None:
    """Check that every component of `model_index.json` has its configuration and weight files.

    Args:
        folder: pipeline folder.
        variant: file variant, such as fp16.
        without: components that are not needed.

    Raises:
        ModelError: files are missing; the message lists them and mentions unfinished downloads.
    """
    root = Path(folder)
    index = read_object(root / "model_index.json")
    missing: list[str] = []
    for part, kind in index.items():
        if part in without or not (isinstance(kind, list) and len(kind) == 2 and kind[1] and isinstance(kind[1], str)):
            continue
        needed, weights = _needed_files(kind[1])
        if kind[1].startswith("CLIPTokenizer"):
            missing += [f"{part}/{name}" for name in _missing_words(root / part)]
        missing += [f"{part}/{name}" for name in needed if not (root / part / name).is_file()]
        if weights:
            missing += [f"{part}/{name}" for name in _missing_weights(root / part, weights, variant)]
    if missing:
        unfinished = " It contains unfinished downloads." if any(root.rglob("*.incomplete")) else ""
        raise ModelError(
            f"model.path: `{folder}` is incomplete: {', '.join(missing[:5])} missing.{unfinished} Download it again "
            f"(`hf download OWNER/NAME --local-dir {folder}`), or set model.variant to an existing one (found "
            f"{_variants(root) or 'no weights'})."
        )


def _needed_files(kind: str) -> tuple[tuple[str, ...], str | None]:
    if kind.endswith("Scheduler"):
        return ("scheduler_config.json",), None
    if "Tokenizer" in kind:
        return ("tokenizer_config.json",), None
    if "Processor" in kind or "Extractor" in kind:
        return (), None
    return ("config.json",), "model" if kind.startswith(("CLIP", "T5", "Qwen")) else "diffusion_pytorch_model"


def _missing_words(folder: Path) -> list[str]:
    """Missing vocabulary files. A CLIP tokenizer loads without them and then encodes every prompt identically."""
    if (folder / "tokenizer.json").is_file():
        return []
    return [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]


def _missing_weights(folder: Path, stem: str, variant: str | None) -> list[str]:
    marked = f".{variant}" if variant else ""
    name, index = f"{stem}{marked}.safetensors", folder / f"{stem}.safetensors.index{marked}.json"
    if (folder / name).is_file() or any(folder.glob(f"*{marked}.bin")):
        return []
    if index.is_file():
        return [shard for shard in weight_shards(index) if not (folder / shard).is_file()]
    return [name]


def _variants(root: Path) -> str:
    names = {path.name for path in root.rglob("*.safetensors")}
    kinds = {name.split(".")[1] if name.count(".") > 1 else "files without a variant" for name in names}
    return ", ".join(sorted(kinds))


def load_part(
    loader: Callable[..., Any], path: str, part: str | None, *, key: str = "model.path", **options: Any
) -> Any:
    """Load one component of a pipeline and convert library errors to `ModelError` with a remedy.

    The result is typed as `Any`, because diffusers declares unions that do not occur and hides methods of its models.

    Args:
        loader: function that loads the component, such as `from_pretrained`.
        path: pipeline folder or hub id.
        part: subfolder of the component; None for the pipeline itself.
        key: configuration key of the path, for messages.
        options: arguments of `loader`.

    Raises:
        ModelError: the component is missing, cannot be read, or cannot be downloaded.
    """
    if part is not None:
        options["subfolder"] = part
    try:
        return loader(path, **options)
    # The last three: a configuration that is valid JSON, but of another form.
    except (
        OSError, ValueError, KeyError, RuntimeError, SafetensorError, TypeError, AttributeError, RecursionError
    ) as error:  # fmt: skip
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{key}: `{part or 'model'}` of `{path}` cannot be loaded: {reason.rstrip('.')}. {_advice(error, path)}"
        ) from error


def _advice(error: BaseException, path: str) -> str:
    """Remedy for an error, determined by the underlying error of the hub client."""
    if Path(path).exists():
        return "Check that the download is complete, and that the folder holds this kind of model."
    causes = list(_chain(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"The model is gated: accept its terms at https://huggingface.co/{path}, then `hf auth login` and "
            f"`hf download {path}`."
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return "The revision does not exist: check model.revision."
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            "The hub has no such model, or access is denied: check the name, or run `hf auth login`; then `hf "
            f"download {path}`."
        )
    offline = (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError)
    if os.environ.get("HF_HUB_OFFLINE") or any(isinstance(cause, offline) for cause in causes):
        return (
            "It is not in the local cache, and the hub is disabled or unreachable: download it first (`hf download "
            f"{path}` on a machine with network access), or copy the cache or the folder."
        )
    return f"If it is a hub id, download it first (`hf download {path}`), or check that you have access."


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert a module's floating-point weights in place.

    `to` of a diffusers model prints a warning about modules to keep in float32 even where there are none.
    """
    nn.Module.to(module, dtype)


def held_dtype(name: str, *, method: str, trainable: bool) -> torch.dtype:
    """Data type of a network's weights in memory.

    Full fine-tuning trains in float32 for any `model.dtype`, because bfloat16 weights lose small updates to rounding.

    Args:
        name: value of `model.dtype`.
        method: value of `model.tuning.method`.
        trainable: whether the weights are trained.
    """
    return torch.float32 if trainable and method == "full" else DTYPES[name]
