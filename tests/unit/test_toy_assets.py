"""The shipped toy models have their documented quality (docs/toy.md), measured on seeds not used in training."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import acpo_dist.data.toy
from acpo_dist.core.types import SamplePlan
from acpo_dist.data.toy.damage import BASE_DAMAGE, JUDGE_DAMAGE, spoil
from acpo_dist.data.toy.oracle import judge_exactly
from acpo_dist.data.toy.world import caption_index, captions, templates
from tests.helpers.exports import opened

ASSETS = Path(acpo_dist.data.toy.__file__).parent / "assets"


def test_all_assets_together_hold_at_most_nine_megabytes_and_no_pickle():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    # The toys share one VAE, which each folder holds, so that plain diffusers opens it; git stores the file once.
    contents = {hashlib.sha256(path.read_bytes()).digest(): path.stat().st_size for path in files}
    assert sum(contents.values()) <= 9_000_000
    assert sum(path.stat().st_size for path in files) <= 11_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}


def _pool(family, count):
    generator = torch.Generator().manual_seed(987_654)
    ids = torch.randint(864, (count,), generator=generator)
    return spoil(templates()[ids], family, generator)


@pytest.mark.parametrize(
    ("kind", "own", "least"),
    [("reward", BASE_DAMAGE, 0.93), ("judge", JUDGE_DAMAGE, 0.80), ("judge", BASE_DAMAGE, 0.75)],
)
def test_reward_and_judge_rank_graded_damage(kind, own, least):
    from scipy.stats import spearmanr

    from acpo_dist.rewards.metrics import StridedJudgeMetric, TwoStreamMetric

    metric = {"reward": TwoStreamMetric, "judge": StridedJudgeMetric}[kind]
    images, severity = _pool(own, 600)
    with torch.no_grad():
        scores = metric(metric.Config())(images, [""] * 600)
    assert spearmanr(scores, 1 - severity).statistic >= least


def test_reward_and_judge_are_different_networks_trained_on_different_damage():
    assert not set(BASE_DAMAGE) & set(JUDGE_DAMAGE)
    reports = [json.loads((ASSETS / f"{name}.json").read_text()) for name in ("two_stream", "judge")]
    assert all(report["srcc"] > 0.8 for report in reports)


def test_the_vae_gives_every_clean_template_back():
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(ASSETS / "toy-sdxl/vae", dtype=torch.float32).eval()
    images = templates()[::4]
    with torch.no_grad():
        decoded = vae.decode(vae.encode(2 * images - 1).latent_dist.mean).sample / 2 + 0.5
    prompts = [captions()[index] for index in caption_index()[::4]]
    report = judge_exactly(decoded.clamp(0, 1), prompts)
    assert report.oracle_psnr >= 37 and report.caption_accuracy == 1.0


def _draw(source, count, guidance):
    from acpo_dist.config.load import load_config
    from acpo_dist.workers.rollout.worker import RolloutWorker

    config = load_config(source) if isinstance(source, str) else source
    sampler = config.sampler.model_copy(update={"guidance_scale": guidance})
    worker = RolloutWorker(config.model, sampler)
    names = captions() if config.data.prompts == "toy" else ("",)
    plans = [
        SamplePlan(sample_id=str(k), prompt_id=0, prompt=names[k * 7 % len(names)], seed=55_000 + k)
        for k in range(count)
    ]
    images = torch.cat([worker.generate(plans[k : k + 16]).images_BCHW for k in range(0, count, 16)])
    return images.float() / 255, [plan.prompt for plan in plans]


@pytest.mark.parametrize(("source", "caption_accuracy"), [("toy_sdxl", 0.80), ("toy_sd15", 0.80), ("toy_flow", 0.70)])
def test_a_toy_draws_the_prompt_with_diversity(source, caption_accuracy):
    images, prompts = _draw(source, 72, guidance=1.5)
    report = judge_exactly(images, prompts)
    assert report.caption_accuracy >= caption_accuracy
    assert report.oracle_mse <= 0.008
    assert report.template_entropy >= 3.85  # of at most log 72 = 4.28


def test_toy_ddpm_draws_recognisable_scenes(tiny):
    config = tiny(
        "model={type: ddpm, path: toy-ddpm}", "data.prompts=none", "rewards.cut=image", "sampler.num_steps=25"
    )
    images, _ = _draw(config, 32, guidance=1.0)
    report = judge_exactly(images)
    assert report.oracle_mse <= 0.05
    assert report.template_entropy >= 2.9  # of at most log 32 = 3.47


# Without T5 the pipeline of Stable Diffusion 3 adds 256 zero tokens; toy-flow was trained with one.
@pytest.mark.parametrize(("kind", "options"), [("sdxl", {}), ("flow", {"max_sequence_length": 1})])
def test_plain_diffusers_opens_a_toy_and_draws_the_prompt(kind, options):
    pipeline = opened(ASSETS / f"toy-{kind}", kind)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a blue square on a white background", "a yellow circle on a black background"] * 3
    images = pipeline(
        prompts,
        num_inference_steps=20,
        guidance_scale=3.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(1),
        **options,
    ).images
    assert images.shape == (6, 3, 32, 32)
    assert judge_exactly(images.float(), prompts).caption_accuracy >= 0.5


def test_plain_diffusers_opens_toy_ddpm():
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(ASSETS / "toy-ddpm")
    assert type(pipeline).__name__ == "DDPMPipeline"


def test_the_recipe_builds_a_part_and_refuses_sdxl_without_its_vae(tmp_path):
    from acpo_dist.training.toy_assets import build

    build("reward", tmp_path, effort=0.02)
    assert (tmp_path / "two_stream.safetensors").is_file()
    with pytest.raises(FileNotFoundError, match="needs its VAE"):
        build("sdxl", tmp_path, effort=0.001)
    with pytest.raises(ValueError, match="unknown part"):
        build("flux", tmp_path)
