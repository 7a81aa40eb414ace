"""TensorBoard and Weights & Biases behind the tracker port, without a network."""

import logging
from pathlib import Path

import pytest
from PIL import Image

from acpo_dist.config.schema import TrackingConfig
from acpo_dist.core.errors import ConfigError
from acpo_dist.tracking.composite import CompositeTracker, optional_trackers
from tests.helpers.pools import until


def opened(root: Path, first: int = 0, **keys) -> CompositeTracker:
    section = TrackingConfig.model_validate({"mlflow": False, **keys})
    return CompositeTracker(optional_trackers(section, root, "toy", {"run": {"seed": 3}}, first))


def record(tracker: CompositeTracker, root: Path, *iterations: int) -> None:
    Image.new("RGB", (8, 4), (255, 0, 0)).save(root / "grid.png")
    tracker.log_text("resolved.yaml", "run:\n  seed: 3\n")
    tracker.set_tags({"restarts": 0})
    for iteration in iterations:
        tracker.log_image("samples/policy", iteration, root / "grid.png")
        tracker.log_metrics(iteration, {"reward/quality/mean": 0.5 + iteration})
    tracker.close("FINISHED")


def test_tensorboard_holds_metrics_images_and_texts_and_a_resumed_run_replaces_its_iterations(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record(opened(tmp_path, tensorboard=True), tmp_path, 0, 1, 2)
    record(opened(tmp_path, tensorboard=True, first=1), tmp_path, 1, 2, 3)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("reward/quality/mean")]
    assert found == [(0, 0.5), (1, 1.5), (2, 2.5), (3, 3.5)]
    image = events.Images("samples/policy")[0]
    assert (image.width, image.height) == (8, 4)
    assert "resolved.yaml/text_summary" in events.Tags()["tensors"]


def test_wandb_records_offline_and_a_resumed_run_is_the_same_wandb_run(tmp_path, caplog):
    pytest.importorskip("wandb")
    with caplog.at_level(logging.WARNING):
        for iterations in ((0, 1), (1, 2)):
            record(opened(tmp_path, wandb="offline"), tmp_path, *iterations)
    assert not [line for line in caplog.messages if "failed" in line or "cannot be used" in line]
    (known,) = (tmp_path / "wandb_run_id").read_text().split()
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{known}/run-{known}.wandb"))
    # Its service writes after the run has finished.
    until(lambda: bool(files) and all(file.stat().st_size > 1000 for file in files))
    assert b"reward/quality/mean" in b"".join(file.read_bytes() for file in files)


@pytest.mark.parametrize(
    ("keys", "module", "extra"),
    [({"tensorboard": True}, "torch.utils.tensorboard", "tensorboard"), ({"wandb": "offline"}, "wandb", "wandb")],
)
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(keys, module, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ConfigError, match=rf"acpo-dist\[{extra}\]"):
        opened(tmp_path, **keys)
