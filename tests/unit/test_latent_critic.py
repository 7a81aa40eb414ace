"""Latent critics: distilled from a metric, measured by timestep, used as a reward, refused where they cannot serve."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from acpo_dist.config.load import load_config
from acpo_dist.core.errors import AcpoError, ConfigError, RewardConfigError, RewardError
from acpo_dist.core.registry import MODELS, REWARDS, resolve
from acpo_dist.preflight.doctor.configured import check_rewards
from acpo_dist.rewards.critic_config import FACTS_KEY, LatentCriticConfig
from acpo_dist.rewards.latent_critic import CriticNetwork
from acpo_dist.rewards.naming import metric_section
from acpo_dist.rewards.training.critic import (
    FINAL,
    CriticSettings,
    LabelledLatents,
    fit_critic,
    measure_critic,
    split_rollouts,
)
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.distil import DistilReport, distil
from acpo_dist.training.local import LocalRollouts, open_ports
from acpo_dist.training.run import drive
from acpo_dist.workers.reward.canary import Canary
from acpo_dist.workers.reward.wire import pack, unpack
from acpo_dist.workers.reward.worker import RewardWorker
from tests.conftest import TINY
from tests.helpers.config import refusal
from tests.helpers.runs import copy_run, results

QUIET = Console(quiet=True)
SMALL = [*TINY, "sampler.num_steps=3", "sampler.late_per_sample=2", "sampler.t_max=1"]
PIXELS = ["model={type: ddpm, path: toy-ddpm}", "data.prompts=none", "sampler.guidance_scale=1"]
SETTINGS = CriticSettings(width=8, steps=30, batch_size=16)


def distilled(metric: str, out: Path, *overrides: str, count: int = 10) -> DistilReport:
    config = load_config("toy_sdxl", [*SMALL, *overrides])
    pool = LocalRollouts(config, device="cpu")
    return distil(metric_section(metric, "METRIC"), config, pool, out, SETTINGS, count=count, console=QUIET)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, DistilReport]:
    """A critic of TwoStream, barely trained, and its report."""
    file = tmp_path_factory.mktemp("critic") / "critic.safetensors"
    return file, distilled("two_stream", file)


@pytest.fixture
def critic(made) -> Path:
    return made[0]


def with_critic(file: Path, *more: str) -> list[str]:
    train, judges = f"[{{type: latent_critic, weights: {file}}}]", "[{type: two_stream}, {type: strided_judge}]"
    return [f"rewards.train={train}", f"rewards.judges={judges}", *more]


def worker_of(file: Path, *overrides: str) -> RewardWorker:
    config = load_config("toy_sdxl", [*with_critic(file), *overrides])
    return RewardWorker(config.rewards.train[0], model=config.model, cut="latent", wire_dtype="float32")


def latents(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


# Training and its report


def test_a_critic_learns_score_and_gradient_and_is_measured_on_rollouts_that_it_has_not_seen():
    clean = latents(600)
    # Bright where the first channel is high: a known score with a known gradient.
    scores = torch.tanh(clean[:, 0].mean((1, 2)) * 4)
    gradients = torch.zeros_like(clean)
    gradients[:, 0] = ((1 - scores.square()) * 4 / 64)[:, None, None]
    data = LabelledLatents(
        clean=clean, scores=scores, gradients=gradients, timesteps=torch.arange(600) % 2 * 500.0,
        rollouts=torch.arange(600) // 2,
    )  # fmt: skip
    train, rest = split_rollouts([data], 0.2, seed=1)
    assert not set(train[0].rollouts.tolist()) & set(rest[0].rollouts.tolist())
    torch.manual_seed(0)
    network = CriticNetwork(4, 8)
    before = measure_critic(network, rest)
    fit_critic(network, train, CriticSettings(width=8, steps=250, batch_size=32))
    after = measure_critic(network, rest)
    assert [row.timestep for row in after] == [500.0, 0.0] and sum(row.states for row in after) == 120
    for old, new in zip(before, after, strict=True):
        assert new.srcc > 0.9 and new.cosine > 0.8 > abs(old.cosine)
        # A constant has an error of one standard deviation.
        assert new.rms_error < 0.5 * new.std


def test_distilling_writes_a_critic_and_its_error_by_timestep_on_held_out_rollouts(made):
    file, report = made
    written = json.loads(file.with_suffix(".json").read_text())
    rows = written["by_timestep"]
    assert written["metric"] == "two_stream" and report.held_out_rollouts == 2
    assert [row["states"] for row in rows] == [2] * len(rows)
    assert [row["timestep"] for row in rows] == sorted((row["timestep"] for row in rows), reverse=True)
    assert len(rows) == 3 and rows[-1]["timestep"] == FINAL and rows[0]["timestep"] == 999
    # Eight rollouts train, each with two late states and the finished sample.
    assert report.states == 8 * 3
    assert all(-1 <= row["cosine"] <= 1 and row["rms_error"] > 0 for row in rows)


def test_the_same_seed_distils_the_same_critic(made, tmp_path):
    again = tmp_path / "again.safetensors"
    distilled("two_stream", again)
    first, second = load_file(made[0]), load_file(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_metric_without_a_gradient_becomes_a_reward_with_one_and_keeps_its_direction(tmp_path):
    file = tmp_path / "density.safetensors"
    report = distilled("{type: edge_density, prefer: less}", file, count=8)
    assert all(row.cosine is None for row in report.by_timestep)
    section = LatentCriticConfig(weights=str(file))
    assert section.differentiable and section.direction == -1 and section.licence == "code: Apache-2.0"
    judges = "rewards.judges=[{type: edge_density, prefer: less}]"
    config = load_config("toy_sdxl", [f"rewards.train=[{{type: latent_critic, weights: {file}}}]", judges])
    worker = RewardWorker(config.rewards.train[0], model=config.model, cut="latent", wire_dtype="float32")
    answer = worker.value_and_grad(pack(latents(2), "float32"), ["", ""])
    assert float(unpack(answer.gradient).abs().max()) > 0


def test_a_critic_of_several_sizes_scores_each_and_no_other(tmp_path):
    file = tmp_path / "sizes.safetensors"
    sizes = "model.image_size=[[32, 48], 32]"
    distilled("two_stream", file, sizes, count=12)
    worker = worker_of(file, sizes)
    for shape in ((12, 8), (8, 8)):
        assert len(worker.score(torch.zeros(1, 4, *shape), [""])) == 1
    with pytest.raises(RewardError, match=r"4 x 12 x 8.*found 4 x 8 x 12"):
        worker.score(torch.zeros(1, 4, 8, 12), [""])
    assert "48x32" in refusal("toy_sdxl", *with_critic(file, "model.image_size=[48, 32]"), kind=RewardConfigError)


# As a reward


def test_score_and_gradient_are_those_of_the_network_in_the_file(critic):
    worker, clean = worker_of(critic), latents(3)
    answer = worker.value_and_grad(pack(clean, "float32"), [""] * 3)
    assert answer.scores == pytest.approx(worker.score(clean, [""] * 3), abs=1e-6)
    # Central differences along one direction per sample.
    direction, step = latents(3, seed=1), 1e-2
    slope = (unpack(answer.gradient) * direction).sum((1, 2, 3))
    ends = [torch.tensor(worker.score(clean + sign * step * direction, [""] * 3)) for sign in (1, -1)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=0.02, atol=1e-3)


def test_a_run_trains_on_a_critic_with_its_metric_as_judge_resumes_exactly_and_is_reported(critic, tmp_path, done):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SMALL, *with_critic(critic, "run.iterations=2", "checkpoint.every=1", "guard.drift_timesteps=1")]
    drive(load_config("toy_sdxl", [*options, f"run.dir={whole}"]), open_ports, QUIET)
    copy_run(whole, parts, newest=1)
    drive(load_config("toy_sdxl", [*options, f"run.dir={parts}"]), open_ports, QUIET, resume="auto")
    assert results(whole) == results(parts)
    row = read_metrics(whole / "metrics.jsonl")[1]
    names = {"reward/latent_critic/mean", "judge/two_stream/mean", "guard/hacking_gap", "reward/latent_critic/x0_hat"}
    assert names <= row.keys() and row["reward/gradient_norm"] > 0
    done("report", str(whole), "--out", str(tmp_path / "report.html"), "--prompts", "2")
    done("eval", str(whole), "--suite", "toy", "--limit", "2", "--out", str(tmp_path / "eval"))
    judges = json.loads((tmp_path / "eval" / "evaluation.json").read_text())["judges"]
    assert {one["judge"] for one in judges} == {"two_stream", "strided_judge"}
    assert "reward" in done("plan", "toy_sdxl", *with_critic(critic))


def test_doctor_scores_a_critics_canary_and_asks_for_its_gradient(critic):
    findings = {one.check: one for one in check_rewards(load_config("toy_sdxl", with_critic(critic)))}
    assert all(one.verdict == "ok" for one in findings.values())
    assert "gradient of norm" in findings["reward `latent_critic`"].found


def test_the_canary_of_a_critic_is_a_latent_and_shows_a_changed_network(critic):
    worker = worker_of(critic)
    canary = Canary(worker)
    canary.check()
    with torch.no_grad():
        worker._metric.network.head[-1].bias += 1
    with pytest.raises(RewardError, match="scores the canary"):
        canary.check()


# Where it cannot serve


def test_finished_images_are_refused_by_every_command_that_scores_them(acpo, critic, tmp_path):
    section = f"{{type: latent_critic, weights: {critic}}}"
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    code, _, err = acpo("score", str(tmp_path), "--reward", section)
    assert code == 2 and "cannot score finished images" in err and "Traceback" not in err
    with pytest.raises(RewardConfigError, match="cannot score finished images"):
        RewardWorker(metric_section(section, "--reward"), model=None, cut="image", wire_dtype="float32")
    with pytest.raises(RewardError, match="score images with the metric"):
        worker_of(critic).score(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), [""])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rewards.judges=[{type: strided_judge}]", "must judge the run"),
        ("rewards.cut=image", "rewards.cut is image"),
        ("rewards.latent_crop=4", "rewards.latent_crop is 4"),
        ("guard.action=none", "guard.action is none"),
        ("model.image_size=[48, 32]", "was distilled at 32x32"),
        ("model={type: sd15, path: toy-sd15}", "was distilled on latents of `sdxl`"),
    ],
)
def test_a_run_that_a_critic_cannot_serve_is_refused_before_it_starts(override: str, words: str, critic):
    assert words in refusal("toy_sdxl", *with_critic(critic, override), kind=RewardConfigError)


def test_a_critic_is_no_judge_no_reward_of_pixel_models_and_takes_no_hinge_of_images(critic, tmp_path):
    section = f"{{type: latent_critic, weights: {critic}}}"
    assert "cannot judge" in refusal("toy_sdxl", f"rewards.judges=[{section}]", kind=RewardConfigError)
    pixels = refusal("toy_sdxl", *with_critic(critic, *PIXELS), kind=RewardConfigError)
    assert "works on pixels" in pixels
    hinge = f"[{{type: latent_critic, weights: {critic}, hinge: {tmp_path}}}]"
    said = refusal("toy_sdxl", *with_critic(critic), f"rewards.train={hinge}", kind=RewardConfigError)
    assert "`hinge` is the images" in said


def test_another_vae_is_refused_and_the_same_one_in_another_precision_is_not(critic):
    config = load_config("toy_sdxl", [*with_critic(critic), "model.vae_dtype=bfloat16"])
    RewardWorker(config.rewards.train[0], model=config.model, cut="latent", wire_dtype="float32")
    decoder = resolve("model", MODELS, "sdxl").load_decoder(config.model, device="cpu")
    metric = resolve("reward", REWARDS, "latent_critic")(config.rewards.train[0])
    metric.check_decoder(decoder)
    with torch.no_grad():
        decoder.vae.decoder.conv_out.bias += 0.2
    with pytest.raises(RewardConfigError, match="decodes the same latents to another image"):
        metric.check_decoder(decoder)


@pytest.mark.parametrize(
    ("metric", "overrides", "words"),
    [("two_stream", PIXELS, "works on pixels"), ("clip_score", [], "compares an image with its prompt")],
)
def test_what_cannot_be_distilled_is_refused_before_the_model_is_loaded(metric, overrides, words):
    from acpo_dist.training.distil import require_distillable

    section = resolve("reward", REWARDS, metric).Config()
    with pytest.raises(RewardConfigError, match=words):
        require_distillable(section, load_config("toy_sdxl", overrides))


@pytest.mark.parametrize("content", ["nothing", "another file", "damaged facts", "cut short"])
def test_a_file_that_is_no_critic_is_named(content: str, critic, tmp_path):
    file = tmp_path / "other.safetensors"
    if content == "another file":
        save_file({"a": torch.zeros(1)}, file)
    elif content == "damaged facts":
        save_file(load_file(critic), file, metadata={FACTS_KEY: '{"metric": 3}'})
    elif content == "cut short":
        file.write_bytes(critic.read_bytes()[: critic.stat().st_size // 2])
    with pytest.raises(AcpoError, match=r"other\.safetensors") as caught:
        config = load_config("toy_sdxl", with_critic(file))
        RewardWorker(config.rewards.train[0], model=config.model, cut="latent", wire_dtype="float32")
    assert isinstance(caught.value, ConfigError | RewardConfigError)
