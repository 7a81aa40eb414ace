"""Open exports with the oldest supported libraries and compare the images: the second half of `make compat`.

It runs with another diffusers, transformers and peft on the path, so it imports nothing of the package.

Usage: PYTHONPATH=.compat python tests/compat/check.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextModelWithProjection

PROMPT = "a red circle on a white background"
CLASSES = {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}
LIMIT = 1.01 / 255
"""One grey level."""


def opened(case: dict[str, str], toy: str) -> Any:
    """The pipeline of a case."""
    if case["how"] == "folder":
        return DiffusionPipeline.from_pretrained(case["path"], torch_dtype=torch.float32)
    if case["how"] == "single":
        options = {"config": toy, "torch_dtype": torch.float32, "local_files_only": True}
        if case["kind"] == "sdxl":
            # diffusers tells the two encoders of SDXL apart by their widths, which are equal in the toy.
            second = CLIPTextModelWithProjection.from_pretrained(f"{toy}/text_encoder_2", torch_dtype=torch.float32)
            options["text_encoder_2"] = second
        return CLASSES[case["kind"]].from_single_file(case["path"], **options)
    pipeline = DiffusionPipeline.from_pretrained(toy, torch_dtype=torch.float32)
    path = Path(case["path"])
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    return pipeline


def main(root: Path) -> int:
    """Print one line per case; returns the number of images that differ by more than one grey level."""
    print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    cases, bad = json.loads((root / "cases.json").read_text()), 0
    toys = {case["kind"]: case["path"] for case in cases if case["name"].endswith("-toy")}
    for case in cases:
        pipeline = opened(case, toys[case["kind"]])
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        prompt = {} if case["kind"] == "ddpm" else {"prompt": PROMPT, "guidance_scale": 2.0}
        with torch.no_grad():
            drawn = pipeline(**prompt, generator=generator, num_inference_steps=4, output_type="np")
        error = float(np.abs(drawn.images[0] - np.load(case["image"])).max())
        clips = DDIMScheduler.from_config(pipeline.scheduler.config).config.clip_sample and case["kind"] == "sd15"
        bad += error > LIMIT or clips
        said = "clips its latents" if clips else "ok" if error <= LIMIT else "DIFFERS"
        print(f"{case['name']:16} largest difference {error * 255:.4f} grey levels: {said}")
    return bad


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
