"""An evaluation on Ray gives the numbers of one process, with one worker and with two."""

import json
from pathlib import Path

import pytest

from acpo_dist.config.load import load_config
from acpo_dist.evaluation.suites.backend import LocalBackend
from acpo_dist.evaluation.suites.evaluate import Request, evaluate
from acpo_dist.evaluation.suites.judges import judge_sections
from acpo_dist.evaluation.suites.set_metrics import open_extractor
from acpo_dist.evaluation.suites.subject import open_images, open_model
from acpo_dist.evaluation.suites.suite import load_suite
from acpo_dist.tracking.console import Console

pytestmark = pytest.mark.ray
QUIET = Console(quiet=True)
SMALL = ["sampler.num_steps=3", "rollout.batch_size=4", "rollout.cpus_per_worker=0.1", "rewards.cpus_per_replica=0.1"]


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_one_process_one_worker_and_two_give_the_same_samples_and_metrics(cluster, tmp_path):
    from actors.evaluation import RayBackend

    subject = open_model("toy-sdxl", SMALL, checkpoint="newest", prompted=True)
    request = Request(
        subject=subject, comparison=subject, suite=load_suite("toy", limit=20),
        sections=judge_sections(["two_stream,sharpness"]), extractor=open_extractor("low-pass:4"),
        features="low-pass:4",
    )  # fmt: skip
    backends = {"local": LocalBackend(), **{f"ray{n}": RayBackend(subject.config, workers=n) for n in (1, 2)}}
    reports = {}
    for name, backend in backends.items():
        with backend.open():
            reports[name] = evaluate(request, backend, tmp_path / name, QUIET)
    for name in ("ray1", "ray2"):
        assert rows_of(tmp_path / name) == rows_of(tmp_path / "local")
        for part in ("judges", "sets", "num_missing"):
            assert reports[name][part] == reports["local"][part]


def test_a_judge_that_fails_on_ray_names_its_images_and_the_others_keep_their_scores(cluster, tmp_path):
    import torch
    from PIL import Image

    from acpo_dist.data.toy.world import scenes, templates
    from actors.evaluation import RayBackend

    (tmp_path / "images").mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        index = next(i for i, scene in enumerate(scenes()) if scene.colour == colour and scene.background == "black")
        array = (templates()[index] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(array).save(tmp_path / "images" / f"{number}.png")
    config = load_config("toy_sdxl", SMALL)
    request = Request(
        subject=open_images(str(tmp_path / "images"), image_column="image", caption_columns=()),
        sections=judge_sections(["tests.helpers.judges:FailsOnGreen"]),
        extractor=open_extractor("low-pass:4"), features="low-pass:4",
    )  # fmt: skip
    backend = RayBackend(config, workers=1)
    with backend.open():
        report = evaluate(request, backend, tmp_path / "e", QUIET)
    rows = {row["image"]: row for row in rows_of(tmp_path / "e")}
    (name,) = rows["0.png"]["scores"]
    assert [rows[f"{number}.png"]["scores"][name] is None for number in range(3)] == [False, True, False]
    assert "green" in rows["1.png"]["errors"][name] and report["num_missing"] == 1
