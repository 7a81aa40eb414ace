"""Console output and image files of a run."""

import io
import math

import pytest
import rich.console
import torch
from PIL import Image

from acpo_dist.tracking.console import Console
from acpo_dist.tracking.images import GAP, save_curves, save_grid

# Console


def console_on(stream, **options):
    return Console(rich_console=rich.console.Console(file=stream, **options))


def test_the_line_of_an_iteration_shows_the_selected_metrics_only_on_stderr(capsys):
    metrics = {"time/iteration": 12.345, "reward/musiq/mean": 0.123456, "reward/musiq/std": 9.0, "drift/rms": math.nan}
    Console().iteration(7, 100, metrics | {"judge/nr/mean": 2e-7, "learner/loss": 1.0})
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "iteration   7/100  reward/musiq/mean 0.1235  judge/nr/mean 2e-07  drift/rms nan  time/iteration 12.3 s\n"
    )


def test_without_a_terminal_a_phase_shows_nothing():
    stream = io.StringIO()
    with console_on(stream).phase("rollout", 4) as advance:
        advance(4)
    assert stream.getvalue() == ""


def test_on_a_terminal_a_phase_shows_count_and_name_and_survives_nesting_and_errors():
    stream = io.StringIO()
    console = console_on(stream, force_terminal=True, width=100)
    with pytest.raises(RuntimeError, match="boom"), console.phase("rollout", 4) as advance:
        with console.phase("decode", None) as inner:
            inner(1)
        advance(3)
        console.message("[not markup]")
        raise RuntimeError("boom")
    with console.phase("learn", 2) as advance:
        advance(2)
    shown = stream.getvalue()
    assert "rollout" in shown and "decode" in shown and "3/4" in shown and "2/2" in shown and "[not markup]" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 2, "the cursor is hidden and shown again"


def test_a_table_shows_every_cell_whole_and_checks_its_rows():
    stream = io.StringIO()
    console = console_on(stream, width=200)
    console.table("checks", ["what", "found"], [["folder", "/a" * 40], ["ratio", 0.123456]])
    assert "/a" * 40 in stream.getvalue() and "0.1235" in stream.getvalue()
    with pytest.raises(ValueError, match="2 columns, but a row with 1"):
        console.table("checks", ["what", "found"], [["folder"]])


def test_a_table_outside_a_terminal_has_one_line_per_row_at_any_width():
    stream = io.StringIO()
    console_on(stream, width=40).table("t", [f"column {i}" for i in range(12)], [[-0.0123456] * 12, [1234.5] * 12])
    lines = stream.getvalue().splitlines()
    assert any(line.count("-0.01235") == 12 for line in lines) and any(line.count("1234") == 12 for line in lines)


def test_a_quiet_console_prints_nothing(capsys):
    console = Console(quiet=True)
    console.message("x")
    console.table("t", ["a"], [["b"]])
    console.iteration(0, 1, {"drift/rms": 1.0})
    with console.phase("rollout", 1) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


# Images


def test_a_grid_has_gaps_and_enlarges_small_images_pixel_by_pixel(tmp_path):
    images = torch.randint(0, 256, (5, 3, 16, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_grid(images, tmp_path / "new" / "grid.png", 3)
    with Image.open(tmp_path / "new" / "grid.png") as grid:
        assert grid.size == (3 * 128 + 2 * GAP, 2 * 64 + GAP)
        assert grid.getpixel((128, 0)) == (255, 255, 255)
        x, y = 128 + GAP + 4 * 31 + 3, 64 + GAP + 4 * 15 + 3
        assert grid.getpixel((x, y)) == tuple(images[4, :, 15, 31].tolist())


@pytest.mark.parametrize(
    ("shape", "columns", "scale", "size"),
    [
        ((2, 3, 100, 64), 8, None, (2 * 64 + GAP, 100)),
        ((1, 1, 8, 8), 1, 3, (24, 24)),
        ((1, 3, 48, 48), 1, None, (96, 96)),
    ],
    ids=["large enough, fewer than columns", "grey, given scale", "scale is whole"],
)
def test_a_grid_has_the_size_of_its_images(tmp_path, shape, columns, scale, size):
    save_grid(torch.zeros(shape, dtype=torch.uint8), tmp_path / "grid.png", columns, scale=scale)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == size


def test_labels_and_title_are_drawn_beside_the_images(tmp_path):
    images = torch.zeros((4, 3, 64, 64), dtype=torch.uint8)
    save_grid(images, tmp_path / "grid.png", 2, labels=["base", "iteration 100"], title="a red square")
    with Image.open(tmp_path / "grid.png") as grid:
        width, height = grid.size
        left, top = width - (2 * 64 + GAP), height - (2 * 64 + GAP)
        assert left > 60 and top > 15
        for box in [(0, top, left, top + 64), (0, top + 64 + GAP, left, height), (0, 0, width, top)]:
            assert grid.crop(box).convert("L").getextrema()[0] < 128, "there is ink"
        assert grid.crop((left, top, left + 64, top + 64)).convert("L").getextrema() == (0, 0)


def test_a_grid_refuses_what_it_cannot_show(tmp_path):
    images = torch.zeros((4, 3, 8, 8), dtype=torch.uint8)
    with pytest.raises(ValueError, match="make 2 rows, but there are 3 labels"):
        save_grid(images, tmp_path / "x.png", 2, labels=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"uint8 .* found torch.float32"):
        save_grid(images.float(), tmp_path / "x.png", 2)
    with pytest.raises(ValueError, match="needs at least one image"):
        save_grid(images[:0], tmp_path / "x.png", 2)


def test_curves_are_drawn_with_gaps_and_without_unknown_names(tmp_path):
    rows = [{"iteration": i, "a": i / 3, "b": None if i == 2 else 1.0} for i in range(5)] + [{"iteration": 5}]
    panels = {"both": ["a", "b", "unknown"], "empty": ["unknown"], "third": ["a"]}
    save_curves(rows, panels, tmp_path / "new" / "curves.png")
    with Image.open(tmp_path / "new" / "curves.png") as image:
        assert image.size == (2 * 768, 2 * 432)
        assert len(set(image.convert("RGB").reduce(2).get_flattened_data())) > 10
    with pytest.raises(ValueError, match="at least one panel"):
        save_curves(rows, {}, tmp_path / "x.png")
