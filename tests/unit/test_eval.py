"""`acpo eval`: its output, resuming, and failing judges, which are not bad scores."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.data.toy.world import scenes, templates
from acpo_dist.evaluation.metrics.drift import path_kl
from acpo_dist.evaluation.metrics.paired import compare_paired
from acpo_dist.training.run_folder import read_run_config
from tests.helpers.runs import copy_run

TINY = ["sampler.num_steps=3", "sampler.guidance_scale=1.5", "rollout.batch_size=4"]
GREEN = "tests.helpers.judges:FailsOnGreen"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent)


@pytest.fixture
def images(tmp_path):
    """A folder with six clean scenes, two of them green."""
    folder = tmp_path / "images"
    folder.mkdir()
    wanted = ["red", "green", "blue", "red", "green", "yellow"]
    for number, colour in enumerate(wanted):
        index = next(
            i for i, s in enumerate(scenes()) if s.colour == colour and s.size == 1 and s.background == "black"
        )
        array = (templates()[index] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / f"{number}.png")
    return folder


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_an_evaluation_of_a_model_writes_samples_images_and_metrics(acpo):
    code, out, err = acpo(
        "eval", "toy-sdxl", *TINY, "--suite", "toy", "--limit", "6", "--samples-per-prompt", "2", "--judges",
        "two_stream,sharpness", "--out", "e", "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report == {"folder": "e", **json.loads(Path("e/evaluation.json").read_text())}
    rows = rows_of(Path("e"))
    assert len(rows) == 12 and len({row["seed"] for row in rows}) == 12
    assert all((Path("e") / row["image"]).is_file() for row in rows)
    assert [row["sample_id"] for row in rows] == sorted(row["sample_id"] for row in rows)
    metrics = {one["judge"]: one for one in report["judges"]}
    by_prompt: dict[int, list[float]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row["scores"]["two_stream"])
    mean = np.mean([np.mean(scores) for scores in by_prompt.values()])
    whole = metrics["two_stream"]["model"]
    assert whole["mean"] == pytest.approx(mean) and whole["low"] < mean < whole["high"] and whole["num_samples"] == 12
    shapes = metrics["two_stream"]["categories"]
    assert sum(part["model"]["num_samples"] for part in shapes.values()) == 12
    assert report["sets"]["model"]["within_prompt_diversity"]["num_prompts"] == 6
    provenance = report["provenance"]
    assert provenance["sampler"]["num_steps"] == 3 and len(provenance["arms"]["model"]["weights_sha256"]) == 64
    assert provenance["schedule_ids"]["model"][0].startswith("3-") and "torch" in provenance["software"]


def test_a_model_against_itself_has_no_difference_and_half_of_the_wins(acpo):
    code, out, _ = acpo(
        "eval", "toy-sdxl", *TINY, "--suite", "toy", "--limit", "5", "--compare", "toy-sdxl", "--judges", "sharpness",
        "--out", "e", "--json",
    )  # fmt: skip
    report = json.loads(out)
    (metrics,) = report["judges"]
    assert code == 0
    assert metrics["paired"]["difference"]["value"] == 0 and metrics["paired"]["win_rate"]["value"] == 0.5
    assert metrics["paired"]["p_value"] == 1 and metrics["num_unpaired"] == 0
    assert report["sets"]["between"]["manifold"]["recall"] == 1
    # Five images make no covariance of 192 features: the figure is left out, with the reason.
    assert "193 samples" in report["sets"]["between"]["frechet"]["not_given"]


class Killed(BaseException):
    """Replaces SIGKILL: nothing catches it."""


def test_a_killed_evaluation_resumes_with_the_result_of_an_uninterrupted_one(acpo, monkeypatch):
    from acpo_dist.workers.rollout.worker import RolloutWorker

    command = ["eval", "toy-sdxl", *TINY, "--suite", "toy", "--limit", "12", "--judges", "two_stream"]
    assert acpo(*command, "--out", "whole")[0] == 0
    drawn: list[str] = []
    generate = RolloutWorker.generate

    def counting(self, plans):
        if len(drawn) == 8 and not Path("finish").exists():
            raise Killed
        drawn.extend(plan.sample_id for plan in plans)
        return generate(self, plans)

    monkeypatch.setattr(RolloutWorker, "generate", counting)
    with pytest.raises(Killed):
        acpo(*command, "--out", "parts")
    assert len(rows_of(Path("parts"))) == 8
    # The end of a write that a kill cut short, and a changed image.
    with Path("parts/samples.jsonl").open("a") as file:
        file.write('{"arm": "model", "sam')
    Path("parts", rows_of(Path("whole"))[0]["image"]).write_bytes(b"not what was judged")
    refused, _, err = acpo(*command, "--out", "parts")
    assert refused == 2 and "already holds an evaluation" in err and "--resume" in err
    Path("finish").touch()
    drawn.clear()
    code, _, err = acpo(*command, "--out", "parts", "--resume")
    assert code == 0 and "1 images in parts are missing" in err
    # The chunk with the changed image and the one that was never begun; the other is kept.
    assert len(drawn) == 8
    assert rows_of(Path("parts")) == rows_of(Path("whole"))
    metrics = [json.loads(Path(name, "evaluation.json").read_text()) for name in ("whole", "parts")]
    assert metrics[0]["judges"] == metrics[1]["judges"] and metrics[0]["sets"] == metrics[1]["sets"]


def test_judges_can_be_added_later_and_other_settings_cannot(acpo, monkeypatch):
    from acpo_dist.workers.rollout.worker import RolloutWorker

    command = ["eval", "toy-sdxl", *TINY, "--suite", "toy", "--limit", "4", "--out", "e"]
    assert acpo(*command, "--judges", "sharpness")[0] == 0
    before = {row["sample_id"]: row["scores"]["sharpness"] for row in rows_of(Path("e"))}

    def never(self, plans):
        raise AssertionError("the images are there already")

    monkeypatch.setattr(RolloutWorker, "generate", never)
    assert acpo(*command, "--judges", "sharpness,two_stream", "--resume")[0] == 0
    rows = rows_of(Path("e"))
    assert {row["sample_id"]: row["scores"]["sharpness"] for row in rows} == before
    assert all(math.isfinite(row["scores"]["two_stream"]) for row in rows)
    code, _, err = acpo(*command, "--judges", "sharpness", "--seed", "1", "--resume")
    assert code == 2 and "seed was 0, is 1" in err
    code, _, err = acpo(*command, "--judges", "{type: sharpness, prefer: less}", "--resume")
    assert code == 2 and "judges.sharpness" in err and "prefer" in err


def test_a_judge_that_fails_names_the_sample_and_is_no_bad_score(acpo, images):
    code, out, err = acpo("eval", str(images), "--judges", f"{GREEN},sharpness", "--out", "e", "--json")
    report = json.loads(out)
    assert code == 1 and report["num_missing"] == 2
    failing, sharpness = report["judges"]
    assert failing["model"]["num_samples"] == 4 and failing["model"]["num_missing"] == 2
    assert sharpness["model"]["num_missing"] == 0
    rows = {row["image"]: row for row in rows_of(Path("e"))}
    assert rows["1.png"]["scores"][failing["judge"]] is None and "green" in rows["1.png"]["errors"][failing["judge"]]
    # The others of the same request keep what the judge says of each alone.
    means = [float(np.asarray(Image.open(images / f"{n}.png")).mean() / 255) for n in (0, 2, 3, 5)]
    assert failing["model"]["mean"] == pytest.approx(np.mean(means), rel=1e-5)
    assert "1.png" in err and "2 scores are missing" in err


def test_an_unreadable_image_is_missing_and_named(acpo, images):
    (images / "2.png").write_bytes(b"no image")
    code, out, err = acpo("eval", str(images), "--judges", "sharpness", "--out", "e", "--json")
    report = json.loads(out)
    assert code == 1 and report["num_missing"] == 1 and "2.png cannot be read" in err
    assert report["judges"][0]["model"]["num_samples"] == 5


def test_images_of_any_format_are_paired_by_name(acpo, images, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in images.iterdir():
        Image.open(path).resize((16, 16)).save(other / path.with_suffix(".bmp").name)
    (other / "5.bmp").unlink()
    code, out, err = acpo(
        "eval", str(images), "--compare", str(other), "--judges", "{type: sharpness, prefer: less}", "--out", "e",
        "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    (metrics,) = report["judges"]
    # Images of 16 x 16 are too small for the features, which costs those figures and no others.
    assert "lower the size" in report["sets"]["comparison"]["not_given"] and "between" not in report["sets"]
    rows = rows_of(Path("e"))
    scores = {(row["arm"], row["sample_id"]): row["scores"]["sharpness"] for row in rows}
    ids = [str(number) for number in range(5)]
    # Less is better here: a lower score of the first set is a positive difference.
    expected = compare_paired(
        [-scores["model", name] for name in ids], [-scores["comparison", name] for name in ids], ids
    ).to_mapping()
    assert metrics["paired"] == expected and metrics["num_unpaired"] == 1 and not metrics["higher_is_better"]


def test_the_table_counts_pairs_and_unpaired_images_and_explains_a_missing_difference(acpo, images, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for number in range(4):
        Image.open(images / f"{number}.png").save(other / f"{number}.png")
    Image.open(images / "0.png").save(other / "strange.png")
    (images / "3.png").write_bytes(b"no image")
    code, out, _ = acpo("eval", str(images), "--compare", str(other), "--judges", "sharpness", "--out", "e")
    # Rows 0, 1 and 2 are on both sides; 4 and 5 are here alone, 3 and the strange one there.
    assert code == 1 and all(text in out for text in ("5 samples", "1 missing", "3 pairs", "5 unpaired"))
    for number in range(1, 6):
        (images / f"{number}.png").unlink()
    code, out, _ = acpo("eval", str(images), "--compare", str(other), "--judges", "sharpness", "--out", "f")
    assert code == 0 and "no difference for sharpness: an interval needs at least two" in out and "4 unpaired" in out


@pytest.mark.parametrize("source", ["toy_sdxl", "toy_flow"])
def test_a_run_is_compared_with_its_base_on_the_same_seeds_and_its_drift_measured(
    request, acpo, tiny, tmp_path, source
):
    from acpo_dist.tracking.console import Console
    from acpo_dist.training.local import open_ports
    from acpo_dist.training.run import drive

    root, iterations = tmp_path / "run", 1
    if source == "toy_sdxl":
        done = request.getfixturevalue("plain_run")
        root, iterations = copy_run(done.run_dir, root), done.iterations
    else:
        drive(tiny("run.iterations=1", f"run.dir={root}", source=source), open_ports, Console(quiet=True))
    config = read_run_config(root)
    code, out, err = acpo(
        "eval", str(root), "--suite", "toy", "--limit", "4", "--compare", "base", "--drift", "4", "--out", "e", "--json"
    )
    assert code == 0, err
    # DeepSpeed, which the run may have loaded in this process, announces itself on standard output.
    report = json.loads(out.splitlines()[-1])
    assert {one["judge"]: one["role"] for one in report["judges"]} == {
        "two_stream": "drove the update", "strided_judge": "judge",
    }  # fmt: skip
    arms = report["provenance"]["arms"]
    assert arms["model"]["iteration"] == iterations and arms["comparison"]["kind"] == "base"
    seeds = {arm: [row["seed"] for row in rows_of(Path("e")) if row["arm"] == arm] for arm in ("model", "comparison")}
    assert seeds["model"] == seeds["comparison"]
    assert report["judges"][0]["paired"]["num_samples"] == 4
    drift = report["drift"]
    assert drift["num_samples"] == 4 and 0 < drift["rms"] < 1
    family = resolve("model", MODELS, config.model.type).load(config.model, device="cpu", trainable=False)
    measured = {int(timestep): value for timestep, value in drift["anchor"].items()}
    elements = math.prod(family.sample_shape)
    assert drift["path_kl_nats"] == pytest.approx(path_kl(measured, family.alpha_bars, elements))
    if source == "toy_flow":
        for command, *options in (
            ["report", "--prompts", "1", "--per-prompt", "1"],
            ["generate", "--prompt", "a red circle on a white background", "--out", "drawn"],
        ):
            code, out, err = acpo(command, str(root), *options, "--json")
            assert code == 0, err


def test_an_untuned_checkpoint_draws_what_the_base_draws(plain_run, acpo, tmp_path):
    from acpo_dist.workers.learner.checkpoint import CheckpointStore

    root = copy_run(plain_run.run_dir, tmp_path / "run")
    store = CheckpointStore(root / "checkpoints", keep=9)
    old = store.newest()
    assert old is not None
    partial = store.prepare(old.iteration)
    weights = load_file(old.learner_folder / "policy.safetensors")
    # LoRA's second factor at 0 is no change at all.
    zeroed = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in weights.items()}
    save_file(zeroed, partial / "learner" / "policy.safetensors")
    store.commit(partial, old.iteration, {key: value for key, value in old.state.items() if key != "iteration"})
    code, _, err = acpo(
        "eval", str(root), "--suite", "toy", "--limit", "3", "--compare", "base", "--drift", "0", "--out", "e"
    )
    assert code == 0, err
    digests = {
        arm: [row["sha256"] for row in rows_of(Path("e")) if row["arm"] == arm] for arm in ("model", "comparison")
    }
    assert digests["model"] == digests["comparison"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["toy-sdxl", "--judges", "sharpness"], "needs --suite"),
        (["toy-sdxl", "--suite", "toy"], "set --judges"),
        (["toy-sdxl", "--suite", "none", "--judges", "sharpness"], "draws from prompts"),
        (["toy-ddpm", "--suite", "toy", "--judges", "sharpness"], "--suite none"),
        (["toy-sdxl", "--suite", "toy", "--judges", "sharpnes"], "Did you mean `sharpness`?"),
        (["toy-sdxl", "--suite", "toy", "--judges", "sharpness,sharpness"], "two judges have the name `sharpness`"),
        (["toy-sdxl", "--suite", "toy", "--judges", "sharpness", "--compare", "base"], "is no run"),
        (["toy-flux", "--suite", "toy", "--judges", "sharpness"], "embedded: toy-"),
        (["nowhere", "--suite", "toy", "--judges", "sharpness"], "no configuration file `nowhere`"),
        (["toy-sdxl", "--suite", "toy", "--judges", "sharpness", "--features", "vgg"], "expected low-pass"),
        (
            ["toy-sdxl", "--suite", "toy", "--judges", "sharpness", "--backend", "local", "--workers", "2"],
            "one process",
        ),
        (["images"], "images need --judges"),
        (["images", "--judges", "tests.helpers.judges:PromptLength"], "compares images with their prompts"),
        (["images", "--judges", "sharpness", "--compare", "toy-sdxl"], "must also hold images"),
        (["empty", "--judges", "sharpness"], "empty holds no image"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(acpo, images, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    code, out, err = acpo("eval", *arguments, "--out", "e")
    assert code == 2 and words in err and out == "" and "Traceback" not in err
    assert not Path("e").exists()
