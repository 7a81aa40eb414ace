"""Suites: sources of prompts and categories, and seeds of samples."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acpo_dist.core.errors import DataError
from acpo_dist.evaluation.suites.suite import load_suite, sample_groups

ROWS = [("a cat", "Animals"), ('"PEACE", painted on a wall', "Text"), ("a dog", "Animals"), ("a hat", "Things")]


def write(folder, name: str):
    path = folder / name
    if name.endswith(".csv"):
        quoted = [f'"{prompt.replace(chr(34), chr(34) * 2)}",{category}' for prompt, category in ROWS]
        path.write_text("\n".join(["Prompt,Category", *quoted]) + "\n")
    elif name.endswith(".tsv"):
        path.write_text("\n".join(["Prompt\tCategory\tNote", *(f"{a}\t{b}\tx" for a, b in ROWS)]) + "\n")
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"prompt": [a for a, _ in ROWS], "category": [b for _, b in ROWS]}), path)
    else:
        path.write_text("\n".join(prompt for prompt, _ in ROWS) + "\n\n")
    return path


@pytest.mark.parametrize("name", ["own.csv", "own.tsv", "own.parquet"])
def test_a_table_gives_prompts_and_categories_with_their_quotes(tmp_path, name):
    suite = load_suite(str(write(tmp_path, name)))
    assert [(entry.prompt, entry.category) for entry in suite.prompts] == ROWS
    assert suite.name == "own" and suite.categories == ["Animals", "Text", "Things"]


def test_a_text_file_has_a_prompt_per_line_and_no_categories(tmp_path):
    suite = load_suite(str(write(tmp_path, "own.txt")))
    assert [entry.prompt for entry in suite.prompts] == [prompt for prompt, _ in ROWS]
    assert suite.categories == []


def test_a_limit_is_spread_over_the_whole_suite(tmp_path):
    suite = load_suite(str(write(tmp_path, "own.csv")), limit=2)
    assert [entry.prompt_id for entry in suite.prompts] == [0, 2] and suite.total == 4
    toy = load_suite("toy", limit=4)
    assert toy.categories == ["circle", "square", "triangle", "cross"]


def test_a_named_suite_is_found_in_the_data_folder_and_missed_with_instructions(tmp_path, monkeypatch):
    write(tmp_path, "PartiPrompts.tsv")
    monkeypatch.setenv("ACPO_DATA", f"{tmp_path / 'nowhere'}:{tmp_path}")
    assert [entry.prompt for entry in load_suite("parti").prompts] == [prompt for prompt, _ in ROWS]
    with pytest.raises(DataError, match=r"drawbench.csv.*is not in"):
        load_suite("drawbench")
    monkeypatch.delenv("ACPO_DATA")
    with pytest.raises(DataError, match=r"ACPO_DATA is unset.*Nothing is downloaded"):
        load_suite("parti")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prompt,category\n", "holds no prompt"),
        ("", "is empty"),
        ("text,category\na,b\n", "no column `prompt`.*Columns found: text, category"),
        ("prompt,category\na, b, c\n", "line 2: 3 cells"),
    ],
)
def test_a_file_that_is_no_suite_is_refused_with_the_reason(tmp_path, content, words):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=words):
        load_suite(str(path))


def test_an_unknown_suite_lists_the_known_ones():
    with pytest.raises(DataError, match=r"no such file.*drawbench, parti, toy, none"):
        load_suite("drawbeach")


def test_a_prompt_has_the_same_seeds_in_every_suite_and_samples_of_their_own(tmp_path):
    whole = load_suite(str(write(tmp_path, "own.csv")))
    part = load_suite(str(write(tmp_path, "own.txt")), limit=2)
    groups = {group.prompt: group for group in sample_groups(whole, samples_per_prompt=3, seed=0)}
    for group in sample_groups(part, samples_per_prompt=2, seed=0):
        same = groups[group.prompt].samples[:2]
        assert [plan.seed for plan in group.samples] == [plan.seed for plan in same]
    seeds = [plan.seed for group in groups.values() for plan in group.samples]
    assert len(set(seeds)) == len(seeds)
    other = sample_groups(whole, samples_per_prompt=3, seed=1)[0].samples[0].seed
    assert other not in seeds


def test_a_prompt_that_stands_twice_gets_two_samples():
    groups = sample_groups(load_suite("none", limit=5), samples_per_prompt=1, seed=0)
    assert len({group.samples[0].seed for group in groups}) == 5
