"""Where a model comes from: an embedded toy, a folder, or a hub id; and errors that say what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import diffusers.utils.logging
import torch
import transformers.utils.logging
from safetensors import SafetensorError

from acpo_dist.core.errors import ModelError

DtypeName = Literal["float32", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Many workers load at once; their bars would only run into each other.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
_EMBEDDED = Path(__file__).resolve().parents[1] / "toy" / "assets"


def resolve_path(path: str) -> str:
    """`toy-...` is the embedded asset; anything else stays as it is.

    Raises:
        ModelError: an unknown toy, or a path-like name that is not a pipeline folder.
    """
    if path.startswith("toy-"):
        folder = _EMBEDDED / path
        if not folder.is_dir():
            known = ", ".join(sorted(entry.name for entry in _EMBEDDED.glob("toy-*"))) or "none"
            raise ModelError(f"model.path: no embedded model `{path}`; embedded: {known}. `acpo toy build` makes them.")
        return str(folder)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).exists()
    folder = Path(path).expanduser()
    if looks_local and not (folder / "model_index.json").is_file():
        found = "a folder without model_index.json" if folder.is_dir() else "nothing"
        raise ModelError(
            f"model.path: expected a diffusers pipeline folder at `{path}`, found {found}. Give a folder written by "
            "`save_pretrained`, a hub id (`owner/name`), or an embedded toy (`toy-sdxl`, `toy-ddpm`)."
        )
    return str(folder) if looks_local else path


def load_part(loader: Callable[..., Any], path: str, part: str | None, **options: Any) -> Any:
    """Load one component of a pipeline, turning the library's errors into one that says what to do.

    The result is untyped: diffusers declares unions that never occur, and hides the methods of its models.

    Raises:
        ModelError: the component is missing, unreadable or cannot be downloaded.
    """
    if part is not None:
        options["subfolder"] = part
    try:
        return loader(path, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model.path: `{part or 'model'}` of `{path}` cannot be loaded: {reason} If it is a hub id, download it "
            f"first (`hf download {path}`) or check that you may read it; if it is a folder, check that the download "
            "is whole."
        ) from error


def held_dtype(name: str, *, method: str, trainable: bool) -> torch.dtype:
    """Type in which a network's weights are held.

    Full fine-tuning trains in float32 whatever `model.dtype` says: bfloat16 weights would swallow small updates.
    """
    return torch.float32 if trainable and method == "full" else DTYPES[name]
