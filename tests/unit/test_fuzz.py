"""Files and bodies that are cut or changed at random: one short message or the content, never a traceback or a hang."""

import json
import math
import random
import zipfile
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from acpo_dist.config.load import load_config
from acpo_dist.core.errors import LONGEST, AcpoError, DataError
from acpo_dist.data.images import read_images, real_images
from acpo_dist.data.pairs import PairSet
from acpo_dist.data.prompts import load_prompts
from acpo_dist.tracking.jsonl import mend_last_line, read_metrics, truncate_after
from acpo_dist.workers.learner.checkpoint import CheckpointStore, open_checkpoint
from acpo_dist.workers.reward.http_wire import decode_answer, decode_images, decode_sent, encode_images, encode_sent
from acpo_dist.workers.reward.wire import pack, unpack

SEED = 20


def spoil(content: bytes, draw: random.Random) -> bytes:
    """Content with a random cut, flipped bits, random bytes in it, or a part of it twice."""
    kind, at = draw.randrange(5), draw.randrange(len(content) + 1)
    if kind == 0:
        return content[:at]
    if kind == 1:
        data = bytearray(content)
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(data)
    if kind == 2:
        return content[:at] + draw.randbytes(draw.randint(1, 40)) + content[at:]
    if kind == 3:
        return content[:at] + content[at + draw.randint(1, 20) :]
    return content[:at] + content[max(0, at - 50) :]


def survives(read, content: bytes, draw: random.Random, times: int) -> int:
    """Read spoilt contents; every error must be one of ours with a short message. Returns how many were refused."""
    refused = 0
    for number in range(times):
        try:
            read(spoil(content, draw))
        except AcpoError as error:
            refused += 1
            assert 0 < len(str(error)) <= LONGEST, (number, str(error))
    return refused


def from_file(path: Path, read):
    def run(content: bytes) -> None:
        path.write_bytes(content)
        read(path)

    return run


def png(size: int = 24, seed: int = 0) -> bytes:
    return encoded("PNG", size, seed)


def encoded(kind: str, size: int = 24, seed: int = 0) -> bytes:
    stream = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def test_a_spoilt_configuration_file_is_refused_in_one_short_message_or_read(tmp_path):
    content = Path("configs/toy_sdxl.yaml").read_bytes()
    read = from_file(tmp_path / "run.yaml", load_config)
    assert survives(read, content, random.Random(SEED), 150) > 50


def test_random_bytes_as_a_configuration_file_are_refused(tmp_path):
    draw = random.Random(SEED)
    path = tmp_path / "run.yaml"
    for _ in range(300):
        path.write_bytes(draw.randbytes(draw.randint(1, 200)))
        with pytest.raises(AcpoError) as caught:
            load_config(path)
        assert len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize(
    "text", ["[" * 5000, "a: " * 2000, "- " * 3000, "&a [*a]", "a: &b {c: *b}", "!!python/object/apply:os.system [ls]",
             "? " * 3000, "{a: " * 3000, "&a a: *a", "'" * 999, "a:\n" + " " * 3000 + "b: 1"],
)  # fmt: skip
def test_a_deep_or_odd_yaml_file_is_refused_in_one_short_message(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(AcpoError) as caught:
        load_config(path)
    assert len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.txt", "a red circle\na blue square on a green ground\n"),
        ("prompts.csv", 'prompt,more\n"a red circle, small",1\n"a ""blue"" square",2\n'),
        ("prompts.tsv", "prompt\tmore\na red circle\t1\n"),
    ],
)
def test_a_spoilt_prompt_file_is_refused_in_one_short_message_or_read(name, text, encoding, tmp_path):
    read = from_file(tmp_path / name, lambda path: load_prompts(str(path), "prompt"))
    survives(read, text.encode(encoding), random.Random(SEED), 150)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "3", "{"])
def test_a_line_of_json_that_is_deep_or_no_object_is_refused_in_one_short_message(line, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(DataError, match="line 2") as caught:
        load_prompts(str(tmp_path / "prompts.jsonl"), "prompt")
    assert len(str(caught.value)) <= LONGEST


def pair_table() -> pa.Table:
    images = [png(16, seed) for seed in range(4)]
    return pa.table(
        {"jpg_0": images, "jpg_1": images[::-1], "label_0": [1.0, 0.0, 0.5, 1.0], "caption": ["a", "b", "c", "d"]}
    )


def test_a_spoilt_parquet_file_of_pairs_is_refused_in_one_short_message_or_read(tmp_path):
    path = tmp_path / "pairs.parquet"
    pq.write_table(pair_table(), path)

    def read(file: Path) -> None:
        pairs = PairSet(file, size=16)
        pairs.read(pairs.index().sample_pairs(iteration=0, count=2, run_seed=0))

    assert survives(from_file(path, read), path.read_bytes(), random.Random(SEED), 400) > 100


def test_a_spoilt_parquet_file_of_images_is_refused_in_one_short_message_or_read(tmp_path):
    path = tmp_path / "images.parquet"
    pq.write_table(pa.table({"image": [png(16, seed) for seed in range(4)]}), path)
    read = from_file(path, lambda file: real_images(file, size=16))
    assert survives(read, path.read_bytes(), random.Random(SEED), 400) > 100


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "TGA", "PPM", "JPEG2000"])
def test_a_spoilt_image_is_refused_in_one_short_message_or_decoded(kind, tmp_path):
    read = from_file(tmp_path / f"image.{kind.lower()}", lambda file: list(read_images([file])))
    survives(read, encoded(kind), random.Random(SEED), 100)


def test_a_spoilt_zip_archive_is_refused_in_one_short_message_or_read(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for seed in range(3):
            archive.writestr(f"folder/{seed}.png", png(16, seed))
    read = from_file(path, lambda file: real_images(file, size=16))
    assert survives(read, path.read_bytes(), random.Random(SEED), 400) > 100


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    found = CheckpointStore(tmp_path / "checkpoints", keep=3)
    for iteration in (1, 2):
        partial = found.prepare(iteration)
        save_file({"w": torch.arange(12.0)}, partial / "learner" / "policy.safetensors")
        found.commit(partial, iteration, {"version": iteration, "guard": {"state": {"best": [0, 0.0]}}})
    return found


def test_no_spoilt_file_of_a_checkpoint_is_taken_for_whole(store, tmp_path):
    draw = random.Random(SEED)
    newest = tmp_path / "checkpoints" / "000002"
    for name in ("manifest.json", "state.json", "learner/policy.safetensors"):
        whole = (newest / name).read_bytes()
        for _ in range(150):
            (newest / name).write_bytes(spoilt := spoil(whole, draw))
            try:
                found = open_checkpoint(newest)
            except AcpoError as error:
                assert len(str(error)) <= LONGEST
                assert store.newest().iteration == 1
                continue
            # White space of the manifest alone may differ.
            assert spoilt == whole or name == "manifest.json"
            assert found.iteration == 2 and found.state["version"] == 2
            assert found.bundle().tensors["w"].equal(torch.arange(12.0))
        (newest / name).write_bytes(whole)
    assert store.newest().iteration == 2


@pytest.mark.parametrize(
    "manifest", ["[]", "{}", '{"files": []}', '{"files": {}}', '{"files": null}', '{"files": {"state.json": 3}}',
                 '{"files": {"../000001/state.json": "0"}}', "[" * 5000, '"text"', "3"],
)  # fmt: skip
def test_a_manifest_with_other_content_is_no_checkpoint(manifest, store, tmp_path):
    (tmp_path / "checkpoints" / "000002" / "manifest.json").write_text(manifest)
    assert store.newest().iteration == 1


def test_spoilt_metrics_are_read_up_to_what_is_whole_and_never_doubled(tmp_path):
    rows = [{"iteration": index, "reward/mean": index / 3} for index in range(6)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    draw, path = random.Random(SEED), tmp_path / "metrics.jsonl"
    for _ in range(100):
        path.write_bytes(spoil(content, draw))
        mend_last_line(path)
        truncate_after(path, 4)
        kept = [row["iteration"] for row in read_metrics(path)]
        assert all(index < 4 for index in kept)


def test_a_spoilt_resolved_configuration_is_refused_in_one_short_message_or_continued(tmp_path):
    from acpo_dist.config.load import dump
    from acpo_dist.training.run_folder import open_run

    config = load_config("toy_sdxl", [f"run.dir={tmp_path / 'run'}"])
    (tmp_path / "run").mkdir()
    read = from_file(tmp_path / "run" / "resolved.yaml", lambda _: open_run(config, "auto"))
    assert survives(read, dump(config).encode(), random.Random(SEED), 60) > 20


def test_a_spoilt_lora_file_is_refused_in_one_short_message_or_read(tmp_path):
    from types import SimpleNamespace

    from acpo_dist.models.lora_files import check_lora_file

    path = tmp_path / "lora.safetensors"
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file({f"{stem}.lora_A.weight": torch.zeros(2, 32), f"{stem}.lora_B.weight": torch.zeros(8, 2)}, path)
    unet = SimpleNamespace(config={"cross_attention_dim": 32})
    read = from_file(path, lambda file: check_lora_file(file, unet))
    assert survives(read, path.read_bytes(), random.Random(SEED), 600) > 200


@pytest.mark.parametrize("parts", [
    {"lora_A.weight": (2, 32), "lora_B.weight": (8, 2), "alpha": ()},
    {"lokr_w1": (2, 4), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 8), "alpha": ()},
    {"hada_w1_a": (8, 2), "hada_w1_b": (2, 32), "hada_w2_a": (8, 2), "hada_w2_b": (2, 32)},
])  # fmt: skip
def test_a_spoilt_file_of_layers_to_merge_is_refused_in_one_short_message_or_read(parts, tmp_path):
    from acpo_dist.models.lora_reading import read_lora

    path = tmp_path / "lora.safetensors"
    save_file({f"unet.conv_in.{name}": torch.ones(shape) for name, shape in parts.items()}, path)
    read = from_file(path, lambda file: read_lora(file, {"unet": {"conv_in": (8, 32)}}, {}, key="model.loras"))
    assert survives(read, path.read_bytes(), random.Random(SEED), 300) > 50


@pytest.mark.parametrize("said", [{"lora_alpha": "two"}, {"lora_alpha": [2]}, {"lora_alpha": math.inf}])
def test_an_alpha_beside_a_lora_file_that_is_no_finite_number_is_refused_in_one_short_message(said, tmp_path):
    from acpo_dist.models.lora_reading import read_lora

    parts = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.ones(8, 2)}
    save_file({f"unet.conv_in.{name}": value for name, value in parts.items()}, tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    read = partial(read_lora, tmp_path / "lora.safetensors", {"unet": {"conv_in": (8, 32)}}, {}, key="model.loras")
    with pytest.raises(AcpoError, match=r"alpha") as caught:
        read()
    assert len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize("alpha", [torch.tensor(math.nan), torch.tensor(math.inf), torch.ones(3)])
def test_an_alpha_in_a_lora_file_that_is_no_finite_number_is_refused_in_one_short_message(alpha, tmp_path):
    from acpo_dist.models.lora_reading import read_lora

    parts = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.ones(8, 2), "alpha": alpha}
    save_file({f"unet.conv_in.{name}": value for name, value in parts.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(AcpoError, match=r"alpha") as caught:
        read_lora(tmp_path / "lora.safetensors", {"unet": {"conv_in": (8, 32)}}, {}, key="model.loras")
    assert len(str(caught.value)) <= LONGEST


def vrg_file(path: Path) -> None:
    """An error table and a trajectory on the linear schedule, in the form that the file's name says."""
    from acpo_dist.training.trajectory.artefact import LINEAR_DDPM, table_to_mapping
    from acpo_dist.vrg.table import ErrorTable

    steps = np.arange(100, 1000, 90)
    levels = LINEAR_DDPM[steps]
    if path.name == "table.txt":
        rows = zip(steps, levels, strict=True)
        path.write_text("".join(f"{step}\t{level:.6f}\t{step / 1000:.8f}\n" for step, level in rows))
    elif path.name == "trajectory.txt":
        path.write_text(
            "# steps: 3\n# order: 1\n" + "".join(f"{level:.6f}\n" for level in (0.9999, *levels[[0, 4, 8]]))
        )
    else:
        table = ErrorTable(sigmas=np.sqrt(1 / levels - 1), v=steps / 1000)
        late = steps[[8, 4, 0]]
        trajectory = {"timesteps": late.tolist(), "alpha_bars": [*LINEAR_DDPM[late].tolist(), 1.0]}
        path.write_text(json.dumps({"trajectory": trajectory, "table": table_to_mapping(table)}, indent=2))


@pytest.mark.parametrize("name", ["vrg.json", "table.txt", "trajectory.txt"])
def test_a_spoilt_trajectory_or_error_table_is_refused_in_one_short_message_or_read(name, tmp_path):
    from acpo_dist.training.trajectory.artefact import LINEAR_DDPM, read_schedule, read_table

    path = tmp_path / name
    vrg_file(path)

    def read(file: Path) -> None:
        if name != "trajectory.txt":
            read_table(file)
        if name != "table.txt":
            read_schedule(file, LINEAR_DDPM)

    read(path)
    survives(from_file(path, read), path.read_bytes(), random.Random(SEED), 200)


@pytest.mark.parametrize("what", ["score", "gradient"])
def test_a_spoilt_body_of_a_request_is_refused_in_one_short_message_or_decoded_finite(what):
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).reshape(2, 3, 8, 8)
    body = (
        encode_images(images, ("a", "b"))
        if what == "score"
        else encode_sent(pack(torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8), "float16"), ("a", "b"))
    )

    def read(content: bytes) -> None:
        if what == "score":
            decode_images(content)
        else:
            assert torch.isfinite(unpack(decode_sent(content)[0])).all()

    assert survives(read, body, random.Random(SEED), 600) > 200


def test_random_bytes_as_a_body_are_refused():
    draw = random.Random(SEED)
    for _ in range(300):
        body = draw.randbytes(draw.randint(0, 200))
        # A small length of the header, so that what follows is parsed too.
        body = draw.choice([body, bytes([draw.randrange(60), *[0] * 7]) + body])
        for read in (decode_images, decode_sent, decode_answer):
            with pytest.raises(AcpoError) as caught:
                read(body)
            assert len(str(caught.value)) <= LONGEST


def test_a_body_with_deeply_nested_prompts_is_refused():
    from safetensors.torch import save

    body = save({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, metadata={"prompts": "[" * 100_000})
    with pytest.raises(AcpoError) as caught:
        decode_images(body)
    assert len(str(caught.value)) <= LONGEST
