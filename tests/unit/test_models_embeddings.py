"""Cached embeddings of prompts: computed once, shared by copies of a model, and never used for another model."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from acpo_dist.models import text
from acpo_dist.models.config import MemoryConfig
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.models.text import fingerprint
from tests.unit.test_models_memory import PROMPTS, TOY, change_json, copy_of_toy, load


@pytest.fixture
def counted(monkeypatch):
    """Records the calls of an encoder."""
    asked = []
    original = text.Encoder.__call__

    def count(self, prompt, **options):
        asked.append(prompt)
        return original(self, prompt, **options)

    monkeypatch.setattr(text.Encoder, "__call__", count)
    return asked


def cached(folder: Path, **options) -> SdxlFamily:
    return load(MemoryConfig(embedding_cache=folder, free_text_encoders=True), **options)


def test_cached_embeddings_are_the_encoded_ones_and_need_no_encoder_the_second_time(tmp_path, counted):
    wanted = load().encode([*PROMPTS, ""]).tensors
    counted.clear()
    first = cached(tmp_path)
    for family in (first, cached(tmp_path)):
        found = family.encode([*PROMPTS, ""]).tensors
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert not family._embeddings.resident
    # Two encoders, four prompts, once.
    assert len(counted) == 8


def test_an_interrupted_run_encodes_only_prompts_that_the_folder_lacks(tmp_path, counted):
    embeddings = SdxlFamily.embeddings(
        SdxlFamily.Config(path="toy-sdxl", memory=MemoryConfig(embedding_cache=tmp_path)), device="cpu"
    )
    assert embeddings.fill(PROMPTS[:2]) == 2
    files = sorted(tmp_path.rglob("*.safetensors"))
    # As a full disk would leave it.
    files[0].write_bytes(files[0].read_bytes()[:40])
    counted.clear()
    assert embeddings.fill(PROMPTS) == 2
    assert len(counted) == 4 and embeddings.fill(PROMPTS) == 0


def test_another_model_or_negative_prompt_has_embeddings_of_its_own(tmp_path, counted):
    cached(tmp_path).encode([""])
    folder = copy_of_toy(tmp_path)
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {name: value + 0.1 if value.is_floating_point() else value for name, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    # As `cp --preserve` and `rsync` do it: nothing but the bytes tells the two apart.
    os.utime(weights, ns=(TOY.stat().st_atime_ns, (TOY / "text_encoder" / weights.name).stat().st_mtime_ns))
    for family in (cached(tmp_path, path=str(folder)), cached(tmp_path, negative_prompt=PROMPTS[0])):
        counted.clear()
        family.encode([""])
        assert counted


def test_a_copy_of_a_model_shares_its_embeddings(tmp_path, counted):
    cached(tmp_path).encode([PROMPTS[0]])
    folder = copy_of_toy(tmp_path)
    os.utime(folder / "text_encoder" / "model.safetensors", (1e9, 1e9))
    counted.clear()
    cached(tmp_path, path=str(folder)).encode([PROMPTS[0]])
    assert not counted


def test_a_model_that_encodes_its_empty_prompt_does_not_take_anothers_zeros(tmp_path, counted):
    folder = copy_of_toy(tmp_path)
    change_json(folder / "model_index.json", force_zeros_for_empty_prompt=True)
    assert not cached(tmp_path, path=str(folder)).encode([""]).tensors["prompt_embeds"].any()
    change_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    assert cached(tmp_path, path=str(folder)).encode([""]).tensors["prompt_embeds"].any()


def test_large_files_are_distinguished_by_blocks_over_their_whole_length(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_WHOLE", 1000)
    monkeypatch.setattr(text, "_BLOCK", 16)
    monkeypatch.setattr(text, "_BLOCKS", 64)
    (tmp_path / "encoder").mkdir()
    file, content = tmp_path / "encoder" / "model.safetensors", bytearray(10_000)
    names = set()
    # The first byte, the last one, and a layer in the middle that is larger than the gaps.
    for changed in ((), (0,), (9_999,), range(5_000, 5_200)):
        for place in changed:
            content[place] = 1
        file.write_bytes(content)
        names.add(fingerprint(str(tmp_path), ["encoder"]))
    assert len(names) == 4


def test_the_command_fills_the_folder_that_a_run_reads(tmp_path, monkeypatch, capsys):
    import sys

    from acpo_dist.cli import main

    for encoded in (49, 0):
        arguments = ["embed", "toy_sdxl", f"model.memory.embedding_cache={tmp_path}", "--json"]
        monkeypatch.setattr(sys, "argv", ["acpo", *arguments])
        with pytest.raises(SystemExit):
            main()
        answer = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (answer["prompts"], answer["encoded"]) == (49, encoded)
