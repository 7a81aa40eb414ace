"""What docs/security.md promises: no code from files, no bombs, no paths out of a folder, no secrets in records."""

import io
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from acpo_dist.config.load import load_config
from acpo_dist.core.errors import LONGEST, AcpoError, ConfigError, DataError
from acpo_dist.data.decoding import decode_named
from acpo_dist.data.images import read_images
from acpo_dist.data.pair_making import ImagePair, ScoredImage, write_pairs
from acpo_dist.data.pairs import PairSet
from acpo_dist.data.prompts import load_prompts
from acpo_dist.evaluation.suites.suite import load_suite
from acpo_dist.rewards.training.correspondence import read_captioned
from tests.conftest import TINY
from tests.helpers.secrets import PLANTED, SECRETS, files_with

ROOT = Path(__file__).resolve().parents[2]


def huge_png(side: int) -> bytes:
    """A PNG of a few bytes whose header announces side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


def small_png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("side", [12_000, 60_000, 2**30])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_announces_too_many_pixels_is_refused_before_they_are_decoded(side, tmp_path):
    (tmp_path / "bomb.png").write_bytes(huge_png(side))
    with pytest.raises(DataError, match=r"bomb\.png cannot be read") as caught:
        list(read_images([tmp_path / "bomb.png"]))
    assert len(str(caught.value)) <= LONGEST
    with pytest.raises(DataError):
        decode_named(huge_png(side), "bomb.png")


def test_an_entry_of_an_archive_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(2**16))
    content = bytearray(path.read_bytes())
    # The size in the central directory, as an archive of four gigabytes of zeros has it.
    at = content.index(b"PK\x01\x02") + 24
    content[at : at + 4] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"entry bomb\.png .*4096 MiB unpacked"):
        list(read_images([path]))


def test_an_entry_that_unpacks_to_more_than_it_announces_is_read_no_further(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(2**28 + 1))
    content = bytearray(path.read_bytes())
    for start, field in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = content.index(start) + field
        content[at : at + 4] = struct.pack("<I", 64)
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"entry bomb\.png"):
        list(read_images([path]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24


@pytest.fixture(scope="module")
def packed_texts(tmp_path_factory):
    """Write a parquet file of a few kilobytes whose one text has more than 256 MiB, once for each column's name."""

    @cache
    def written(name: str) -> Path:
        path = tmp_path_factory.mktemp(name) / "bomb.parquet"
        cells = {"jpg_0": pa.array([small_png()]), "jpg_1": pa.array([small_png()]), "label_0": pa.array([1.0])}
        pq.write_table(pa.table({**cells, name: pa.array(["a" * (2**28 + 1)])}), path, compression="zstd",
                       use_dictionary=False)  # fmt: skip
        return path

    return written


@pytest.mark.parametrize("read", ["data.prompts", "--suite", "data.pairs", "acpo rewards train"])
def test_a_column_of_texts_that_unpacks_to_many_times_its_size_is_refused(read, packed_texts):
    path = packed_texts("caption" if read == "data.pairs" else "prompt")
    with pytest.raises(DataError, match="unpacks from"):
        if read == "data.prompts":
            load_prompts(str(path), column="prompt")
        elif read == "--suite":
            load_suite(str(path), prompt_column="prompt")
        elif read == "data.pairs":
            PairSet(path, size=8)
        else:
            read_captioned(path, column="jpg_0", prompt_column="prompt", most=1)


def test_a_table_of_pairs_puts_no_file_but_images_into_the_pairs(tmp_path):
    (tmp_path / "key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    (tmp_path / "a.png").write_bytes(small_png())
    scored = [ScoredImage(path=tmp_path / name, prompt="a", scores={"s": 1.0}) for name in ("a.png", "key")]
    with pytest.raises(DataError, match="key cannot be read as an image"):
        write_pairs(tmp_path / "pairs.parquet", [ImagePair(winner=scored[0], loser=scored[1])])
    assert not (tmp_path / "pairs.parquet").exists()


@pytest.mark.parametrize("name", ["outside.png", "../outside.png", "/etc/hostname"])
def test_a_pair_that_names_a_file_instead_of_holding_its_bytes_is_a_broken_pair(name, tmp_path):
    (tmp_path / "outside.png").write_bytes(small_png())
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = {key: pa.array([{"bytes": None, "path": name}], kind) for key in ("jpg_0", "jpg_1")}
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({**cells, "label_0": pa.array([1.0]), "caption": pa.array(["a"])}), path)
    assert PairSet(path, size=8).read(["pair:0:w"]).broken == ["pair:0:w"]


@pytest.mark.parametrize("column", ["image", "jpg_0"])
def test_a_column_that_unpacks_to_many_times_its_size_is_refused(column, tmp_path):
    path = tmp_path / "bomb.parquet"
    cells = {name: pa.array([small_png()]) for name in ("jpg_0", "jpg_1")}
    table = cells | {"label_0": pa.array([1.0]), "caption": pa.array(["a"]), column: pa.array([bytes(2**28 + 1)])}
    pq.write_table(pa.table(table), path, compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match="unpacks from"):
        list(read_images([path])) if column == "image" else PairSet(path, size=8)


@pytest.mark.parametrize("name", ["../outside.png", "/etc/hostname", "folder/../../outside.png", "link/outside.png"])
def test_a_row_that_names_a_file_outside_the_folder_of_its_parquet_file_is_refused(name, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside.png").write_bytes(small_png())
    (inside / "link").symlink_to(tmp_path)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array([{"bytes": None, "path": name}], kind)}), inside / "p.parquet")
    with pytest.raises(DataError, match="not in the folder"):
        list(read_images([inside / "p.parquet"]))


def test_a_few_lines_of_yaml_that_stand_for_billions_of_values_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 10)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="values") as caught:
        load_config(tmp_path / "bomb.yaml")
    assert len(str(caught.value)) <= LONGEST


def sources() -> list[Path]:
    return [path for root in ("acpo_dist", "actors") for path in sorted((ROOT / root).rglob("*.py"))]


CODE = (
    r"pickle\.loads?\(", r"allow_pickle\s*=\s*True", r"torch\.load\((?!.*weights_only=True)",
    r"trust_remote_code\s*=\s*True", r"\bjoblib\b", r"\bdill\b", r"shell\s*=\s*True", r"(?<![\w.])(eval|exec)\(",
    r"yaml\.(unsafe_|full_)?load\((?!text, _Loader)", r"os\.system\(", r"extractall\(",
)  # fmt: skip
"""Calls that run code which a file or a request brings."""


@pytest.mark.parametrize("pattern", CODE)
def test_no_source_file_reads_code_from_data(pattern):
    found = [f"{path.relative_to(ROOT)}: {line.strip()}" for path in sources()
             for line in path.read_text(encoding="utf-8").splitlines() if re.search(pattern, line)]  # fmt: skip
    assert found == []


class Payload:
    """Would run a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("exit 3",)


@pytest.mark.parametrize("name", ["policy.safetensors", "ema.safetensors", "optimizer.safetensors"])
def test_a_pickle_in_place_of_weights_is_not_unpickled(name, tmp_path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    torch.save({"w": Payload()}, tmp_path / name)
    with pytest.raises(SafetensorError):
        load_file(tmp_path / name)


def test_a_password_in_a_configured_address_is_refused_and_not_repeated():
    uri = f"tracking.mlflow_uri=http://user:{PLANTED}@host"
    for overrides in ([uri], [uri, "run.iteration=3"], ["run.iterations=x", uri]):
        with pytest.raises(AcpoError) as caught:
            load_config("toy_sdxl", overrides)
        assert PLANTED not in str(caught.value)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD"):
        load_config("toy_sdxl", [uri])


def test_no_secret_of_the_environment_reaches_the_output_or_any_file_of_a_run(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", "from acpo_dist.cli import main; main()", "train", "toy_sdxl", "--json", *TINY]
    done = subprocess.run(
        [*command, "tracking.mlflow=true", "run.iterations=1", f"run.dir={folder}"], capture_output=True, text=True,
        timeout=600, env={**os.environ, **SECRETS, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "NO_PROXY": "*"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "127.0.0.1:9" in done.stderr and PLANTED not in done.stderr + done.stdout
    # The spool holds every record that is meant for MLflow.
    assert (folder / "mlflow" / "pending.jsonl").stat().st_size > 0
    assert files_with(PLANTED, folder) == []


@pytest.mark.parametrize("page", ["security.md", "reliability.md"])
def test_every_test_that_a_page_names_exists(page):
    named = re.findall(r"`((?:tests|benchmarks)/[\w/.]+)`", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_a_local_cluster_has_no_dashboard_and_ray_gives_it_a_token():
    pytest.importorskip("ray", reason="needs the extra `ray`")
    program = (
        "import ray\nfrom actors.cluster import connect\nfound = {}\n"
        "connect.ray.init = lambda **given: found.update(given)\nconnect.join('local')\n"
        "from ray._private.authentication import authentication_token_setup as token\n"
        "assert found['include_dashboard'] is False and token.enable_token_auth_by_default()\n"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    subprocess.run([sys.executable, "-c", program], env=variables, check=True, timeout=300)
