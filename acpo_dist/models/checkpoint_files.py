"""What a single-file checkpoint (`.safetensors`, `.ckpt`) holds, from the names and shapes of its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acpo_dist.core.errors import ModelError
from acpo_dist.core.json_text import read_object
from acpo_dist.models.architectures import PUBLISHED, SD2
from acpo_dist.models.tensor_files import Entry, open_tensors

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_CLIP_L, _OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_SD1, _SD2 = "cond_stage_model.transformer.", "cond_stage_model.model."
_TRANSFORMERS = {
    "sd3": "joint_blocks.", "zimage": "layers.0.adaLN_modulation.0.weight",
    "flux2_klein": "single_stream_modulation.lin.weight",
}  # fmt: skip
"""Names by which the files of families with a transformer are recognised."""
_LORA = ("lora_", ".lora", "lokr_", "hada_")
_OTHERS = {
    "double_blocks.": "FLUX", "double_stream_blocks.": "HiDream",
    "cap_embedder.": "Lumina", "edm_mean": "Playground 2.5 (EDM)", "edm_vpred.": "an EDM model",
    "control_model.": "a ControlNet", "motion_modules.": "AnimateDiff",
}  # fmt: skip
_CLASSES = {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline"}
_EULER = {
    "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip
_PNDM = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "steps_offset": 1, "skip_prk_steps": True,
    "set_alpha_to_one": False, "clip_sample": False,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """Kind of a single-file checkpoint."""

    path: Path
    generation: str
    """`sd1`, `sd2` or `sdxl`; for a transformer the value of `model.type`."""
    prediction_type: str | None
    """`epsilon` or `v_prediction` as the file states it; None if it does not."""
    zero_snr: bool
    """Whether the file states that its noise schedule has zero terminal SNR."""
    has_vae: bool

    @property
    def family(self) -> str:
        """Value of `model.type`."""
        return "sd15" if self.generation in ("sd1", "sd2") else self.generation

    @property
    def transformer(self) -> bool:
        """Whether the file holds a transformer, to which `model.config` adds what is missing."""
        return self.generation in _TRANSFORMERS

    @property
    def text_prefixes(self) -> dict[str, str]:
        """Component -> prefix of its tensors; a prefix that ends in `model.` holds OpenCLIP's names.

        Those of a transformer, which most files lack, are never read.
        """
        if self.transformer:
            return {}
        if self.generation == "sdxl":
            return {"text_encoder": _CLIP_L, "text_encoder_2": _OPEN_CLIP}
        return {"text_encoder": _SD1 if self.generation == "sd1" else _SD2}


def inspect(path: Path) -> CheckpointFile:
    """Determine the kind of a checkpoint file from its header.

    Raises:
        ModelError: the file cannot be read, or is not a checkpoint of a supported family.
    """
    with open_tensors(path) as (entries, metadata):
        return _kind(path, entries, metadata)


def _kind(path: Path, names: Mapping[str, Entry], metadata: Mapping[str, str]) -> CheckpointFile:
    def holds(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    for family, mark in _TRANSFORMERS.items():
        if any(name.removeprefix(UNET).startswith(mark) for name in names):
            return CheckpointFile(
                path=path, generation=family, prediction_type=None, zero_snr=False, has_vae=holds(VAE)
            )
    what = next((kind for mark, kind in _OTHERS.items() if any(mark in name for name in names)), None)
    if what is not None:
        raise ModelError(
            f"model.path: `{path}` holds {what}. A single file is read for Stable Diffusion 1.x, 2.x, SDXL and 3, "
            "Z-Image and FLUX.2-klein only."
        )
    if not holds(UNET):
        raise ModelError(f"model.path: `{path}` {_other_file(names)}")
    shape = names[f"{UNET}input_blocks.0.0.weight"].shape if f"{UNET}input_blocks.0.0.weight" in names else (0, 0)
    if shape[1] != 4:
        raise ModelError(
            f"model.path: the U-Net of `{path}` takes {shape[1]} channels, expected 4: inpainting and image-editing "
            "models cannot be tuned here."
        )
    if holds(_OPEN_CLIP) and holds(_CLIP_L):
        generation = "sdxl"
    elif holds("conditioner.embedders.0.model."):
        raise ModelError(f"model.path: `{path}` is SDXL's refiner; tune the base model.")
    elif holds(_SD1) or holds(_SD2):
        generation = "sd1" if holds(_SD1) else "sd2"
    else:
        raise ModelError(
            f"model.path: `{path}` holds a U-Net without text encoders. Take the whole checkpoint or a folder."
        )
    said = (metadata.get("modelspec.prediction_type") or "").lower()
    velocity = "v_pred" in names or said in ("v", "v_prediction", "v-prediction")
    velocity = velocity or metadata.get("modelspec.architecture", "").partition("/")[0].endswith("-768-v")
    stated = "v_prediction" if velocity else "epsilon" if said in ("epsilon", "eps") else None
    zero_snr = "ztsnr" in names or metadata.get("ss_zero_terminal_snr") == "True"
    return CheckpointFile(
        path=path, generation=generation, prediction_type=stated, zero_snr=zero_snr, has_vae=holds(VAE)
    )


def _other_file(names: Mapping[str, Entry]) -> str:
    if any(mark in name for name in names for mark in _LORA):
        return "is a LoRA and no model: name the base model there, and the LoRA in model.loras or model.tuning.init."
    if any(name.startswith(("encoder.", "decoder.")) for name in names):
        return "is a VAE: name it in model.vae."
    return (
        "is no checkpoint of Stable Diffusion (no tensor begins with `model.diffusion_model.`). A component of a "
        "diffusers pipeline is opened by its folder."
    )


def configurations(file: CheckpointFile, config: Any) -> dict[str, dict[str, Any]]:
    """Configuration files of a checkpoint: component -> content, with `scheduler` and `model_index`.

    Args:
        file: the checkpoint.
        config: the `model` section.

    Raises:
        ModelError: the prediction type is unknown, or `model.config` is no pipeline folder.
    """
    if file.transformer:
        return _of_transformer(file, config)
    if config.config is not None:
        found = _given(config)
    else:
        base = SD2 if file.generation == "sd2" else PUBLISHED[file.family]
        found = {"unet": dict(base.unet), "vae": dict(base.vae or {}), "scheduler": dict(_PNDM)}
        found |= {part: dict(text) for part, text in zip(file.text_prefixes, base.text_encoders, strict=True)}
        if file.generation == "sdxl":
            found["scheduler"] = dict(_EULER)
    prediction = config.prediction_type or file.prediction_type
    if prediction is None and file.generation == "sd2" and config.config is None:
        raise ModelError(
            f"model.path: `{file.path}` is Stable Diffusion 2.x and does not state what it predicts. Set "
            "model.prediction_type=v_prediction (768 px models) or epsilon (512 px models)."
        )
    scheduler = found["scheduler"]
    if prediction is not None:
        scheduler["prediction_type"] = prediction
    if file.zero_snr:
        # PNDM has no such key, and "leading" spacing never reaches the last timestep.
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if scheduler["_class_name"] == "PNDMScheduler":
            scheduler["_class_name"] = "DDIMScheduler"
            scheduler.pop("skip_prk_steps", None)
    if file.generation == "sd2" and config.config is None and scheduler["prediction_type"] == "v_prediction":
        found["unet"]["sample_size"], found["vae"]["sample_size"] = 96, 768
    return found | {"model_index": _index(file)}


def _of_transformer(file: CheckpointFile, config: Any) -> dict[str, dict[str, Any]]:
    if config.config is None:
        raise ModelError(
            f"model.path: `{file.path}` holds a transformer without text encoders that could be read. Set model.config "
            f"to a pipeline folder of the type {file.family} that has them."
        )
    if config.prediction_type is not None:
        raise ModelError(
            f"model.prediction_type={config.prediction_type}: `{file.path}` holds a flow model, which predicts a "
            "velocity. Remove the key."
        )
    found = _given(config)
    if "transformer" not in found:
        raise ModelError(f"model.config: `{config.config}` has no transformer; `{file.path}` is of type {file.family}.")
    return found


def _given(config: Any) -> dict[str, dict[str, Any]]:
    from acpo_dist.models.loading import resolve_path

    folder = Path(resolve_path(config.config))
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"model.config: expected a pipeline folder or an embedded toy, found `{config.config}`.")
    found = {file.parent.name: read_object(file) for file in sorted(folder.glob("*/config.json"))}
    files = {"scheduler": "scheduler/scheduler_config.json", "model_index": "model_index.json"}
    return found | {name: read_object(folder / file) for name, file in files.items()}


def _index(file: CheckpointFile) -> dict[str, Any]:
    sdxl = file.generation == "sdxl"
    index: dict[str, Any] = {
        "_class_name": _CLASSES[file.family],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if sdxl:
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,
        }
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return index
