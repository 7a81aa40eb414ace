"""The table of pyiqa's metrics is correct for every metric that can be built without a network."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from acpo_dist.core.errors import RewardConfigError, RewardError
from acpo_dist.rewards.pyiqa_metric import PyiqaMetric
from acpo_dist.rewards.pyiqa_table import PYIQA, facts_of, metadata

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pyiqa") is None, reason="needs pyiqa (optional extra)")

LOCAL = ["cnniqa", "wadiqam_nr", "uranker", "metaiqa", "musiq"]
OFFLINE = ["piqe", "entropy", *LOCAL]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, size: int = 48) -> Tensor:
    """Soft blobs under noise, so that block statistics find something."""
    coarse = torch.rand(count, 3, 5, 5, generator=rng(0))
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    return (smooth + 0.1 * torch.randn(smooth.shape, generator=rng(1))).clamp(0.02, 0.98)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write random weights of a metric to a file."""
    folder = tmp_path_factory.mktemp("weights")

    def make(name: str) -> Path:
        path = folder / f"{name}.pth"
        if not path.exists():
            torch.manual_seed(0)
            torch.save({"params": untrained(name).state_dict()}, path)
        return path

    return make


def untrained(name: str) -> Any:
    from pyiqa.archs.cnniqa_arch import CNNIQA
    from pyiqa.archs.metaiqa_arch import MetaIQA
    from pyiqa.archs.musiq_arch import MUSIQ
    from pyiqa.archs.uranker_arch import URanker
    from pyiqa.archs.wadiqam_arch import WaDIQaM

    build = {
        "cnniqa": lambda: CNNIQA(pretrained=None),
        "wadiqam_nr": lambda: WaDIQaM(metric_type="NR", pretrained=False),
        "uranker": lambda: URanker(pretrained=False),
        "metaiqa": lambda: MetaIQA(pretrained=False),
        "musiq": lambda: MUSIQ(pretrained=False),
        "musiq-ava": lambda: MUSIQ(pretrained=False, num_class=10),
    }
    return build[name]()


@pytest.fixture(scope="module")
def built(weights: Callable[[str], Path]) -> Callable[[str], PyiqaMetric]:
    made: dict[str, PyiqaMetric] = {}

    def build(name: str) -> PyiqaMetric:
        if name not in made:
            path = str(weights(name)) if name in LOCAL else None
            made[name] = PyiqaMetric(PyiqaMetric.Config(metric=name, weights=path))
        return made[name]

    return build


# The table against pyiqa's own metadata


def test_the_table_has_every_no_reference_name_and_no_other():
    assert set(PYIQA) == {name for name, entry in metadata().items() if entry["metric_mode"] == "NR"}


def test_the_metadata_is_what_pyiqa_itself_uses():
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    assert metadata() == dict(DEFAULT_CONFIGS)


@pytest.mark.parametrize("name", PYIQA)
def test_direction_and_range_in_the_table_repeat_pyiqas(name: str):
    theirs = facts_of(name)
    assert (PYIQA[name].lower_better, PYIQA[name].score_range) == (theirs["lower_better"], theirs["score_range"])


def test_only_metrics_without_a_download_are_marked_so():
    assert {name for name, facts in PYIQA.items() if not facts.download} == {"piqe", "entropy"}


def test_where_pyiqa_is_missing_the_table_answers(monkeypatch):
    monkeypatch.setattr("acpo_dist.rewards.pyiqa_table.metadata", dict)
    assert facts_of("niqe") == {"lower_better": True, "score_range": "~0, ~100"}


# The table against what the metrics do


@pytest.mark.parametrize("name", OFFLINE)
def test_a_metric_has_a_gradient_exactly_if_the_table_states_it(name: str, built: Callable[[str], PyiqaMetric]):
    images_BCHW = images(2).requires_grad_(True)
    # Asked of the network itself, since our own call switches the gradient off where the table has none.
    score = built(name).network(images_BCHW.clone()).sum()
    useful = score.requires_grad and bool(torch.autograd.grad(score, images_BCHW)[0].flatten(1).any(1).all())
    assert useful == PYIQA[name].differentiable


@pytest.mark.parametrize("name", LOCAL)
def test_the_gradient_predicts_the_change_of_the_score(name: str, built: Callable[[str], PyiqaMetric]):
    metric = built(name)
    images_BCHW = images(1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(metric(images_BCHW, [""]).sum(), images_BCHW)
    direction = gradient / gradient.norm()
    step = 0.01
    with torch.no_grad():
        rise = metric(images_BCHW + step * direction, [""]) - metric(images_BCHW - step * direction, [""])
    # float32, and pieces of ReLU and maxima that change within the step.
    assert float(rise) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.1)


@pytest.mark.parametrize("name", OFFLINE)
def test_a_score_does_not_depend_on_the_batch(name: str, built: Callable[[str], PyiqaMetric]):
    metric, images_BCHW = built(name), images(4 if name == "musiq" else 16)
    with torch.no_grad():
        together = metric(images_BCHW, [""] * len(images_BCHW))
        assert together.shape == (len(images_BCHW),) and together.dtype == torch.float32
        for size in (1, 4):
            parts = torch.cat([metric(part, [""] * size) for part in images_BCHW.split(size)])
            # Scores of piqe go to 100.
            torch.testing.assert_close(parts, together, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", OFFLINE)
def test_the_smallest_image_is_scored_and_none_smaller(name: str, built: Callable[[str], PyiqaMetric]):
    metric, size = built(name), PYIQA[name].minimum
    with torch.no_grad():
        assert bool(torch.isfinite(metric(images(1, size), [""])).all())
    if size > 1:
        with pytest.raises(RewardError, match=f"at least {size} x {size}, found {size - 1} x {size - 1}"):
            metric(images(1, size - 1), [""])


@pytest.mark.parametrize("name", ["cnniqa", "wadiqam_nr"])
def test_the_smallest_size_is_the_networks_own(name: str, built: Callable[[str], PyiqaMetric]):
    size = PYIQA[name].minimum - 1
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        built(name).network(images(1, size))


def test_a_call_leaves_cudnn_alone(built: Callable[[str], PyiqaMetric], monkeypatch):
    def touched(*arguments: object, **options: object) -> None:
        raise AssertionError("cuDNN flags were set")

    metric = built("cnniqa")
    monkeypatch.setattr(torch.backends.cudnn, "flags", touched)
    assert metric(images(2), [""] * 2).shape == (2,)


def test_a_metric_for_single_images_gets_copies_one_by_one(built: Callable[[str], PyiqaMetric]):
    from dataclasses import replace

    seen: list[tuple[int, ...]] = []

    def network(part: Tensor) -> Tensor:
        seen.append(tuple(part.shape))
        return part.mul_(2).mean()

    metric = object.__new__(PyiqaMetric)
    metric._name, metric._metric, metric.network = "x", "x", network
    metric._facts = replace(PYIQA["maclip"], minimum=1)
    images_BCHW = images(3, 8)
    before = images_BCHW.clone()
    torch.testing.assert_close(metric(images_BCHW, [""] * 3), 2 * before.mean((1, 2, 3)))
    assert seen == [(1, 3, 8, 8)] * 3 and torch.equal(images_BCHW, before)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(1, 1, 48, 48), "found shape"),
        (torch.rand(0, 3, 48, 48), "no images"),
        (torch.full((1, 3, 48, 48), 2.0), "found values from 2"),
        (torch.full((1, 3, 48, 48), torch.nan), "not finite"),
    ],
    ids=["channels", "empty", "range", "nan"],
)
def test_what_is_no_image_is_refused_by_name(images: Tensor, words: str, built: Callable[[str], PyiqaMetric]):
    with pytest.raises(RewardError, match=f"`entropy`.*{words}"):
        built("entropy")(images, [""] * len(images))


# Weights


@pytest.mark.parametrize("name", ["cnniqa", "metaiqa"])
@pytest.mark.parametrize("form", ["params", "bare", "module", "safetensors"])
def test_local_weights_of_any_form_are_loaded(name: str, form: str, weights, built, tmp_path: Path):
    state = torch.load(weights(name), weights_only=True)["params"]
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        wrapped = {f"module.{key}": value for key, value in state.items()}
        torch.save({"params": {"params": state}, "bare": state, "module": wrapped}[form], path)
    metric = PyiqaMetric(PyiqaMetric.Config(metric=name, weights=str(path)))
    assert torch.equal(metric(images(2), [""] * 2), built(name)(images(2), [""] * 2))


def test_the_ava_form_of_musiq_reads_its_ten_classes_from_a_local_file(weights):
    metric = PyiqaMetric(PyiqaMetric.Config(metric="musiq-ava", weights=str(weights("musiq-ava"))))
    with torch.no_grad():
        assert 1 <= float(metric(images(1), [""])) <= 10


def test_weights_of_another_metric_are_refused(weights):
    with pytest.raises(RewardConfigError, match="`metaiqa`"):
        PyiqaMetric(PyiqaMetric.Config(metric="metaiqa", weights=str(weights("cnniqa"))))


def test_a_loader_that_skips_missing_tensors_does_not_score_at_random(weights, tmp_path: Path):
    state = torch.load(weights("metaiqa"), weights_only=True)["params"]
    torch.save({key: value for key, value in state.items() if not key.startswith("head.fc3")}, tmp_path / "w.pth")
    with pytest.raises(RewardConfigError, match=r"2 tensors are missing, such as `head\.fc3\.weight`"):
        PyiqaMetric(PyiqaMetric.Config(metric="metaiqa", weights=str(tmp_path / "w.pth")))


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path):
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # pyright: ignore[reportReturnType]

    torch.save({"params": Trap()}, tmp_path / "w.pth")
    with pytest.raises(RewardConfigError, match="does not hold weights for `cnniqa`"):
        PyiqaMetric(PyiqaMetric.Config(metric="cnniqa", weights=str(tmp_path / "w.pth")))
    assert not (tmp_path / "sprung").exists()


def test_weights_that_are_not_there_are_named(tmp_path: Path):
    config = PyiqaMetric.Config(metric="musiq", weights=str(tmp_path / "absent.pth"))
    assert "absent.pth" in (config.unusable() or "")
    with pytest.raises(RewardConfigError, match=r"absent\.pth"):
        PyiqaMetric(config)


def test_weights_for_a_metric_that_reads_no_file_are_refused(tmp_path: Path):
    (tmp_path / "w.pth").touch()
    config = PyiqaMetric.Config(metric="clipiqa", weights=str(tmp_path / "w.pth"))
    assert "reads no weights from a file" in (config.unusable() or "")


@pytest.mark.parametrize(("name", "words"), [("fid", "compares sets of images"), ("clipscore", "`clip_score`")])
def test_metrics_without_a_score_per_image_are_refused(name: str, words: str):
    assert words in (PyiqaMetric.Config(metric=name).unusable() or "")


def test_a_failed_download_is_reported_with_address_and_target(monkeypatch, tmp_path: Path, capsys):
    from urllib.error import URLError

    from pyiqa.utils import download_util

    def unreachable(*arguments: object, **options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(download_util, "download_url_to_file", unreachable)
    monkeypatch.setattr(download_util, "DEFAULT_CACHE_DIR", str(tmp_path))
    with pytest.raises(RewardConfigError) as caught:
        PyiqaMetric(PyiqaMetric.Config(metric="cnniqa"))
    text = str(caught.value)
    assert "no route to host" in text and f"as {tmp_path}" in text and "https://" in text and "`weights`" in text
    assert capsys.readouterr().out == ""


def test_without_a_hub_a_missing_backbone_is_an_error_after_one_request(monkeypatch, caplog):
    """The hub's client would repeat its requests for most of a minute."""
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    with pytest.raises(RewardConfigError, match=r"pyiqa cannot build `hyperiqa`.*timm resnet50"):
        PyiqaMetric(PyiqaMetric.Config(type="pyiqa", metric="hyperiqa"))
    assert "etrying" not in caplog.text
    assert not constants.HF_HUB_OFFLINE


def test_what_pyiqa_prints_does_not_reach_standard_output(weights, capsys):
    PyiqaMetric(PyiqaMetric.Config(metric="cnniqa", weights=str(weights("cnniqa"))))
    assert capsys.readouterr().out == ""
    assert "pyiqa" in sys.modules
