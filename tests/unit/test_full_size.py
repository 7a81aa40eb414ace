"""SDXL and Stable Diffusion 3.5 medium at full size with random weights on the CPU, on request: up to 20 GiB, 29 GB of
disk."""

import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from acpo_dist.config.load import load_config
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.core.types import SamplePlan
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.original_files import write_single_file
from acpo_dist.preflight.plan.plan import make_plan
from acpo_dist.workers.rollout.worker import RolloutWorker
from tests.helpers.measured import memory_gib

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        os.environ.get("ACPO_FULL_SIZE") != "1", reason="needs 20 GiB of memory and some minutes: set ACPO_FULL_SIZE=1"
    ),
]
ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
SMALL = [
    "data.prompts=toy", "run.iterations=1", "rollout.prompts_per_iteration=2", "learner.micro_batch=1",
    "learner.global_batch=2", "rewards.train=[{type: two_stream}]", "rewards.judges=[{type: strided_judge}]",
    "rewards.calibration_samples=8", "tracking.mlflow=false", "tracking.num_images=1",
]  # fmt: skip
"""Overrides of configs/sdxl_lora.yaml and those that extend it, for one iteration of two samples."""
SDXL = [
    *SMALL, "model.variant=null", "model.image_size=[128, 192]", "model.memory.embedding_cache=null",
    "rollout.batch_size=1", "sampler.num_steps=4", "sampler.t_max=0.6",
]  # fmt: skip
CONFIGS = {"sdxl": "sdxl_lora", "sd3": "sd35_lora"}


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request, tmp_path_factory):
    """(family, pipeline folder), written by a process of its own so that its memory does not count here."""
    path = tmp_path_factory.mktemp("full") / request.param
    code = "import sys, pathlib; from acpo_dist.models.training.random_model import write_random_pipeline as write; "
    call = f"{code}write(pathlib.Path(sys.argv[1]), sys.argv[2])"
    subprocess.run([sys.executable, "-c", call, str(path), request.param], check=True)
    yield request.param, path
    shutil.rmtree(path)


only_sdxl = pytest.mark.parametrize("model", ["sdxl"], indirect=True)
only_sd3 = pytest.mark.parametrize("model", ["sd3"], indirect=True)


@pytest.fixture
def report(record_property, capsys):
    """Print and record what was measured."""

    def write(found: dict[str, Any]) -> None:
        record_property("found", found)
        with capsys.disabled():
            sys.stdout.write(json.dumps(found) + "\n")

    return write


def train(config: str, overrides: list[str], scratch: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], str]:
    """Train in a process of its own: (memory and seconds from start to end, tensors of the LoRA file, its messages)."""
    out = scratch / "measured.json"
    command = [sys.executable, "-m", "tests.helpers.measured", str(out), "train", config, "--json", *overrides]
    # The embedding cache of the configuration is relative to the working folder.
    done = subprocess.run(
        [*command, f"run.dir={scratch / 'run'}"], capture_output=True, text=True, timeout=2700, cwd=scratch,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lora = next((scratch / "run" / "export").glob("*.safetensors"))
    return json.loads(out.read_text()), load_file(lora), done.stderr


def test_a_full_size_model_loads_plans_and_answers_within_20_gib(model, report):
    seconds, clock = {}, time.monotonic()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name], clock = round(time.monotonic() - clock, 1), time.monotonic()

    name, folder = model
    config = load_config(
        CONFIGS[name],
        [
            f"model.path={folder}", "model.variant=null", "model.image_size=256", "model.memory.embedding_cache=null",
            "model.memory.free_text_encoders=false", "data.prompts=toy", "rollout.batch_size=1",
            "learner.micro_batch=1", "sampler.guidance_scale=1",
        ],
    )  # fmt: skip
    plan = make_plan(config)
    lap("plan")
    gc.collect()
    before = memory_gib("VmRSS")
    family = resolve("model", MODELS, name).load(config.model, device="cpu", trainable=False)
    lap("load")
    condition = family.encode(["a red circle on a white background"])
    noisy = torch.randn(1, *family.sample_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head = family.predict(noisy, torch.tensor([500]), condition)
        lap("forward")
        family.decode(noisy)
    gc.collect()
    grown = memory_gib("VmRSS") - before
    assert head.shape == noisy.shape and torch.isfinite(head).all() and float(head.std()) > 0

    trainable = trainable_tensors(family.network)
    assert sum(value.numel() for value in trainable.values()) == plan.parameters["trainable"]
    encoders = family._embeddings._encoders or ()
    modules = [family.network, family.decoder.vae, *(encoder.model for encoder in encoders)]
    held = sum(value.nbytes for module in modules for value in module.parameters()) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    planned = plan.roles["rollout"].weights
    report({"planned": planned, "held": held, "grown": grown, "peak_of_process": peak, "seconds": seconds})
    assert held == pytest.approx(planned, rel=0.001)
    # With the pages of the mapped files; what activations leave behind is little at 256 px.
    assert grown < 20
    assert peak < 20


@pytest.fixture
def scratch(tmp_path):
    """Folder that is removed at once: pytest keeps those of the last runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@only_sd3
def test_a_full_size_sd35_without_t5_trains_to_a_lora_within_20_gib(model, scratch, report):
    _, folder = model
    # Without AVX-512 a CPU computes bfloat16 at a sixth of the speed of float32.
    overrides = [
        *SMALL, f"model.path={folder}", "model.image_size=128", "model.dtype=float32", "model.vae_dtype=float32",
        "learner.precision=float32", "model.max_sequence_length=32", "sampler.num_steps=2", "sampler.k_max=4",
    ]  # fmt: skip
    found, names, messages = train("sd35_lora", overrides, scratch)
    report(found)
    assert "has no T5" in messages
    # Four projections of each of 24 joint blocks, and of the second attention layer of the first 13.
    assert len({name.partition(".lora")[0] for name in names}) == 4 * (24 + 13)
    assert all(torch.isfinite(value).all() for value in names.values())
    assert found["peak_rss_gib"] <= 20


def with_schedule(folder: Path, out: Path, **entries: Any) -> Path:
    """Another folder with the same weights and other entries of the scheduler's configuration."""
    shutil.copytree(folder, out, symlinks=True, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in folder.rglob("*.safetensors"):
        (out / file.relative_to(folder)).symlink_to(file)
    scheduler = out / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | entries))
    return out


def first_image(path: Path) -> torch.Tensor:
    """Image of two guided steps of the rollout worker."""
    config = load_config("sdxl_lora", [*SDXL, f"model.path={path}", "sampler.num_steps=2"])
    plan = SamplePlan(sample_id="a", prompt_id=0, prompt="a lighthouse at dawn", seed=3)
    worker = RolloutWorker(config.model, config.sampler)
    return worker.generate([plan]).images_BCHW


@only_sdxl
@pytest.mark.parametrize("velocity", [False, True])
def test_a_full_size_single_file_trains_to_a_lora_within_14_gib_and_draws_the_images_of_its_folder(
    velocity, model, scratch, monkeypatch, report
):
    _, folder = model
    monkeypatch.setenv("ACPO_CACHE", str(scratch / "cache"))
    entries = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    source = with_schedule(folder, scratch / "folder", **entries) if velocity else folder
    file = scratch / "model.safetensors"
    write_single_file(
        folder, file, family="sdxl", dtype=torch.bfloat16, metadata={}, velocity=velocity, zero_snr=velocity
    )  # fmt: skip
    anchored = ["algorithm.anchor.space=v"] if velocity else []
    found, names, _ = train("sdxl_lora", [*SDXL, *anchored, f"model.path={file}"], scratch)
    # Four projections of each attention layer: 70 transformer blocks with two attention layers each.
    assert len({name.partition(".")[0] for name in names}) == 4 * 2 * 70
    assert all(torch.isfinite(value).all() for value in names.values())
    difference = float((first_image(file) - first_image(source)).abs().max())
    report({"velocity": velocity, **found, "largest difference": difference})
    assert difference < 1e-4
    assert found["peak_rss_gib"] <= 14
