"""The transformer families equal their diffusers pipelines on tiny random models, tune and save as others do."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from huggingface_hub import constants as hub_constants
from torch import Tensor

from acpo_dist.config.load import load_config
from acpo_dist.config.plugins import EncoderConfig
from acpo_dist.config.schema import SamplerConfig
from acpo_dist.core.errors import ModelError
from acpo_dist.core.types import SamplePlan
from acpo_dist.diffusion.flow import flow_sigma
from acpo_dist.models.config import Flux2KleinConfig, MemoryConfig, Sd3Config, TuningConfig, ZImageConfig
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.flux2 import Flux2KleinFamily
from acpo_dist.models.lora_files import adapter_layers, diffusers_layers, write_lora
from acpo_dist.models.sd3 import Sd3Family
from acpo_dist.models.zimage import ZImageFamily
from acpo_dist.training.run import model_notes
from acpo_dist.workers.learner.network import PolicyNetwork
from acpo_dist.workers.rollout.worker import RolloutWorker
from tests.helpers.flow_models import tiny_flux2, tiny_sd3, tiny_zimage

PROMPTS = ("a red circle on a grey background", "a blue square")
STEPS = 4
LENGTH = 48
LORA, FULL = TuningConfig(method="lora", rank=4), TuningConfig(method="full")


class Kind(NamedTuple):
    build: Callable[[Path], Any]
    family: Any
    config: Any
    options: dict[str, Any]
    """Keys of the configuration section."""
    call: dict[str, Any]
    """The same, as arguments of the pipeline."""
    shape: tuple[int, ...]
    guidance: float = 0.0
    """Our guidance scale minus the pipeline's."""


SIDE = {"height": 16, "width": 16}
KINDS = {
    "sd3": Kind(
        tiny_sd3, Sd3Family, Sd3Config, {"max_sequence_length": LENGTH}, {"max_sequence_length": LENGTH}, (4, 8, 8)
    ),
    "sd3 without t5": Kind(
        lambda folder: tiny_sd3(folder, t5=False), Sd3Family, Sd3Config, {"max_sequence_length": LENGTH},
        {"max_sequence_length": LENGTH}, (4, 8, 8),
    ),
    "zimage": Kind(
        tiny_zimage, ZImageFamily, ZImageConfig, {"max_sequence_length": LENGTH, "image_size": 16},
        SIDE | {"max_sequence_length": LENGTH}, (16, 8, 8), guidance=1.0,
    ),
    "flux2_klein": Kind(
        tiny_flux2, Flux2KleinFamily, Flux2KleinConfig,
        {"max_sequence_length": LENGTH, "image_size": 16, "text_layers": (1, 3)},
        SIDE | {"max_sequence_length": LENGTH, "text_encoder_out_layers": (1, 3)}, (16, 4, 4),
    ),
}  # fmt: skip
every_kind = pytest.mark.parametrize("name", list(KINDS))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], tuple[Path, Any]]:
    """Folder and pipeline of each kind, built once."""
    built: dict[str, tuple[Path, Any]] = {}

    def build(name: str) -> tuple[Path, Any]:
        if name not in built:
            folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
            built[name] = folder, KINDS[name].build(folder)
        return built[name]

    return build


def section(name: str, folder: Path, tuning: TuningConfig = LORA) -> Any:
    return KINDS[name].config(path=str(folder), tuning=tuning, **KINDS[name].options)


def noise(shape: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])


def answer(family: Any) -> Tensor:
    return family.predict(noise(family.sample_shape), torch.tensor([999, 300]), family.encode(PROMPTS))


@torch.no_grad()
@every_kind
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_rollout_draws_the_images_of_the_pipeline(name: str, guidance: float, models) -> None:
    kind, (folder, pipeline) = KINDS[name], models(name)
    theirs = pipeline(
        prompt=list(PROMPTS), latents=noise(kind.shape), num_inference_steps=STEPS, output_type="pt",
        guidance_scale=guidance - kind.guidance, **kind.call,
    ).images  # fmt: skip
    sampler = SamplerConfig(num_steps=STEPS, spacing="scheduler", guidance_scale=guidance)
    worker = RolloutWorker(section(name, folder), sampler)
    plans = [SamplePlan(sample_id=f"s{i}", prompt_id=i, prompt=prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
    ours = worker.family.decode(worker.final_latents(plans, worker.trajectory)).clamp(0, 1)
    assert float(theirs.std()) > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@every_kind
@pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
def test_training_moves_the_policy_and_not_the_anchor(name: str, tuning: TuningConfig, models) -> None:
    family = KINDS[name].family.load(section(name, models(name)[0], tuning), device="cpu", trainable=True)
    with torch.no_grad():
        base = answer(family)
        for parameter in trainable_tensors(family.network).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy = answer(family)
    policy.square().sum().backward()
    assert all(value.grad is not None for value in trainable_tensors(family.network).values() if value.ndim > 1)
    assert float((policy.detach() - base).abs().max()) > 1e-3
    with torch.no_grad(), family.anchored():
        assert torch.equal(answer(family), base)


@torch.no_grad()
@every_kind
def test_a_saved_pipeline_is_the_tuned_model_and_its_latents_decode_as_before(name: str, models, tmp_path) -> None:
    family = KINDS[name].family.load(section(name, models(name)[0]), device="cpu", trainable=True)
    for parameter in trainable_tensors(family.network).values():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    family.save_pipeline(tmp_path / "out")
    again = KINDS[name].family.load(section(name, tmp_path / "out"), device="cpu", trainable=False)
    torch.testing.assert_close(answer(again), answer(family), rtol=1e-4, atol=1e-5)
    missing = dict.fromkeys(("text_encoder_3", "tokenizer_3")) if name == "sd3 without t5" else {}
    opened = DiffusionPipeline.from_pretrained(tmp_path / "out", **missing)
    weights = {name: value.detach() for name, value in trainable_tensors(family.network).items()}
    layers = diffusers_layers(adapter_layers(weights, family.config.tuning), part="transformer")
    write_lora(tmp_path / "lora.safetensors", layers, {}, torch.float32)
    opened.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert any("lora" in key for key in opened.transformer.state_dict())


@torch.no_grad()
@every_kind
def test_images_are_encoded_to_the_latents_that_are_decoded(name: str, models) -> None:
    family = KINDS[name].family.load(section(name, models(name)[0]), device="cpu", trainable=False)
    latents = noise(family.sample_shape)
    decoder = family.decoder
    torch.testing.assert_close(decoder.from_vae(decoder.to_vae(latents)), latents, rtol=1e-5, atol=1e-5)
    assert family.encode_images(torch.rand(2, 3, 16, 16)).shape == latents.shape


@every_kind
def test_prompts_of_unequal_length_are_batched_with_the_null_condition(name: str, models) -> None:
    family = KINDS[name].family.load(section(name, models(name)[0]), device="cpu", trainable=False)
    together = family.encode([PROMPTS[0], ""]).tensors
    alone = family.encode([""]).tensors
    assert all(torch.equal(value[1:], alone[key]) for key, value in together.items())


@torch.no_grad()
@every_kind
def test_cached_embeddings_are_the_encoded_ones_and_depend_on_the_text_settings(name: str, models, tmp_path) -> None:
    kind, folder = KINDS[name], models(name)[0]
    wanted = kind.family.load(section(name, folder), device="cpu", trainable=False).encode([*PROMPTS, ""]).tensors
    memory = MemoryConfig(embedding_cache=tmp_path, free_text_encoders=True)

    def loaded(**options: Any) -> Any:
        config = section(name, folder).model_copy(update={"memory": memory, **options})
        return kind.family.load(config, device="cpu", trainable=False)

    first = loaded()
    found = first.encode([*PROMPTS, ""]).tensors
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    again = loaded()
    again._embeddings._load = lambda: pytest.fail("loaded the text encoders")
    found = again.encode([*PROMPTS, ""]).tensors
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    others = [{"max_sequence_length": LENGTH - 1}, {"negative_prompt": "blurred"}]
    others += {"sd3": [{"t5": False}], "flux2_klein": [{"text_layers": (1, 2)}]}.get(name, [])
    folders = {loaded(**other)._embeddings.folder for other in others}
    assert len(folders | {first._embeddings.folder}) == 1 + len(others)


@pytest.mark.parametrize("name", ["zimage", "flux2_klein"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_a_named_spacing_is_shifted_by_the_number_of_tokens(name: str, spacing: str, models) -> None:
    family = KINDS[name].family.load(section(name, models(name)[0]), device="cpu", trainable=False)
    tokens = (16 // 2 // 2) ** 2
    # Z-Image: linear between 256 tokens (0.5) and 4096 (1.15). FLUX.2: its own function of tokens and steps.
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    if name == "flux2_klein":
        mu = compute_empirical_mu(tokens, STEPS)
    even = np.linspace(1, 1 / STEPS if spacing == "trailing" else 1 / 1000, STEPS)
    wanted = [*(math.exp(mu) / (math.exp(mu) + 1 / even - 1)), 0]
    found = [flow_sigma(level) for level in family.schedule.trajectory(STEPS, spacing).alpha_bars]
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    unshifted = [flow_sigma(level) for level in family.schedule.trajectory(STEPS, spacing, 1.0).alpha_bars]
    assert unshifted == pytest.approx([*even, 0], rel=1e-5, abs=1e-6)


def test_ncp_is_refused_for_transformers_with_the_reason(models) -> None:
    family = Sd3Family.load(section("sd3", models("sd3")[0]), device="cpu", trainable=True)
    with pytest.raises(ModelError, match="ncp"):
        PolicyNetwork(family, EncoderConfig())


def test_a_missing_text_encoder_and_another_scheduler_are_named(models, tmp_path) -> None:
    folder = Path(shutil.copytree(models("sd3")[0], tmp_path / "sd3"))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    flow = scheduler.read_text()
    scheduler.write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    with pytest.raises(ModelError, match="DDPMScheduler"):
        Sd3Family.load(section("sd3", folder), device="cpu", trainable=False)
    scheduler.write_text(flow)
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(ModelError, match="text_encoder_3"):
        Sd3Family.check(section("sd3", folder))
    without = Sd3Config(path=str(folder), tuning=LORA, max_sequence_length=LENGTH, t5=False)
    assert Sd3Family.load(without, device="cpu", trainable=False).encode(["a"]).tensors["prompt_embeds"].shape[0] == 1


def test_a_missing_t5_is_told_when_a_run_starts(models) -> None:
    def told(name: str, **options: Any) -> list[str]:
        config = load_config("toy_flow", []).model_copy(
            update={"model": section(name, models(name)[0]).model_copy(update=options)}
        )
        return model_notes(config)

    assert told("sd3") == []
    assert "has no T5" in told("sd3 without t5")[0]
    assert "model.t5=false" in told("sd3", t5=False)[0]
    # Of a model that is not here, nothing is known.
    assert told("sd3", path="someone/absent", offline=True) == []


@torch.no_grad()
@every_kind
def test_a_model_that_was_downloaded_by_its_hub_id_is_the_folder_that_was_downloaded(
    name: str, models, tmp_path, monkeypatch
) -> None:
    repository, commit = tmp_path / "models--someone--a-model", "a" * 40
    shutil.copytree(models(name)[0], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    kind = KINDS[name]
    ours, theirs = section(name, models(name)[0]), section(name, Path("someone/a-model"))
    assert kind.family.chunk_counts(theirs, PROMPTS) == kind.family.chunk_counts(ours, PROMPTS)
    assert kind.family.call_arguments(theirs, 4.0) == kind.family.call_arguments(ours, 4.0)
    one, other = (kind.family.load(each, device="cpu", trainable=False) for each in (ours, theirs))
    assert torch.equal(answer(one), answer(other))


def test_a_distilled_flux2_is_refused(tmp_path) -> None:
    tiny_flux2(tmp_path, is_distilled=True)
    with pytest.raises(ModelError, match="distilled"):
        Flux2KleinFamily.load(section("flux2_klein", tmp_path), device="cpu", trainable=False)
