"""Prompt, label and score files are read in all common encodings and with all common separators."""

import codecs

import pytest

from acpo_dist.core.errors import DataError
from acpo_dist.data.pair_making import read_scores
from acpo_dist.data.prompts import load_prompts
from acpo_dist.data.tables import read_lines, read_table
from acpo_dist.evaluation.suites.suite import load_suite
from acpo_dist.rewards.training.labels import csv_rows

TEXT = 'prompt;mos;path\r\nein Bär, groß;3.5;a.png\r\n"two; parts";1.25;b.png\r\n'
ENCODINGS = {
    "utf-8": TEXT.encode(),
    "utf-8 with BOM": TEXT.encode("utf-8-sig"),
    "utf-16 little endian": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "utf-16 big endian": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-16 without BOM": TEXT.encode("utf-16-le"),
    "utf-32": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
}


@pytest.fixture(params=ENCODINGS)
def table(request, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(ENCODINGS[request.param])
    return path


def test_every_reader_takes_every_encoding_and_semicolons(table):
    assert load_prompts(str(table), "prompt") == ("ein Bär, groß", "two; parts")
    assert [entry.prompt for entry in load_suite(str(table)).prompts] == ["ein Bär, groß", "two; parts"]
    assert [row["mos"] for row in csv_rows(table, ("path", "mos"))] == ["3.5", "1.25"]
    assert [image.scores["mos"] for image in read_scores(table, table.parent, [], "prompt")] == [3.5, 1.25]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_of_a_text_file_are_the_same_in_every_encoding(tmp_path, encoding):
    path = tmp_path / "prompts.txt"
    path.write_bytes("a cat\r\nein Bär\u2028 groß\n".encode(encoding))
    assert read_lines(path) == ["a cat", "ein Bär\u2028 groß"]


@pytest.mark.parametrize(
    ("text", "header", "cells"),
    [
        ("a,b\n1;2,3\n", ("a", "b"), ("1;2", "3")),
        ("a\tb\n1,5\t2\n", ("a", "b"), ("1,5", "2")),
        ("sep=;\na;b\n1,5;2\n", ("a", "b"), ("1,5", "2")),
        ('prompt\n"a, b"\n', ("prompt",), ("a, b",)),
        ("a,b\n\n1\n", ("a", "b"), ("1", "")),
    ],
)
def test_the_separator_is_the_most_frequent_one_of_the_header(tmp_path, text, header, cells):
    path = tmp_path / "table.csv"
    path.write_text(text)
    table = read_table(path)
    assert (table.header, table.rows[0].cells) == (header, cells)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "empty"),
        (b"a,b\n1,2,3\n", "line 2"),
        (b'a,b\n1,2\n"x,3\n', "line 3"),
        (b"prompt\n\xff\xfe\xfd\n", "UTF-8"),
    ],
)
def test_a_broken_table_is_refused_with_its_line(tmp_path, raw, named):
    path = tmp_path / "table.csv"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=named):
        read_table(path)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path)
