"""Prompts of files, and their seeded order over iterations."""

import logging
from collections import Counter

import pytest
import torch

from acpo_dist.core.errors import DataError
from acpo_dist.data.prompts import load_prompts, sample_prompts
from acpo_dist.data.toy.world import captions
from tests.helpers.data import shared


def ids_of(groups) -> list[str]:
    return [sample.sample_id for group in groups for sample in group.samples]


def seeds_of(groups) -> list[int]:
    return [sample.seed for group in groups for sample in group.samples]


# Prompts from files


def test_toy_prompts_are_the_captions_of_the_world():
    assert load_prompts("toy", "prompt") == captions()


def test_no_prompts_is_one_empty_prompt():
    assert load_prompts("none", "prompt") == ("",)


def test_a_text_file_gives_one_prompt_per_line_without_the_blank_ones(tmp_path, caplog):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat, sitting\n\n  a dog \r\n   \nein Hündchen".encode())
    with caplog.at_level(logging.INFO):
        assert load_prompts(str(path), "ignored") == ("a cat, sitting", "a dog", "ein Hündchen")
    assert "2 blank prompts dropped, 3 kept" in caplog.text


@pytest.mark.parametrize("column", ["Prompt", "prompt", "PROMPT"])
def test_a_csv_column_is_found_in_any_case(tmp_path, column):
    path = tmp_path / "prompts.csv"
    path.write_text('id, Prompt,note\n1,"a cat, sitting",x\n2,,x\n3,"two\nlines",x\n')
    assert load_prompts(str(path), column) == ("a cat, sitting", "two\nlines")


def test_the_exact_column_wins_over_one_in_another_case(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("PROMPT,prompt\nwrong,right\n")
    assert load_prompts(str(path), "prompt") == ("right",)


def test_tsv_prompts_keep_their_quotes(tmp_path):
    path = tmp_path / "prompts.tsv"
    path.write_text('Prompt\tNote\n"PEACE" painted on a wall\tx\nan "unclosed quote\tx\n')
    assert load_prompts(str(path), "prompt") == ('"PEACE" painted on a wall', 'an "unclosed quote')


def test_parti_prompts_arrive_complete_and_verbatim():
    prompts = load_prompts(str(shared("PartiPrompts.tsv")), "prompt")
    assert len(prompts) == 1632
    assert sum(prompt.startswith('"G I G G L E" painted') for prompt in prompts) == 1


def test_drawbench_prompts_arrive_complete():
    prompts = load_prompts(str(shared("drawbench.csv")), "prompt")
    assert len(prompts) == 200
    assert prompts[0] == "A red colored car."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "no such file"),
        ("empty.txt", b"\n  \n", "holds no prompt"),
        ("empty.csv", b"", "is empty"),
        ("only_header.csv", b"prompt\n", "holds no prompt"),
        ("other.csv", b"text,category\na,b\n", "no column `prompt`. Columns found: text, category"),
        ("comma.csv", b"prompt\na cat, sitting\n", "line 2: 2 cells, the header has 1"),
        ("quote.csv", b'prompt\n"never closed\na dog\n', "cannot be read"),
        ("latin1.txt", "Hündchen".encode("latin-1"), "cannot be read"),
        ("prompts.json", b"[]", "expected a .txt, .csv, .tsv, .jsonl or .parquet file"),
    ],
)
def test_a_prompt_file_that_cannot_serve_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"data\.prompt") as caught:
        load_prompts(str(tmp_path / name), "prompt")
    assert message in str(caught.value)
    assert name in str(caught.value)


# Sampling


def test_sampling_prompts_twice_gives_the_same_groups():
    one, two = (
        sample_prompts(captions(), iteration=7, run_seed=3, num_prompts=5, samples_per_prompt=2) for _ in range(2)
    )
    assert one == two


def test_every_prompt_is_used_once_per_pass_across_iterations():
    prompts = tuple("abcdefg")
    used = [
        group.prompt_id
        for iteration in range(14)
        for group in sample_prompts(prompts, iteration=iteration, run_seed=1, num_prompts=3, samples_per_prompt=1)
    ]
    passes = [used[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(each) == list(range(7)) for each in passes)
    assert len({tuple(each) for each in passes}) > 1, "every pass has the same order"


def test_an_iteration_may_be_longer_than_the_prompt_list():
    groups = sample_prompts(("a", "b", "c"), iteration=2, run_seed=0, num_prompts=7, samples_per_prompt=2)
    counts = Counter(group.prompt_id for group in groups)
    assert sorted(counts.values()) in ([2, 2, 3], [1, 3, 3])
    assert len(set(ids_of(groups))) == len(set(seeds_of(groups))) == 14


def test_negative_iterations_continue_the_passes_backwards():
    used = [
        group.prompt_id
        for iteration in range(-6, 0)
        for group in sample_prompts(tuple("abcd"), iteration=iteration, run_seed=1, num_prompts=2, samples_per_prompt=1)
    ]
    assert [sorted(used[start : start + 4]) for start in (0, 4, 8)] == [[0, 1, 2, 3]] * 3


def test_a_group_names_its_prompt_in_every_sample():
    groups = sample_prompts(captions(), iteration=12, run_seed=0, num_prompts=4, samples_per_prompt=3)
    assert [len(group.samples) for group in groups] == [3] * 4
    for group in groups:
        assert group.prompt == captions()[group.prompt_id]
        assert {(sample.prompt, sample.prompt_id) for sample in group.samples} == {(group.prompt, group.prompt_id)}
    assert ids_of(groups)[4] == "000012-0001-1"


def test_no_sample_id_or_seed_is_shared_between_iterations_and_streams():
    sampled = [
        sample_prompts(("a", "b"), iteration=iteration, run_seed=0, num_prompts=3, samples_per_prompt=4, stream=stream)
        for stream in ("train", "calibration", "evaluation")
        for iteration in (-12, -1, 0, 1, 12)
    ]
    ids = [sample_id for groups in sampled for sample_id in ids_of(groups)]
    seeds = [seed for groups in sampled for seed in seeds_of(groups)]
    assert len(set(ids)) == len(set(seeds)) == len(ids) == 15 * 12


def test_another_run_seed_changes_the_order_and_every_noise_seed():
    one, two = (
        sample_prompts(captions(), iteration=0, run_seed=seed, num_prompts=48, samples_per_prompt=1) for seed in (0, 1)
    )
    assert [group.prompt_id for group in one] != [group.prompt_id for group in two]
    assert not set(seeds_of(one)) & set(seeds_of(two))


def test_sampling_prompts_never_changes_the_global_generator():
    before = torch.get_rng_state()
    sample_prompts(captions(), iteration=0, run_seed=0, num_prompts=4, samples_per_prompt=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "wrong",
    [{"num_prompts": 0}, {"samples_per_prompt": 0}, {"stream": "a-b"}, {"stream": ""}, {"prompts": ()}],
    ids=str,
)
def test_sampling_no_prompts_or_from_an_ambiguous_stream_is_refused(wrong):
    arguments = {"iteration": 0, "run_seed": 0, "num_prompts": 1, "samples_per_prompt": 1, **wrong}
    with pytest.raises(ValueError, match=r"nothing to sample|identifier"):
        sample_prompts(arguments.pop("prompts", ("a",)), **arguments)
