"""`acpo vrg` and `acpo generate`: the published files, our artefacts, plain diffusers pipelines."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import acpo_dist
from tests.helpers.data import DATA, needs

VRG = DATA / "vrg"
TOY_FOLDER = str(Path(acpo_dist.__file__).parent / "data/toy/assets/toy-sdxl")
needs_published = needs("vrg")


@pytest.fixture
def answer(acpo):
    """Run `acpo ARGUMENTS`: exit code, the JSON answer or None, and standard error."""

    def run(*arguments: object) -> tuple[int, Any, str]:
        code, out, err = acpo(*arguments)
        return code, json.loads(out) if out.startswith("{") else None, err

    return run


def published(name: str) -> list:
    return ["--table", VRG / "cifar10_error_table.txt", "--trajectory", VRG / f"trajectory_{name}.txt", "--json"]


@needs_published
@pytest.mark.parametrize(
    ("name", "start", "publication"),
    [
        ("1-010-time_quadratic", 0.501387, 0.4190),
        ("1-020-logSNR", 0.31935, 0.29638),
        ("1-050-time_uniform", 0.13596, 0.12618),
    ],
)
def test_the_published_problem_ends_below_the_publication_in_half_a_second(answer, name, start, publication):
    code, report, _ = answer(
        "vrg", "optimize", *published(name), "--mode", "paper_box", "--lp", "0.01", "--reg-lambda", "100",
    )  # fmt: skip
    assert code == 0 and report is not None
    assert report["j0"] == pytest.approx(start, abs=1e-5)
    assert report["j1"] <= publication and report["cpu_seconds"] >= 0
    assert {"alpha_bars", "sigmas", "timesteps"} <= report.keys()
    # J by hand, from the file's own rows: linear in alpha_bar between them.
    rows = np.loadtxt(VRG / "cifar10_error_table.txt")
    rows = rows[rows[:, 1] > 0][::-1]
    sigmas = np.array(report["sigmas"])
    v = np.interp(1 / (1 + sigmas**2), rows[:, 1], rows[:, 2])
    assert report["j1"] == pytest.approx(float(((sigmas - np.append(sigmas[1:], 0)) ** 2 * v).sum()), rel=1e-4)


@needs_published
def test_the_trust_region_keeps_the_noisy_end_bit_for_bit_and_gains_a_few_percent(answer):
    for name, least in (("1-010-time_quadratic", 0.05), ("1-020-logSNR", 0.03)):
        _, report, _ = answer("vrg", "optimize", *published(name))
        assert report is not None and report["mode"] == "log_trust"
        last = [line for line in (VRG / f"trajectory_{name}.txt").read_text().split("\n") if line.strip()][-1]
        assert report["alpha_bars"][0] == float(last)
        assert least < 1 - report["j1"] / report["j0"] < 0.06
        assert report["saturation"] <= 0.25 + 1e-9


def test_measuring_writes_an_artefact_that_show_optimize_and_generate_read(answer, tmp_path):
    artefact = tmp_path / "vrg.json"
    small = ["sampler.num_steps=6", "sampler.guidance_scale=1.5", "vrg.images=16", "vrg.batch=16", "vrg.gate_samples=4",
             "vrg.nodes=8", "vrg.reference_steps=24"]  # fmt: skip
    code, report, err = answer("vrg", "measure", "toy-sdxl", *small, "--out", artefact, "--json")
    assert code == 0 and report is not None, err
    assert report["table"]["provenance"]["source"] == "toy-sdxl" and artefact.with_suffix(".png").is_file()
    code, shown, _ = answer("vrg", "show", artefact, "--json")
    assert code == 0 and shown is not None and shown["trajectory"] == report["trajectory"]
    code, again, _ = answer(
        "vrg", "optimize", "--table", artefact, "--trajectory", artefact, "--trust", "0.1", "--json",
    )  # fmt: skip
    assert code == 0 and again is not None and again["before"]["alpha_bars"] == report["trajectory"]["alpha_bars"]
    out = tmp_path / "images"
    code, drawn, err = answer(
        "generate", "toy-sdxl", "--prompt", "a red circle on a white background", "--schedule", artefact,
        "--guidance-scale", "1.5", "--out", out, "--json",
    )  # fmt: skip
    assert code == 0 and drawn is not None, err
    assert Path(drawn["images"][0]["path"]).is_file() and Path(drawn["grid"]).is_file()


def test_a_pipeline_with_euler_walks_the_same_way_as_the_rollouts(tmp_path):
    import torch

    from acpo_dist.analysis.release.pipeline import arguments_for, images_of, open_pipeline
    from acpo_dist.core.types import SamplePlan
    from acpo_dist.training.open_model import open_rollouts, source_config
    from acpo_dist.training.trajectory.artefact import trajectory_to_mapping

    prompt = "a red circle on a white background"
    config, _ = source_config("toy-sdxl", ["sampler.num_steps=5", "sampler.guidance_scale=1.5"])
    pool = open_rollouts(config, None)
    levels = pool.alpha_bars().numpy()
    schedule = tmp_path / "schedule.json"
    schedule.write_text(json.dumps({"trajectory": trajectory_to_mapping(pool.trajectory(), levels)}))
    plan = SamplePlan(sample_id="x", prompt_id=0, prompt=prompt, seed=5)
    own = pool.worker.generate([plan]).images_BCHW
    pipeline, _ = open_pipeline("toy-sdxl", "euler")
    sample = arguments_for(pipeline, schedule, 20)
    noise = torch.Generator().manual_seed(5)
    theirs = images_of(pipeline(prompt, guidance_scale=1.5, generator=noise, output_type="np", **sample))
    assert (own.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vrg", "optimize", "--table", "none.txt", "--trajectory", "none.txt"], "cannot read none.txt"),
        (["vrg", "show", "."], "VRG artefact"),
        (["vrg", "measure", "tests"], "neither a run"),
        (["vrg", "measure", TOY_FOLDER], "set data.prompts"),
        (["generate", "toy-sdxl"], "--prompt"),
        (["generate", "toy-sdxl", "--prompt", "x", "--solver", "ddim"], "unknown --solver ddim"),
        (["generate", "toy-ddpm", "--schedule", "none.json"], "takes no trajectory"),
    ],
)
def test_bad_input_ends_in_one_message_and_exit_code_2(answer, arguments, message):
    code, _, err = answer(*arguments)
    assert code == 2 and message in err and "Traceback" not in err


@needs_published
def test_a_table_that_holds_alpha_instead_of_alpha_bar_is_refused(answer, tmp_path):
    rows = [
        line.split()
        for line in (VRG / "cifar10_error_table.txt").read_text().splitlines()
        if line.strip()[:1].isdigit()
    ]
    betas = np.append(np.linspace(1e-4, 0.02, 1000), 0.02)
    wrong = tmp_path / "table.txt"
    wrong.write_text("".join(f"{row[0]} {1 - betas[int(row[0]) - 1]:.6f} {' '.join(row[2:])}\n" for row in rows))
    code, _, err = answer(
        "vrg", "optimize", "--table", wrong, "--trajectory", VRG / "trajectory_1-010-time_quadratic.txt",
    )  # fmt: skip
    assert code == 2 and "alpha_t = 1 - beta_t" in err


def test_the_schedule_of_an_export_can_be_shown(answer, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"trajectory": {"timesteps": [900.0, 100.0], "alpha_bars": [0.01, 0.8, 1.0]}}))
    assert answer("vrg", "show", path)[0] == 0
    code, _, err = answer("vrg", "optimize", "--table", path, "--trajectory", path)
    assert code == 2 and "no error table" in err
