"""Folders and hub ids: missing files are named before loading, and the hub is only contacted if allowed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants as hub_constants

from acpo_dist.core.errors import LONGEST, ModelError, UsageError
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.models.architectures import architecture_of
from acpo_dist.models.loading import load_part
from acpo_dist.models.pipeline_files import weight_files
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.models.training import random_model
from acpo_dist.models.training.random_model import write_random_pipeline
from tests.helpers.flow_models import tiny_flux2, tiny_zimage
from tests.unit.test_models_memory import copy_of_toy, load


def test_a_half_downloaded_folder_names_what_is_missing_before_anything_loads(tmp_path):
    folder = copy_of_toy(tmp_path)
    (folder / "text_encoder_2" / "model.safetensors").rename(folder / "text_encoder_2" / "model.safetensors.incomplete")
    with pytest.raises(ModelError, match=r"incomplete: text_encoder_2/model\.safetensors missing\. It contains"):
        SdxlFamily.check(SdxlFamily.Config(path=str(folder)))


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        (("tokenizer_config.json",), r"tokenizer/tokenizer_config\.json"),
        (("tokenizer.json", "vocab.json"), r"tokenizer/vocab\.json"),
        (("tokenizer.json", "merges.txt"), r"tokenizer/merges\.txt"),
        (("tokenizer.json",), None),
    ],
)
def test_a_tokenizer_without_its_words_is_refused_by_name(tmp_path, gone, missing):
    folder = copy_of_toy(tmp_path)
    for name in gone:
        (folder / "tokenizer" / name).unlink()
    if missing is None:
        # The layout of SDXL's own repository.
        SdxlFamily.check(SdxlFamily.Config(path=str(folder)))
        return
    with pytest.raises(ModelError, match=f"incomplete: {missing} missing"):
        SdxlFamily.check(SdxlFamily.Config(path=str(folder)))


def test_a_folder_of_somebody_elses_is_left_alone_by_the_writer_of_random_weights(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"exists and holds no pipeline"):
        write_random_pipeline(folder, "sdxl")
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "thesis.txt"]


def test_random_weights_appear_whole_and_leave_nothing_beside_them(tmp_path, monkeypatch):
    tiny = architecture_of(SdxlFamily.Config(path="toy-sdxl"))
    monkeypatch.setattr(random_model, "PUBLISHED", {"sdxl": tiny})
    folder = write_random_pipeline(tmp_path / "sdxl", "sdxl", dtype=torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["sdxl"]
    SdxlFamily.check(SdxlFamily.Config(path=str(folder)))
    written = (folder / "model_index.json").stat().st_mtime_ns
    assert write_random_pipeline(folder, "sdxl").stat() and (folder / "model_index.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("name", ["sd15", "sd3", "zimage", "flux2_klein"])
@torch.no_grad()
def test_random_weights_of_every_family_make_a_model_that_its_pipeline_opens(name, tmp_path, monkeypatch):
    family = resolve("model", MODELS, name)
    build = {"zimage": tiny_zimage, "flux2_klein": tiny_flux2}.get(name)
    if build is not None:
        build(tmp_path / "tiny")
    path = str(tmp_path / "tiny") if build else {"sd15": "toy-sd15", "sd3": "toy-flow"}[name]
    tiny = architecture_of(family.Config(path=path))
    if build is None:
        clip = {"max_position_embeddings": 77, "vocab_size": 49408, "eos_token_id": 2}
        tiny = replace(tiny, text_encoders=tuple({**entry, **clip} for entry in tiny.text_encoders))
    monkeypatch.setattr(random_model, "PUBLISHED", {name: tiny})
    folder = write_random_pipeline(tmp_path / "random", name, dtype=torch.float32)
    options: dict[str, Any] = {"image_size": 16} if build else {}
    options |= {"text_layers": (1, 3)} if name == "flux2_klein" else {}
    model = family.load(family.Config(path=str(folder), **options), device="cpu", trainable=False)
    noise = torch.randn(1, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    output = model.predict(noise, torch.tensor([500]), model.encode(["a"]))
    assert torch.isfinite(output).all() and 0.1 < float(output.std()) < 10
    assert torch.isfinite(model.decode(noise)).all()
    assert family.open_pipeline(model.config).__class__ is family.pipeline


def test_random_weights_of_a_family_without_a_published_size_are_refused(tmp_path):
    with pytest.raises(UsageError, match="`ddpm` has no published architecture"):
        write_random_pipeline(tmp_path / "ddpm", "ddpm")


def test_a_missing_shard_is_named(tmp_path):
    folder = copy_of_toy(tmp_path)
    stem = folder / "unet" / "diffusion_pytorch_model"
    Path(f"{stem}.safetensors").rename(f"{stem}-00001-of-00002.safetensors")
    names = {"a": f"{stem.name}-00001-of-00002.safetensors", "b": f"{stem.name}-00002-of-00002.safetensors"}
    Path(f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match=r"unet/diffusion_pytorch_model-00002-of-00002\.safetensors missing"):
        SdxlFamily.check(SdxlFamily.Config(path=str(folder)))


def test_a_variant_that_is_not_there_is_refused_with_what_is(tmp_path):
    with pytest.raises(ModelError, match=r"fp16\.safetensors missing.*found files without a variant"):
        SdxlFamily.check(SdxlFamily.Config(path=str(copy_of_toy(tmp_path)), variant="fp16"))


def test_offline_never_contacts_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match=r"not in the local cache.*`hf download someone/absent`"):
        load(path="someone/absent", offline=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "gated: accept its terms at https://huggingface.co/someone/model"),
        ("RevisionNotFoundError", "check model.revision"),
        ("RepositoryNotFoundError", "no such model, or access is denied"),
    ],
)
def test_refusals_of_the_hub_are_reported_with_the_command_to_run(kind, message):
    from huggingface_hub import errors

    def refuse(path, **options):
        # Without the answer of a server, which its constructor wants: which class it is decides.
        answered = getattr(errors, kind)
        raise OSError("cannot load") from answered.__new__(answered)

    with pytest.raises(ModelError, match=message):
        load_part(refuse, "someone/model", None)


FILES = (
    "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "tokenizer_2/tokenizer.json",
    "tokenizer/tokenizer_config.json", "unet/config.json", "vae/config.json",
)  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_configuration_file_that_is_damaged_or_of_another_form_is_one_short_message(file, tmp_path):
    folder = copy_of_toy(tmp_path)
    whole = (folder / file).read_bytes()
    config = SdxlFamily.Config(path=str(folder))
    for content in (b"", whole[: len(whole) // 2], b"[" * 100_000 + b"]" * 100_000, b"[]", b"3", b"null", b"\xff\x80"):
        (folder / file).write_bytes(content)
        # What loads the decoder alone does not read the other parts, so all of it is loaded.
        with pytest.raises(ModelError) as caught:
            SdxlFamily.check(config)
            SdxlFamily.load(config, device="cpu", trainable=False)
            SdxlFamily.load_decoder(config, device="cpu")
        assert str(folder) in str(caught.value) and len(str(caught.value)) <= LONGEST, content[:9]


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"a": 3}}])
def test_an_index_of_weights_without_file_names_is_named(content, tmp_path):
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="lists no weight files"):
        weight_files(tmp_path, None)
