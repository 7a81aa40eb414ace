"""A run without base model and metric weights trains them once from its own images."""

import io
import platform

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from acpo_dist.core.errors import ConfigError
from acpo_dist.core.processor import computes_bfloat16
from acpo_dist.data.toy.world import templates
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive, model_notes

QUIET = Console(quiet=True)
OVERRIDES = [
    "run.iterations=1", "model.base.steps=2", "model.base.batch_size=4", "sampler.num_steps=4", "sampler.t_max=0.5",
    "rewards.train=[{type: two_stream, weights: train, train_steps: 3}]",
    "rewards.judges=[{type: strided_judge, weights: train, train_steps: 3}]",
]  # fmt: skip


@pytest.fixture
def images(tmp_path):
    """A parquet file of forty PNG files."""
    rows = []
    for image in (templates()[::22] * 255).round().to(torch.uint8):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    path = tmp_path / "images.parquet"
    pq.write_table(
        pa.table({"image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}), path
    )
    return path


def test_base_model_and_metrics_are_trained_from_the_images_and_the_anchor_batch_is_real(tiny, tmp_path, images):
    root = tmp_path / "run"
    config = tiny(f"run.dir={root}", f"data.path={images}", *OVERRIDES, source="cifar10_ddpm")
    drive(config, open_ports, QUIET)
    assert (root / "base/ddpm/model_index.json").is_file()
    assert {path.name for path in (root / "base").glob("*.safetensors")} == {
        "two_stream.safetensors",
        "strided_judge.safetensors",
    }
    row = read_metrics(root / "metrics.jsonl")[0]
    assert row["drift/rms"] == 0.0 and row["data/denoising"] > 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="PyTorch tells it of x86 processors alone")
def test_a_base_model_trains_in_bfloat16_where_the_processor_multiplies_in_it(tiny, tmp_path, images, capsys):
    from acpo_dist.training.prepare import prepare

    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert computes_bfloat16("cpu") == fast
    prepare(tiny(f"data.path={images}", *OVERRIDES, source="cifar10_ddpm"), tmp_path / "base", Console())
    assert f"2 steps in {'bfloat16' if fast else 'float32'}" in capsys.readouterr().err
    notes = model_notes(tiny("model.vae_dtype=bfloat16", "learner.precision=bfloat16"))
    assert any("model.vae_dtype=bfloat16, learner.precision=bfloat16" in note for note in notes) == (
        not fast and not torch.cuda.is_available()
    )
    assert model_notes(tiny()) == [] == model_notes(tiny("model.dtype=bfloat16", "cluster.backend=ray"))


def test_trained_weights_are_reused(tiny, tmp_path, images):
    from acpo_dist.training.prepare import prepare

    config = tiny(f"data.path={images}", *OVERRIDES, source="cifar10_ddpm")
    first = prepare(config, tmp_path / "base", QUIET)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "base").rglob("*.safetensors")}
    assert prepare(config, tmp_path / "base", QUIET) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "base").rglob("*.safetensors")} == stamps


def test_training_without_images_is_refused(tiny, tmp_path):
    from acpo_dist.training.prepare import prepare

    with pytest.raises(ConfigError, match=r"set data\.path"):
        prepare(tiny(*OVERRIDES, source="cifar10_ddpm"), tmp_path, QUIET)
