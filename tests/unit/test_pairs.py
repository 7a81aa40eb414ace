"""Preference pairs: from a group's scores, from a file in Pick-a-Pic's layout, and from scored images on disk."""

import csv
import io
import math
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from acpo_dist.config.load import load_config
from acpo_dist.core.errors import DataError, RewardConfigError
from acpo_dist.data.pair_making import pair_up, read_scores, write_pairs
from acpo_dist.data.pairs import PairSet
from acpo_dist.models.family import trainable_tensors
from acpo_dist.objective.pairs import Verdict, nearly_same, pair_group
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import JsonlTracker, read_metrics
from acpo_dist.training.local import LocalLearner, open_ports
from acpo_dist.training.run import drive
from acpo_dist.workers.learner.samples import SampleStore
from tests.conftest import TINY


def png(seed: int, size: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pair_file(path, rows: list[dict], *, group: int = 4):
    """A parquet file of pairs, in small row groups."""
    filled = [{"jpg_0": png(2 * i), "jpg_1": png(2 * i + 1), "label_0": 1.0, "caption": f"p{i}"} | row
              for i, row in enumerate(rows)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(filled), path, row_group_size=group)
    return path


# From scores


def verdicts(**scores: list[float]) -> list[tuple[str, str, Verdict]]:
    names = "abcd"[: len(next(iter(scores.values())))]
    qualities = {metric: dict(zip(names, values, strict=True)) for metric, values in scores.items()}
    pairs = pair_group(names, qualities, dict.fromkeys(scores, 1.0), margin=0.5)
    return [(pair.winner, pair.loser, pair.verdict) for pair in pairs]


def test_the_best_is_paired_with_the_worst_and_every_sample_is_in_one_pair():
    assert verdicts(q=[1.0, 4.0, 3.0, 2.0]) == [("b", "a", Verdict.KEPT), ("c", "d", Verdict.KEPT)]


def test_a_winner_that_one_evaluator_puts_below_its_loser_is_not_absolute():
    assert verdicts(q=[5.0, 0.0], r=[0.0, 1.0]) == [("a", "b", Verdict.BEATEN)]


def test_ties_small_margins_and_scores_that_are_not_finite_are_left_out_by_name():
    assert verdicts(q=[1.0, 1.0]) == [("a", "b", Verdict.MARGIN)]
    assert verdicts(q=[1.0, 1.4]) == [("b", "a", Verdict.MARGIN)]
    assert verdicts(q=[1.0, math.nan]) == [("a", "b", Verdict.NON_FINITE)]


def test_images_that_differ_by_noise_alone_are_nearly_the_same():
    noise = torch.Generator().manual_seed(0)
    image = torch.randint(60, 180, (3, 1, 1), generator=noise).expand(3, 64, 64)
    grainy = (image + torch.randint(-40, 41, (3, 64, 64), generator=noise)).to(torch.uint8)
    assert nearly_same(image.to(torch.uint8), grainy, 0.02)
    assert not nearly_same(image.to(torch.uint8), (image + 30).to(torch.uint8), 0.02)


# From a file


def test_rows_that_cannot_be_used_are_counted_by_reason(tmp_path):
    rows = [{}, {"label_0": 0.5}, {"label_0": None}, {"caption": ""}, {"caption": None}, {"label_0": 0.0}]
    index = PairSet(pair_file(tmp_path / "pairs.parquet", rows), 32).index()
    assert index.counts == {"rows": 6, "usable": 2, "tie": 1, "unlabelled": 1, "no_caption": 2}


def test_an_invalid_label_is_refused_with_its_row(tmp_path):
    path = pair_file(tmp_path / "pairs.parquet", [{}, {"label_0": 0.7}])
    with pytest.raises(DataError, match=r"row 1: label_0 is 0\.7"):
        PairSet(path, 32).index()


@pytest.mark.parametrize("missing", ["jpg_0", "label_0", "caption"])
def test_an_absent_column_is_refused_by_name(tmp_path, missing):
    path = pair_file(tmp_path / "pairs.parquet", [{}, {}])
    pq.write_table(pq.read_table(path).drop_columns([missing]), path)
    with pytest.raises(DataError, match=f"no column `{missing}`"):
        PairSet(path, 32)


def test_the_winner_is_the_image_that_the_label_names(tmp_path):
    pairs = PairSet(pair_file(tmp_path / "pairs.parquet", [{"label_0": 1.0}, {"label_0": 0.0}]), 40)
    read = pairs.read(["pair:0:w", "pair:0:l", "pair:1:w", "pair:1:l"])
    for row, seed in enumerate((0, 1, 3, 2)):
        wanted = np.asarray(Image.open(io.BytesIO(png(seed)))).transpose(2, 0, 1) / 255
        assert np.abs(read.pixels[row].numpy() - wanted).max() < 1e-6
    assert read.prompts == ("p0", "p0", "p1", "p1")


def test_one_pass_takes_every_usable_pair_once_and_the_next_in_another_order(tmp_path):
    path = pair_file(tmp_path / "pairs.parquet", [{"label_0": 0.5} if i == 3 else {} for i in range(11)])
    index = PairSet(path, 32).index()
    dealt = [index.sample_pairs(iteration=i, count=5, run_seed=0) for i in range(4)]
    first, second = dealt[0] + dealt[1], dealt[2] + dealt[3]
    assert sorted(first) == sorted(second) == sorted(f"pair:{i}:{s}" for i in range(11) if i != 3 for s in "wl")
    assert first != second
    # No state: iteration 2 is the same for a run that was resumed there.
    assert PairSet(path, 32).index().sample_pairs(iteration=2, count=5, run_seed=0) == dealt[2]


def test_absolute_pairs_keep_only_absolute_winners(tmp_path):
    uids = [("a", "b", 1.0), ("b", "c", 1.0), ("d", "a", 0.5)]
    rows = [{"image_0_uid": x, "image_1_uid": y, "label_0": label} for x, y, label in uids]
    index = PairSet(pair_file(tmp_path / "pairs.parquet", rows), 32).index(absolute=False)
    assert index.counts["usable"] == 2
    # b lost to a, and a drew with d: neither wins absolutely.
    rows.append({"image_0_uid": "e", "image_1_uid": "a", "label_0": 1.0})
    index = PairSet(pair_file(tmp_path / "pairs.parquet", rows), 32).index(absolute=True)
    assert index.rows == ((3,),) and index.counts["not_absolute"] == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run three iterations on four pairs, one with a broken image, without a reward: its folder."""
    rows = [{"jpg_1": b"no image"} if i == 2 else {} for i in range(4)]
    path = pair_file(tmp_path_factory.mktemp("pairs") / "pairs.parquet", rows)

    @cache
    def run(every: int) -> Path:
        root = tmp_path_factory.mktemp("trained") / "run"
        overrides = [
            "algorithm={type: dpo}", f"data.pairs={path}", "rewards.train=[]", "run.iterations=3", f"run.dir={root}",
            f"rollout.every={every}",
        ]  # fmt: skip
        drive(load_config("toy_sdxl", [*TINY, *overrides]), open_ports, Console(quiet=True))
        return root

    return run


def test_a_run_on_pairs_skips_a_broken_image_and_counts_it(trained):
    first, second, *_ = read_metrics(trained(every=1) / "metrics.jsonl")
    # Four pairs an iteration are all there are, and one of them is left out for one of its images.
    assert first["pairs/broken_share"] == second["pairs/broken_share"] == 1 / 4
    assert first["pairs/usable"] == 4 and first["preference/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["drift/rms"] > 0


def test_a_run_on_pairs_needs_no_reward(trained, tiny):
    row = read_metrics(trained(every=1) / "metrics.jsonl")[0]
    assert "judge/strided_judge/mean" in row and not any(name.startswith("reward/two") for name in row)
    with pytest.raises(RewardConfigError, match=r"rewards\.train is empty"):
        tiny("rewards.train=[]")


def test_rollouts_only_every_few_iterations_train_the_same_weights_on_pairs(trained):
    roots = [trained(every=1), trained(every=3)]
    always, seldom = (load_file(root / "checkpoints/000003/learner/policy.safetensors") for root in roots)
    assert always.keys() == seldom.keys() and all(torch.equal(value, seldom[name]) for name, value in always.items())
    always, seldom = (read_metrics(root / "metrics.jsonl") for root in roots)
    assert ["judge/strided_judge/mean" in row for row in seldom] == [True, False, True, False]
    assert seldom[1]["drift/rms"] == always[1]["drift/rms"]


# From images on disk


def scored_folder(tmp_path, rows: list[tuple[str, str, str]]):
    for number, (name, _, _) in enumerate(rows):
        (tmp_path / name).write_bytes(png(number))
    with (tmp_path / "scores.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "prompt", "niqe"), *rows])
    return tmp_path / "scores.csv"


def test_scored_images_become_a_file_that_a_run_can_read(tmp_path):
    table = scored_folder(
        tmp_path, [("a.png", "cat", "3"), ("b.png", "cat", "9"), ("c.png", "dog", "1"), ("d.png", "", "2")]
    )
    images = read_scores(table, tmp_path, [], "prompt")
    kept, counts = pair_up(images, lower_is_better=["niqe"])
    assert [(pair.winner.path.name, pair.loser.path.name) for pair in kept] == [("a.png", "b.png")]
    assert counts == {"images": 4, "no_prompt": 1, "odd": 1, "kept": 1}
    write_pairs(tmp_path / "out.parquet", kept)
    pairs = PairSet(tmp_path / "out.parquet", 40)
    assert pairs.index(absolute=True).counts["usable"] == 1
    read = pairs.read(["pair:0:w"])
    assert read.prompts == ("cat",)
    assert (
        np.abs(read.pixels[0].numpy() * 255 - np.asarray(Image.open(tmp_path / "a.png")).transpose(2, 0, 1)).max()
        < 1e-3
    )


def test_a_score_that_is_no_number_is_refused_with_its_line(tmp_path):
    table = scored_folder(tmp_path, [("a.png", "cat", "3"), ("b.png", "cat", "good")])
    with pytest.raises(DataError, match=r"line 3: `niqe` is 'good'"):
        read_scores(table, tmp_path, ["niqe"], "prompt")


def read_text(tmp_path, text: str | bytes):
    """Write a table unchanged and read its rows."""
    (tmp_path / "scores.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_scores(tmp_path / "scores.csv", tmp_path, [], "prompt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,q,prompt\na,1,cat\nb,5,a cat, sitting\n", "line 3: 4 cells, the header has 3"),
        ("path,q,prompt\na,1,a cat, sitting\nb,5,cat\n", "line 2: 4 cells, the header has 3"),
        ("path,prompt,note\na,cat,\nb,a cat, sitting,\n", "line 3: 4 cells, the header has 3"),
        ('path,q,prompt\na,1,"a\ncat"\n\nb,5,a cat, sitting\n', "line 5: 4 cells"),
        ("q,path,prompt\n1,a,cat\n3\n", "line 3: no path"),
        ('path,q,prompt\na,1,"cat" x\nb,5,cat\n', "line 2, cannot be read"),
        ("path,q,prompt\na,1,caf\u00e9\n".encode("latin-1"), "Save it as UTF-8"),
        ("path,q,q,prompt\na,1,2,cat\n", "column `q` exists twice"),
        ("path,q,prompt\na,1,cat\nb,good,cat\n", "line 3: `q` is 'good', expected a number.*--score"),
        ("path,q,prompt\na,,cat\nb,,cat\n", "no column of scores"),
        ("path,q,prompt\n", "no row"),
        ("", "empty"),
    ],
)
def test_a_table_that_cannot_be_read_as_meant_is_refused_with_its_line(tmp_path, text, words):
    with pytest.raises(DataError, match=words):
        read_text(tmp_path, text)


def test_a_column_whose_first_cell_is_empty_is_a_score_and_an_unnamed_one_is_not(tmp_path):
    # The column without a name is the index that pandas writes.
    rows = ["0,a,cat,,1,x", "1,b,cat,5,2,y", "2,c,cat,1,9,", "3,d,cat,3,4,z"]
    images = read_text(tmp_path, "\n".join([",path,prompt,q,r,remark", *rows]))
    assert list(images[0].scores) == ["q", "r"] and math.isnan(images[0].scores["q"])


def test_an_image_without_a_score_is_counted_out_before_the_others_are_paired(tmp_path):
    images = read_text(tmp_path, "path,prompt,q\nb,cat,5\na,cat,\nc,cat,1\n")
    kept, counts = pair_up(images)
    assert [(pair.winner.path.name, pair.loser.path.name) for pair in kept] == [("b", "c")]
    assert counts == {"images": 3, "no_score": 1, "kept": 1}


def test_an_image_keeps_its_own_score_for_each_of_its_prompts(tmp_path):
    images = read_text(tmp_path, "path,prompt,q\na,cat,1\nb,cat,5\na,dog,9\nc,dog,2\n")
    kept, _ = pair_up(images)
    assert [(pair.winner.path.name, pair.loser.path.name, pair.winner.prompt) for pair in kept] == [
        ("b", "a", "cat"), ("a", "c", "dog"),
    ]  # fmt: skip


def test_an_image_is_never_paired_with_itself(tmp_path):
    kept, counts = pair_up(read_text(tmp_path, "path,prompt,q\na,cat,1\nx/../a,cat,5\n"), duplicates=0.02)
    assert kept == [] and counts == {"images": 2, "duplicate": 1}


def test_images_of_different_sizes_can_be_pairs_of_one_prompt(tmp_path):
    table = scored_folder(tmp_path, [("a.png", "cat", "1"), ("b.png", "cat", "2")])
    (tmp_path / "b.png").write_bytes(png(1, size=56))
    kept, _ = pair_up(read_scores(table, tmp_path, [], "prompt"), duplicates=0.02)
    assert [pair.winner.path.name for pair in kept] == ["b.png"]
    small = torch.full((3, 40, 40), 90, dtype=torch.uint8)
    assert nearly_same(small, torch.full((3, 56, 70), 90, dtype=torch.uint8), 0.02)


def test_a_missing_image_is_named_before_anything_is_written(tmp_path):
    table = scored_folder(tmp_path, [("a.png", "cat", "1"), ("b.png", "cat", "2")])
    kept, _ = pair_up(read_scores(table, tmp_path, [], "prompt"))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"no such image: .*a\.png"):
        write_pairs(tmp_path / "out.parquet", kept)
    assert not (tmp_path / "out.parquet").exists()


def test_a_stand_in_for_a_broken_image_is_no_drift(tiny, tmp_path):
    """Seven valid images and a black one, which the anchor must not use."""
    path = pair_file(tmp_path / "pairs.parquet", [{"jpg_1": b"no image"} if i == 2 else {} for i in range(4)])
    config = tiny("algorithm={type: dpo, anchor: {budget: 0.1}}", f"data.pairs={path}")
    with open_ports(config, JsonlTracker(tmp_path / "metrics.jsonl")) as ports:
        assert isinstance(ports.learner, LocalLearner)
        worker = ports.learner.worker
        worker.start(None)
        ids = tuple(f"pair:{row}:{side}" for row in range(4) for side in "wl")
        batch = worker.batches.make(SampleStore([], policy_version=None), ids, None, 0)
        with torch.no_grad():
            for parameter in trainable_tensors(worker.family.network).values():
                parameter.add_(0.01)
        loss = worker.algorithm.loss(batch, worker.network, None, 1.0)
    assert batch.unreadable_B is not None and batch.unreadable_B.sum() == 1
    assert batch.weights_B.tolist().count(0.0) == 2
    gone = int(batch.unreadable_B.int().argmax())
    assert loss.per_sample[gone] == 0 and (loss.per_sample.detach()[~batch.unreadable_B] != 0).all()
    assert len(loss.metrics["anchor/uniform"]) == 7
