"""Resolution of a CLIP model's source, a local folder or a hub id. This module does not import torch."""

from pathlib import Path


def clip_unusable(source: str) -> str | None:
    """Return the reason why no CLIP can be loaded from `source` here, or None. Cheap.

    Args:
        source: folder written by `save_pretrained`, or a hub id `owner/name`.
    """
    folder = local_folder(source)
    if folder is not None:
        if (folder / "config.json").is_file():
            return None
        found = "a folder without config.json" if folder.is_dir() else "nothing"
        return (
            f"expected a folder with a transformers CLIP at `{source}`, found {found}. Give a folder written by "
            "`save_pretrained`, or a hub id (`owner/name`)"
        )
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE and not is_downloaded(source):
        return (
            f"`{source}` is not in the hub's cache on this machine, and HF_HUB_OFFLINE is set. Run `hf download "
            f"{source}` on a machine with network access, or give the path of a folder with the model"
        )
    return None


def local_folder(source: str) -> Path | None:
    """Return the folder of `source`, or None for a hub id."""
    folder = Path(source).expanduser()
    local = source.startswith((".", "/", "~")) or source.count("/") != 1 or folder.exists()
    return folder if local else None


def is_downloaded(source: str) -> bool:
    """Return whether the hub's cache on this machine holds the model's configuration."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(source, "config.json"), str)
    except HFValidationError:
        return False
