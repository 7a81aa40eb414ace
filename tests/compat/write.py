"""Write every export of the toys, and the images that the current libraries draw: the first half of `make compat`.

Usage: python -m tests.compat.write FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from acpo_dist.analysis.release.export import export
from tests.helpers.exports import ASSETS, FAMILIES, base, finished_run, image

DORA = (
    "model.tuning.use_dora=true", "model.tuning.use_rslora=true", "model.tuning.targets=[to_q, to_out.0, conv1, conv2]",
)  # fmt: skip


def pixels(pipeline: Any) -> np.ndarray:
    """One image of an unconditional pipeline."""
    return pipeline(generator=torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np").images[0]


def main(root: Path) -> None:
    """Write `cases.json` (path, base, kind and image of each case) and everything that it names."""
    cases = []

    def case(name: str, kind: str, how: str, path: Path, pipeline: object) -> None:
        drawn = pixels(pipeline) if kind == "ddpm" else image(pipeline)[0].permute(1, 2, 0).numpy()
        np.save(root / f"{name}.npy", drawn)
        cases.append({"name": name, "kind": kind, "how": how, "path": str(path), "image": str(root / f"{name}.npy")})

    for kind in FAMILIES:
        case(f"{kind}-toy", kind, "folder", ASSETS / f"toy-{kind}", base(kind))
        run = finished_run(kind, root / f"{kind}-run")
        merged = export(run, root / f"{kind}-merged", layout="merged").folder
        tuned = DiffusionPipeline.from_pretrained(merged, dtype=torch.float32)
        case(f"{kind}-merged", kind, "folder", merged, tuned)
        file = export(run, root / f"{kind}-single", layout="single-file").file
        case(f"{kind}-single", kind, "single", file, tuned)
        for layout in ("comfy", "diffusers"):
            file = export(run, root / f"{kind}-{layout}", layout=layout).file
            case(f"{kind}-{layout}", kind, "lora", file, tuned)
        # Rank-stabilised DoRA of convolutions too: what a plain LoRA does not have, in the layout that holds it.
        run = finished_run(kind, root / f"{kind}-dora-run", *DORA)
        merged = export(run, root / f"{kind}-dora-merged", layout="merged").folder
        tuned = DiffusionPipeline.from_pretrained(merged, dtype=torch.float32)
        file = export(run, root / f"{kind}-dora", layout="diffusers").file
        case(f"{kind}-dora", kind, "lora", file, tuned)
    case("ddpm-toy", "ddpm", "folder", ASSETS / "toy-ddpm", base("ddpm"))
    (root / "cases.json").write_text(json.dumps(cases, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
