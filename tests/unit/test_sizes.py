"""Image sizes: how they are configured, which samples get which, and that every stage works on several at once."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

import acpo_dist.data.toy
from acpo_dist.config.load import load_config
from acpo_dist.config.schema import SamplerConfig
from acpo_dist.core.by_size import gather, map_by_size
from acpo_dist.core.errors import RewardConfigError
from acpo_dist.core.sizes import SDXL_BUCKETS, buckets_of, nearest_size
from acpo_dist.core.types import SamplePlan
from acpo_dist.data.prompts import sample_prompts, size_mix
from acpo_dist.models.config import Sd15Config, SdxlConfig
from acpo_dist.tracking.console import Console
from acpo_dist.training.context import fixed_groups
from acpo_dist.training.local import LocalRollouts, open_ports
from acpo_dist.training.run import drive
from acpo_dist.workers.rollout.chunks import chunks_of
from acpo_dist.workers.rollout.worker import RolloutWorker
from tests.helpers.config import refusal
from tests.helpers.exports import single_file
from tests.helpers.runs import copy_run, results, use_everywhere

ASSETS = Path(acpo_dist.data.toy.__file__).parent / "assets"
MIXED = "model.image_size=[{size: [32, 48], share: 2}, {size: [48, 32]}, {size: 32}]"
SHAPES = {(32, 48): (3, 48, 32), (48, 32): (3, 32, 48), (32, 32): (3, 32, 32)}


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("64", [((64, 64), 1.0)]),
        ("48x32", [((48, 32), 1.0)]),
        ("[32, 48]", [((32, 48), 1.0)]),
        ("[[32, 48], 64]", [((32, 48), 1.0), ((64, 64), 1.0)]),
        ("[{size: [32, 48], share: 2}, {size: 32}]", [((32, 48), 2.0), ((32, 32), 1.0)]),
        ("null", []),
    ],
)
def test_an_image_size_is_a_number_a_pair_of_width_and_height_or_a_list_with_shares(text: str, sizes: list):
    config = load_config("toy_sdxl", [f"model.image_size={text}"])
    assert list(config.model.sizes) == sizes
    again = SdxlConfig.model_validate(config.model.model_dump(mode="json"))
    assert again.sizes == config.model.sizes


def test_buckets_are_sdxls_published_sizes_and_keep_their_ratios_at_another_area():
    assert SdxlConfig(image_size="buckets").sizes == tuple((size, 1.0) for size in SDXL_BUCKETS)
    assert len(set(SDXL_BUCKETS)) == 40 and all(width % 64 == height % 64 == 0 for width, height in SDXL_BUCKETS)
    for sizes in (buckets_of(512), tuple(size for size, _ in Sd15Config(image_size="buckets").sizes)):
        assert (
            sizes[0] == (256, 1024) and (512, 512) in sizes and all(side % 32 == 0 for size in sizes for side in size)
        )
    toy = SdxlConfig(path="toy-sdxl", image_size="buckets").sizes
    assert (32, 32) in [size for size, _ in toy] and max(max(size) for size, _ in toy) <= 64


@pytest.mark.parametrize("value", ["[32, 48, 64]", "wide", "[32]", "0", "[]", "[{side: 3}]", "true"])
def test_anything_else_is_refused_with_the_forms_of_an_image_size(value: str):
    said = refusal("toy_sdxl", f"model.image_size={value}")
    assert "image_size" in said and len(said) <= 600


def test_pairs_of_a_data_set_need_one_size(tmp_path: Path):
    said = refusal("toy_dpo", MIXED, f"data.pairs={tmp_path}")
    assert "model.image_size" in said and "data.pairs" in said


@pytest.mark.parametrize("role", ["train", "judges"])
@pytest.mark.parametrize("sizes", ["[24, 48]", "[[32, 48], [64, 16]]", "buckets"])
def test_sizes_below_the_smallest_that_a_metric_takes_are_refused_before_the_run(sizes: str, role: str):
    other = {"train": "judges=[]", "judges": "train=[{type: sharpness}]"}[role]
    said = refusal(
        "toy_sdxl", f"model.image_size={sizes}", f"rewards.{role}=[{{type: two_stream}}]", f"rewards.{other}",
        kind=RewardConfigError,
    )  # fmt: skip
    assert f"rewards.{role}.0 (`two_stream`)" in said and "32 x 32" in said and "model.image_size" in said
    assert len(said) <= 600


def test_the_size_nearest_to_an_image_is_the_one_with_the_closest_ratio():
    assert nearest_size(SDXL_BUCKETS, 3000, 2000) == (1216, 832)
    assert nearest_size(SDXL_BUCKETS, 2000, 3000) == (832, 1216)
    assert nearest_size([(16, 16), (32, 32)], 7, 7) == (32, 32)


def test_samples_follow_the_shares_and_micro_batches_and_groups_hold_one_size():
    config = load_config(
        "toy_sdxl", [MIXED, "rollout.samples_per_prompt=2", "learner.micro_batch=8", "rollout.batch_size=8"]
    )
    mix = size_mix(config)
    assert mix is not None and size_mix(load_config("toy_sdxl", ["model.image_size=[32, 48]"])) is None
    counts: Counter = Counter()
    for iteration in range(12):
        plans = [
            plan
            for group in sample_prompts(
                ["a", "b", "c"], iteration=iteration, run_seed=0, num_prompts=16, samples_per_prompt=2, mix=mix
            )
            for plan in group.samples
        ]
        assert all(len({plan.size for plan in plans[start : start + 8]}) == 1 for start in range(0, len(plans), 8))
        counts.update(plan.size for plan in plans)
    shares = {size: count / counts.total() for size, count in counts.items()}
    assert shares == pytest.approx({(32, 48): 0.5, (48, 32): 0.25, (32, 32): 0.25}, abs=0.06)


def test_seeds_and_prompts_do_not_depend_on_the_sizes():
    mix = size_mix(load_config("toy_sdxl", [MIXED]))
    plain, mixed = (
        sample_prompts(["a", "b"], iteration=3, run_seed=1, num_prompts=4, samples_per_prompt=2, mix=each)
        for each in (None, mix)
    )
    assert [p.seed for g in plain for p in g.samples] == [p.seed for g in mixed for p in g.samples]
    assert all(plan.size is None for group in plain for plan in group.samples)


def test_a_chunk_holds_one_size_and_every_sample_once():
    mix = size_mix(load_config("toy_sdxl", [MIXED]))
    groups = sample_prompts(
        ["a", "b"], iteration=0, run_seed=1, num_prompts=30, samples_per_prompt=1, mix=mix, stream="t"
    )
    chunks = chunks_of(groups, 4)
    assert all(len({plan.size for plan in chunk}) == 1 and len(chunk) <= 4 for chunk in chunks)
    assert sorted(p.sample_id for c in chunks for p in c) == sorted(p.sample_id for g in groups for p in g.samples)


def test_a_function_by_size_returns_the_order_of_its_input():
    images = [torch.full((3, 2, 2 + index % 2), float(index)) for index in range(5)]
    assert map_by_size(gather(images), lambda part: part.mean((1, 2, 3))).tolist() == [0, 1, 2, 3, 4]
    assert isinstance(gather(images[::2]), torch.Tensor)


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_a_rollout_of_another_shape_is_the_pipelines_run_at_that_width_and_height(kind: str):
    theirs = DiffusionPipeline.from_pretrained(ASSETS / f"toy-{kind}", dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = DDIMScheduler.from_config(
        theirs.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    config = load_config(f"toy_{kind}", ["model.image_size=[32, 48]"])
    worker = RolloutWorker(config.model, SamplerConfig(num_steps=4, guidance_scale=2.0))
    for size in (None, (48, 32)):
        plan = SamplePlan(sample_id="a", prompt_id=0, prompt="a red circle on blue", seed=3, size=size)
        width, height = size or (32, 48)
        noise = torch.randn(4, height // 4, width // 4, generator=torch.Generator().manual_seed(3))
        run = theirs(
            plan.prompt, latents=noise[None], num_inference_steps=4, guidance_scale=2.0, output_type="latent",
            height=height, width=width,
        )  # fmt: skip
        batch = worker.generate([plan])
        torch.testing.assert_close(batch.latents_BCHW, run.images, rtol=0, atol=1e-4)
        assert batch.images_BCHW.shape[1:] == (3, height, width)


def test_images_and_latents_of_several_sizes_come_in_the_order_that_was_asked_for(tiny):
    config = tiny(MIXED)
    rollouts = LocalRollouts(config, device="cpu")
    groups = fixed_groups(config, ["a", "b"], 9, stream="test")
    plans = [plan for group in groups for plan in group.samples]
    handles = rollouts.generate(groups)
    images = rollouts.images(handles, [plan.sample_id for plan in plans])
    assert [tuple(image.shape) for image in images] == [SHAPES[plan.size] for plan in plans]
    at = {
        name: row
        for handle in handles
        for name, row in zip(handle.sample_ids, handle.payload.latents_BCHW, strict=True)
    }
    for plan, latents in zip(plans, rollouts.final_latents(groups, rollouts.trajectory()), strict=True):
        assert torch.equal(latents, at[plan.sample_id])


FLOW = [
    MIXED, "run.iterations=2", "checkpoint.every=1", "sampler.num_steps=3", "guard.drift_timesteps=1",
    "rewards.calibration_samples=12", "vrg.enabled=true", "vrg.images=8", "vrg.batch=8", "vrg.nodes=8",
    "vrg.gate_samples=4", "vrg.reference_steps=12",
]  # fmt: skip


def test_a_single_file_trains_resumes_and_is_evaluated_reported_planned_and_drawn_as_its_folder(
    tiny, done, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("ACPO_CACHE", str(tmp_path / "cache"))
    file = single_file("sdxl", tmp_path / "file")
    model = [f"model.path={file}", "model.config=toy-sdxl", MIXED]
    small = ["sampler.num_steps=3", "checkpoint.every=1", "guard.drift_timesteps=1", "rewards.judges=[]"]
    folder, whole, parts = (tmp_path / name for name in ("folder", "whole", "parts"))
    quiet = Console(quiet=True)
    drive(tiny(*small, MIXED, "model.path=toy-sdxl", "run.iterations=2", f"run.dir={folder}"), open_ports, quiet)
    drive(tiny(*small, *model, "run.iterations=2", f"run.dir={whole}"), open_ports, quiet)
    copy_run(whole, parts, newest=1)
    drive(tiny(*small, *model, "run.iterations=2", f"run.dir={parts}"), open_ports, quiet, resume="auto")
    assert results(folder) == results(whole) == results(parts)
    use_everywhere(done, parts, tmp_path / "used", model)
    assert Image.open(tmp_path / "used/drawn/000-000.png").size == (32, 48)
    bare = ["--suite", "toy", "--limit", "2", "--judges", "two_stream", "--out", str(tmp_path / "bare")]
    done("eval", str(file), *model[1:], "sampler.num_steps=2", *bare)


@pytest.mark.slow
def test_a_run_on_several_sizes_trains_resumes_and_is_evaluated_reported_planned_and_drawn(tiny, done, tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    quiet = Console(quiet=True)
    drive(tiny(*FLOW, f"run.dir={whole}"), open_ports, quiet)
    drive(tiny(*FLOW, f"run.dir={parts}", "run.iterations=1"), open_ports, quiet)
    drive(tiny(*FLOW, f"run.dir={parts}"), open_ports, quiet, resume="auto")
    assert results(whole) == results(parts)
    use_everywhere(done, whole, tmp_path / "used", [MIXED])
