"""Prompts longer than a text encoder, weights in prompts, CLIP skip, and the files that prompts are read from."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

import acpo_dist.data.toy
from acpo_dist.config.load import load_config
from acpo_dist.config.schema import SamplerConfig
from acpo_dist.core.errors import DataError
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.core.types import SamplePlan
from acpo_dist.data.prompts import load_prompts
from acpo_dist.models.text import describe_long
from acpo_dist.workers.rollout.worker import RolloutWorker

ASSETS = Path(acpo_dist.data.toy.__file__).parent / "assets"
SHORT = "a red circle"
LONG = "a large red circle on a blue background at the top left and a small green square"
NEGATIVE = "a small blue square on a red background at the bottom right and a green circle"
ENCODERS = {
    "sdxl": [("tokenizer", "text_encoder", CLIPTextModel),
             ("tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection)],
    "sd15": [("tokenizer", "text_encoder", CLIPTextModel)],
}  # fmt: skip


def family(kind: str, **changes):
    config = load_config(f"toy_{kind}", []).model.model_copy(update=changes)
    return resolve("model", MODELS, kind).load(config, device="cpu", trainable=False)


@torch.no_grad()
def by_transformers(kind: str, prompt: str, *, chunks: int | None = None, skip: int = 0) -> tuple[Tensor, Tensor]:
    """States of all chunks, and the pooled output of the first one, from tokenizers and text models alone."""
    parts, pooled = [], torch.empty(0)
    for tokens, name, model in ENCODERS[kind]:
        tokenizer = AutoTokenizer.from_pretrained(ASSETS / f"toy-{kind}" / tokens)
        network = model.from_pretrained(ASSETS / f"toy-{kind}" / name, dtype=torch.float32)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        room = tokenizer.model_max_length - 2
        rows = [ids[start : start + room] for start in range(0, len(ids), room)] or [[]]
        rows += [[]] * ((chunks or len(rows)) - len(rows))
        full = [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in rows]
        full = [row + [tokenizer.pad_token_id] * (room + 2 - len(row)) for row in full]
        outputs = [network(torch.tensor([row]), output_hidden_states=True) for row in full]
        if kind == "sdxl":
            states = [output.hidden_states[-2] for output in outputs]
        elif skip:
            states = [network.final_layer_norm(output.hidden_states[-1 - skip]) for output in outputs]
        else:
            states = [output.last_hidden_state for output in outputs]
        parts.append(torch.cat(states, 1))
        pooled = outputs[0][0]
    return torch.cat(parts, -1), pooled


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_a_long_prompt_is_its_chunks_side_by_side_and_pooled_from_the_first(kind: str):
    states, pooled = by_transformers(kind, LONG)
    found = family(kind).encode([LONG]).tensors
    assert states.shape[1] > 12
    torch.testing.assert_close(found["prompt_embeds"], states, rtol=0, atol=1e-5)
    if kind == "sdxl":
        torch.testing.assert_close(found["pooled_prompt_embeds"], pooled, rtol=0, atol=1e-5)
    cut = family(kind, long_prompts="cut").encode([LONG]).tensors
    torch.testing.assert_close(cut["prompt_embeds"], states[:, :12], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_a_prediction_does_not_depend_on_the_length_of_the_other_prompts_in_the_batch(kind: str):
    model = family(kind)
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([400, 400])
    with torch.no_grad():
        both = model.predict(noisy, times, model.encode([SHORT, LONG]))
        for row, prompt in enumerate((SHORT, LONG)):
            alone = model.predict(noisy[row : row + 1], times[:1], model.encode([prompt]))
            torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "negative"), [("sdxl", None), ("sdxl", NEGATIVE), ("sd15", None), ("sd15", SHORT)])
def test_a_guided_rollout_of_a_long_prompt_is_the_pipelines_with_equally_long_embeddings(kind: str, negative):
    theirs = DiffusionPipeline.from_pretrained(ASSETS / f"toy-{kind}", dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = DDIMScheduler.from_config(
        theirs.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    states, pooled = by_transformers(kind, LONG)
    count = states.shape[1] // 12
    null, null_pooled = by_transformers(kind, negative or "", chunks=count)
    arguments = {"prompt_embeds": states, "negative_prompt_embeds": null}
    if kind == "sdxl":
        arguments |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": null_pooled}
        if negative is None:
            arguments |= {name: torch.zeros_like(value) for name, value in arguments.items() if "negative" in name}
    plans = [SamplePlan(sample_id=text, prompt_id=0, prompt=text, seed=1) for text in (LONG, SHORT)]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    run = theirs(latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="latent", **arguments)
    config = load_config(f"toy_{kind}", []).model.model_copy(update={"negative_prompt": negative})
    worker = RolloutWorker(config, SamplerConfig(num_steps=4, guidance_scale=3.0))
    torch.testing.assert_close(worker.generate(plans[:1]).latents_BCHW, run.images, rtol=0, atol=1e-4)
    # Beside a short prompt as well.
    torch.testing.assert_close(worker.generate(plans).latents_BCHW[:1], run.images, rtol=0, atol=1e-4)


def test_clip_skip_takes_an_earlier_layer_through_the_last_norm_and_leaves_the_null_condition():
    model = family("sd15", clip_skip=1)
    found = model.encode([SHORT, LONG]).tensors["prompt_embeds"]
    for row, prompt in enumerate((SHORT, LONG)):
        wanted, _ = by_transformers("sd15", prompt, skip=1)
        torch.testing.assert_close(found[row : row + 1, : wanted.shape[1]], wanted, rtol=0, atol=1e-5)
    null, plain = (each.encode([""]).tensors["prompt_embeds"] for each in (model, family("sd15")))
    assert torch.equal(null, plain)


def test_long_prompts_are_counted_for_the_user():
    config = load_config("toy_sdxl", []).model
    counts = resolve("model", MODELS, "sdxl").chunk_counts(config, [SHORT, LONG, ""])
    assert counts[0] == counts[2] == 1 < counts[1]
    # Stable Diffusion 3 without T5 reads prompts with CLIP, whatever the number of T5's tokens is.
    without_t5 = load_config("toy_flow", []).model
    assert resolve("model", MODELS, "sd3").chunk_counts(without_t5, [SHORT, LONG, ""]) == counts
    assert "1 of 3" in describe_long(counts, "cut") and "model.long_prompts=chunk" in describe_long(counts, "cut")
    assert f"{counts[1]} chunks" in describe_long(counts, "chunk") and describe_long([1, 1], "cut") is None


def test_generated_images_depend_on_the_end_of_a_long_prompt(acpo, tmp_path: Path):
    prompts = [LONG, LONG.replace("green square", "blue triangle")]
    code, *_ = acpo(
        "generate", "toy-sdxl", "--prompt", prompts[0], "--prompt", prompts[1], "--steps", "2",
        "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0
    first, second = (np.asarray(Image.open(tmp_path / f"{index:03d}-000.png")) for index in (0, 1))
    assert (first != second).any()


# Files and weights


def write_images(folder: Path) -> None:
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / "0.txt").write_text("first\nline", encoding="utf-16")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "second"}) + "\n")


@pytest.mark.parametrize("kind", ["jsonl", "bom", "parquet", "folder", "zip", "pq"])
def test_prompts_are_read_from_every_usual_file(tmp_path: Path, kind: str, caplog):
    rows = [{"Prompt": "first line"}, {"Prompt": "second"}]
    path = tmp_path / f"prompts.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "bom":
        path = tmp_path / "prompts.txt"
        path.write_bytes(b"\xef\xbb\xbffirst line\r\nsecond\r\n")
    elif kind in ("parquet", "pq"):
        pq.write_table(pa.table({"Prompt": [row["Prompt"] for row in rows]}), path)
    else:
        path.mkdir()
        write_images(path)
        if kind == "zip":
            archive = tmp_path / "images.zip"
            with zipfile.ZipFile(archive, "w") as file:
                for each in sorted(path.iterdir()):
                    file.write(each, f"deep/{each.name}")
            path = archive
    assert load_prompts(str(path), "prompt") == ("first line", "second")
    if kind in ("folder", "zip"):
        assert "1 of 3 images have no caption" in caplog.text


def test_a_column_that_is_not_there_and_a_broken_line_are_named(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"no column `prompt`\. Columns found: text"):
        load_prompts(str(path), "prompt")
    path.write_text('{"prompt": "a"}\nnot json\n')
    with pytest.raises(DataError, match="line 2"):
        load_prompts(str(path), "prompt")


@pytest.mark.parametrize("prompt", ["a (red car:1.2) on a road", "(sky:0.5)", "(a: -1)"])
def test_weights_are_refused_unless_they_are_taken_literally(tmp_path: Path, prompt: str):
    path = tmp_path / "p.txt"
    path.write_text(f"a house\n{prompt}\n")
    with pytest.raises(DataError, match=r"1 of 2 prompts have weights.*data\.prompt_weights=literal"):
        load_prompts(str(path), "prompt")
    assert load_prompts(str(path), "prompt", weights="literal") == ("a house", prompt)


def test_brackets_without_a_weight_are_no_weights(tmp_path: Path):
    path = tmp_path / "p.txt"
    path.write_text("a (red) car\na clock at 12:30\nratio (see: left)\n")
    assert len(load_prompts(str(path), "prompt")) == 3
