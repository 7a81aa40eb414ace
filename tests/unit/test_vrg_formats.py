"""The published text files: read as described, written so that they read back, refused if broken."""

import numpy as np
import pytest

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.formats import (
    PublishedTrajectory,
    read_error_table,
    read_result,
    read_trajectory,
    write_error_table,
    write_result,
    write_trajectory,
)
from acpo_dist.vrg.levels import to_alpha_bars, to_sigmas
from acpo_dist.vrg.table import ErrorTable

TABLE_TEXT = """# dataset: x
#
# ts  	alpha_bar	MSE
   1	0.999900	0.50000000
  50	0.900000	0.20000000
 100	0.800000	0.15000000
 200	0.600000	0.10000000
 400	0.300000	0.05000000
 600	0.100000	0.01000000
 800	0.010000	0.00300000
 993	0.000046	0.00001800
 994	0.000046	0.00001600
1001	0.000000	0.00000000
# the last row (ts 1001) is a safeguard.
"""
TRAJECTORY_TEXT = """# order     : 2
# steps     : 3
# skip_type : logSNR
# data_type : alpha_bar
0.99989998
0.90000000 : 12
0.50000000
0.00004036
"""
RESULT_TEXT = """# old comments
# loss : 1.0
0.91000000 :    9: 0.910000; 0.090000*0.200000=0.018000; 0.018000/0.910000=0.019780
0.52000000 :   40: 0.571429; 0.0     *0.080000=0.0     ; 0.0     /0.520000=0.0
0.00006500 :  950: 0.000125; 0.900000*0.000018=0.000016; 0.000016/0.000065=0.249231
"""


@pytest.fixture
def write(tmp_path):
    def to_file(text: str, name: str = "file.txt"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return to_file


def test_comments_and_the_safeguard_row_are_no_nodes_and_ties_are_merged(write):
    table = read_error_table(write(TABLE_TEXT))
    assert len(table.sigmas) == 8
    np.testing.assert_allclose(table.alpha_bars, [0.9999, 0.9, 0.8, 0.6, 0.3, 0.1, 0.01, 0.000046], rtol=1e-12)
    assert table.v[-1] == pytest.approx(1.7e-5)
    assert table.timesteps is not None and table.timesteps[-1] == 993
    assert table.provenance["merged_rows"] == 1
    assert table.provenance["comments"][0] == "dataset: x"


def test_the_order_of_the_rows_does_not_matter(write):
    lines = TABLE_TEXT.splitlines()
    turned = "\n".join(reversed(lines))
    assert read_error_table(write(turned, "turned.txt")).hash == read_error_table(write(TABLE_TEXT)).hash


def test_an_error_table_is_written_as_it_was_published(write, tmp_path):
    table = read_error_table(write(TABLE_TEXT))
    write_error_table(tmp_path / "out.txt", table, comments=["dataset: x"])
    rows = [line for line in (tmp_path / "out.txt").read_text().splitlines() if not line.startswith("#")]
    published = [line for line in TABLE_TEXT.splitlines() if not line.startswith("#")]
    assert rows[:7] == published[:7]
    assert rows[7:] == [" 993\t0.000046\t0.00001700", " 994\t0.000000\t0.00000000"]
    assert read_error_table(tmp_path / "out.txt").hash == table.hash


def test_a_table_without_whole_timesteps_has_no_published_form(tmp_path):
    sigmas = np.geomspace(0.03, 14, 8)
    for timesteps in (None, np.arange(8) + 0.5):
        table = ErrorTable(sigmas=sigmas, v=1 / sigmas, timesteps=timesteps)
        with pytest.raises(VrgError, match="integer timestep"):
            write_error_table(tmp_path / "out.txt", table)


def test_a_trajectory_runs_from_noisy_to_clean_and_leaves_its_first_line_out(write):
    trajectory = read_trajectory(write(TRAJECTORY_TEXT))
    assert trajectory == PublishedTrajectory(
        alpha_bars=(0.00004036, 0.5, 0.9), alpha_bar_end=0.99989998, order=2, skip_type="logSNR"
    )
    np.testing.assert_allclose(trajectory.sigmas, [157.404, 1.0, 1 / 3], rtol=1e-5)


def test_a_trajectory_is_written_as_it_was_published(write, tmp_path):
    write_trajectory(tmp_path / "out.txt", read_trajectory(write(TRAJECTORY_TEXT)))
    assert (tmp_path / "out.txt").read_text() == TRAJECTORY_TEXT.replace(" : 12", "")


def test_only_the_first_column_of_a_result_counts(write):
    assert read_result(write(RESULT_TEXT)) == (0.000065, 0.52, 0.91)


def test_a_result_is_written_in_the_published_columns(write, tmp_path):
    table = read_error_table(write(TABLE_TEXT), interpolation="linear_alpha_bar")
    levels = (0.0001, 0.55, 0.85)
    write_result(tmp_path / "out.txt", levels, table, comments=["lp 0.01"])
    assert read_result(tmp_path / "out.txt") == levels
    first = (tmp_path / "out.txt").read_text().splitlines()[2]
    # alpha_1 = alpha_bar_1 = 0.85 lies half way between rows 1 and 2: v = 0.175; (sqrt(0.15) - 0)^2 = 0.15.
    assert first == "0.85000000 :    1: 0.850000; 0.150000*0.175000=0.026250; 0.026250/0.850000=0.030882"


BROKEN = {
    "words in a row": (read_error_table, TABLE_TEXT.replace("0.20000000", "much"), "line 5: expected 3 finite"),
    "two columns": (read_error_table, TABLE_TEXT.replace("\t0.20000000", ""), "line 5"),
    "nan": (read_error_table, TABLE_TEXT.replace("0.20000000", "nan"), "line 5"),
    "alpha_bar above 1": (read_error_table, TABLE_TEXT.replace("0.900000", "1.900000"), r"line 5: alpha_bar must lie"),
    "too few rows": (read_error_table, "\n".join(TABLE_TEXT.splitlines()[:9]), "at least 8 nodes"),
    "no rows": (read_error_table, "# nothing\n", "at least 8 nodes"),
    "levels that rise": (read_trajectory, TRAJECTORY_TEXT.replace("0.5", "0.95"), "decrease from clean to noisy"),
    "a level too many": (read_trajectory, TRAJECTORY_TEXT + "0.00001\n", "3 steps and should hold 4 levels"),
    "log-SNR data": (read_trajectory, TRAJECTORY_TEXT.replace("alpha_bar", "lambda"), "data_type alpha_bar"),
    "steps in words": (read_trajectory, TRAJECTORY_TEXT.replace(": 3", ": three"), "whole numbers"),
    "empty trajectory": (read_trajectory, "# steps : 0\n", "holds no levels"),
    "empty result": (read_result, "", "holds no levels"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_by_name_and_line(name: str, write):
    reader, text, words = BROKEN[name]
    path = write(text)
    with pytest.raises(VrgError, match=words) as refusal:
        reader(path)
    assert "at least 8" in words or str(path) in str(refusal.value)


@pytest.mark.parametrize("reader", [read_error_table, read_trajectory, read_result])
def test_a_file_that_is_not_there_or_not_text_is_refused(reader, tmp_path):
    with pytest.raises(VrgError, match=r"cannot read .*missing"):
        reader(tmp_path / "missing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(VrgError, match=r"cannot read .*binary"):
        reader(tmp_path / "binary")


def test_sigma_and_alpha_bar_are_inverse_to_each_other():
    levels = np.array([1e-5, 0.00466, 0.5, 0.9, 0.9999])
    np.testing.assert_allclose(to_alpha_bars(to_sigmas(levels)), levels, rtol=1e-12)
    assert to_sigmas(0.5) == 1.0
