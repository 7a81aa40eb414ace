"""Checks of a pipeline folder and its U-Net before a latent model is built from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acpo_dist.core.errors import ModelError
from acpo_dist.core.json_text import read_object
from acpo_dist.core.sizes import Size
from acpo_dist.models.loading import require_whole


def check_folder(path: str, config: Any, *, pipeline: str, unused: Sequence[str]) -> None:
    """Check that a folder holds all files of the pipeline class that the model type needs.

    Args:
        path: pipeline folder.
        config: the `model` section.
        pipeline: class name of the pipeline.
        unused: components that may be missing.

    Raises:
        ModelError: another pipeline, or a missing file.
    """
    found = str(read_object(Path(path) / "model_index.json").get("_class_name"))
    # Image-to-image pipelines have the same components.
    if found not in (pipeline, pipeline.replace("Pipeline", "Img2ImgPipeline")):
        raise ModelError(f"model.path: `{path}` holds a {found}, and model.type `{config.type}` needs a {pipeline}.")
    require_whole(path, variant=config.variant, without=unused)


def check_unet(unet: Any, path: str) -> None:
    """Check that a U-Net takes text-to-image latents and no guidance scale.

    Raises:
        ModelError: it has other inputs.
    """
    if unet.config["in_channels"] != 4:
        raise ModelError(
            f"model.path: the U-Net of `{path}` takes {unet.config['in_channels']} channels, expected 4, those of "
            "text-to-image latents: inpainting and image-editing models cannot be tuned here."
        )
    if unet.config.get("time_cond_proj_dim") is not None:
        raise ModelError(
            f"model.path: the U-Net of `{path}` takes the guidance scale as an input (a distilled model), which no "
            "sampler here provides. Tune the model that it was distilled from."
        )


def own_size(unet: Any, *, factor: int, path: str) -> Size:
    """Return the default width and height in pixels of a model whose VAE reduces by `factor`.

    Raises:
        ModelError: the U-Net's `sample_size` is neither one number nor two.
    """
    size = unet.config["sample_size"]
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2:
        raise ModelError(
            f"model.path: the U-Net of `{path}` has sample_size {size}, expected one or two numbers. Set "
            "model.image_size to the width and height of the images in pixels."
        )
    return int(sides[1]) * factor, int(sides[0]) * factor
