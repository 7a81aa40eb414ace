"""The command line: exit codes, one clear message, nothing started on bad input."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.data import DATA, needs

CIFAR = DATA / "cifar10_train.parquet"


BAD = {
    "unknown key": (["learner.zero_stag=2"], "unknown key `learner.zero_stag`"),
    "nearest key": (["rolout.num_workers=2"], "Did you mean `rollout`?"),
    "wrong type": (["run.iterations=many"], "`run.iterations`"),
    "unknown reward": (["rewards.train=[{type: two_steam}]"], "Did you mean `two_stream`?"),
    "unknown model": (["model={type: sdxxl}"], "Did you mean `sdxl`?"),
    "unknown algorithm": (["algorithm={type: acpoo}"], "Did you mean `acpo`?"),
    "global batch": (["learner.global_batch=20"], "learner.global_batch (20)"),
    "micro batch": (["learner.micro_batch=5"], "learner.micro_batch x learner.num_ranks (5 x 1 = 5)"),
    "no gradient": (["rewards.train=[{type: pyiqa, metric: piqe}]"], "no usable gradient"),
    "unknown pyiqa metric": (["rewards.judges=[{type: pyiqa, metric: musik}]"], "Did you mean `musiq`?"),
    "missing model": (["model.path=./nowhere"], "model.path: expected a diffusers pipeline folder or a checkpoint"),
    "unknown toy": (["model.path=toy-flux"], "embedded: toy-"),
    "missing parquet": (["data.path=nowhere.parquet"], "nowhere.parquet"),
    "t_max above 1": (["sampler.t_max=1.5"], "`sampler.t_max`"),
    "t_max 0": (["sampler.t_max=0"], "`sampler.t_max`"),
    "ranks without zero": (["learner.num_ranks=2", "learner.global_batch=32"], "learner.num_ranks"),
    "malformed override": (["run.iterations"], "section.key=value"),
    "metric weights": (["rewards.train=[{type: two_stream, weights: nowhere.safetensors}]"], "no weights at"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_message_and_exit_code_2_with_nothing_started(acpo, name, monkeypatch, tmp_path):
    overrides, words = BAD[name]
    monkeypatch.chdir(tmp_path)
    code, out, err = acpo("train", "toy_sdxl", "--backend", "local", "tracking.mlflow=false", *overrides)
    assert code == 2
    assert words in err
    assert out == "" and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


@needs(CIFAR.name)
def test_a_parquet_file_without_the_named_column_is_refused_with_the_columns_it_has(acpo, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = acpo("train", "cifar10_ddpm", f"data.path={CIFAR}", "data.image_column=photo")
    assert code == 2
    assert "`photo`" in err and "image" in err and "label" in err
    assert not (tmp_path / "runs").exists()


def test_an_unreadable_model_folder_is_refused(acpo, monkeypatch, tmp_path):
    import shutil

    import acpo_dist.data.toy

    broken = tmp_path / "broken"
    shutil.copytree(Path(acpo_dist.data.toy.__file__).parent / "assets/toy-sdxl", broken)
    weights = broken / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.chdir(tmp_path)
    code, _, err = acpo("train", "toy_sdxl", "--backend", "local", "tracking.mlflow=false", f"model.path={broken}")
    assert code == 2
    assert "`unet`" in err and str(broken) in err


def test_resume_from_a_folder_that_is_not_a_run_is_refused(acpo, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = acpo("train", "toy_sdxl", "--backend", "local", "--resume", str(tmp_path))
    assert code == 2 and "is not a run" in err


def test_a_missing_configuration_file_lists_the_shipped_ones(acpo):
    code, _, err = acpo("train", "nowhere")
    assert code == 2 and "toy_sdxl" in err


def test_config_show_prints_a_file_that_loads_to_the_same_configuration(acpo, tmp_path):
    from acpo_dist.config.load import load_config

    code, out, _ = acpo("config", "show", "toy_sdxl", "run.seed=3")
    assert code == 0
    (tmp_path / "again.yaml").write_text(out)
    assert load_config(tmp_path / "again.yaml") == load_config("toy_sdxl", ["run.seed=3"])


def test_score_gives_every_image_the_score_of_the_metric_itself(acpo, tmp_path):
    import torch
    from PIL import Image

    from acpo_dist.data.toy.world import templates
    from acpo_dist.rewards.metrics import TwoStreamMetric

    images = (templates()[[0, 100, 700]] * 255).round().to(torch.uint8)
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    code, out, _ = acpo("score", str(tmp_path), "--reward", "two_stream", "--json")
    assert code == 0
    scores = [row["two_stream"] for row in json.loads(out)["scores"]]
    expected = TwoStreamMetric(TwoStreamMetric.Config())(images.float() / 255, [""] * 3)
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)


def test_score_is_the_same_in_any_batch_names_what_it_cannot_read_and_writes_csv(acpo, tmp_path):
    import torch
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for index, side in enumerate((32, 32, 48, 32, 64)):
        image = torch.randint(256, (side, side, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(image.numpy()).save(folder / f"{index}.png")
    (folder / "2b.png").write_bytes(b"not an image")
    answers = []
    for size in ("1", "4", "16"):
        code, out, err = acpo("score", str(folder), "--reward", "two_stream", "--reward", "sharpness",
            "--batch-size", size, "--csv", str(tmp_path / "scores.csv"), "--json",
        )  # fmt: skip
        assert code == 1 and "2b.png" in err
        answers.append(json.loads(out))
        assert len(answers[-1]["skipped"]) == 1
    for name in ("two_stream", "sharpness"):
        scores = [[row[name] for row in answer["scores"]] for answer in answers]
        assert len(scores[0]) == 5
        assert scores[1] == pytest.approx(scores[0], abs=1e-4) and scores[2] == pytest.approx(scores[0], abs=1e-4)
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0] == "path,two_stream,sharpness" and len(lines) == 6


def test_an_image_without_a_finite_score_is_named_and_has_none(acpo, tmp_path):
    import torch
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for index in range(3):
        image = torch.randint(256, (64, 64, 3), generator=generator, dtype=torch.uint8)
        # PIQE divides by the number of active blocks, and a constant image has none.
        Image.fromarray((image * (index != 1)).numpy()).save(tmp_path / f"{index}.png")
    code, out, err = acpo("score", str(tmp_path), "--reward", "pyiqa:piqe", "--json")
    answer = json.loads(out)
    assert code == 1 and "1.png" in err
    assert [row["piqe"] is None for row in answer["scores"]] == [False, True, False]
    assert answer["mean"]["piqe"] == pytest.approx((answer["scores"][0]["piqe"] + answer["scores"][2]["piqe"]) / 2)


def test_score_of_an_unknown_metric_is_refused(acpo, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    code, _, err = acpo("score", str(tmp_path), "--reward", "pyiqa:musik")
    assert code == 2 and "musiq" in err


def test_help_shows_every_word_of_every_description(monkeypatch):
    """Markdown, which joins lines, also removes what it takes for markup."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from acpo_dist.cli import app, commands  # noqa: F401  (registers the commands)

    monkeypatch.setenv("COLUMNS", "400")

    def words(text: str) -> set[str]:
        return set(re.findall(r"[^\s`.,│╭╮╰╯─]+", text))

    def check(command, *path: str) -> int:
        children = getattr(command, "commands", {})
        if children:
            return sum(check(child, *path, name) for name, child in children.items())
        shown = CliRunner().invoke(app.app, [*path, "--help"]).output
        described = [command.help, *(getattr(one, "help", None) for one in command.params)]
        assert words(" ".join(filter(None, described))) <= words(shown), path
        return 1

    assert check(get_command(app.app)) > 20
