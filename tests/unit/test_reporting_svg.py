"""Charts say what the figures are, in places that can be worked out by hand, in colours that can be read."""

import json
import re
from html import unescape

import pytest

from acpo_dist.analysis.report.heat import heat_map, ink_on, luminance, shade
from acpo_dist.analysis.report.svg import Limit, Series, Trail, line_chart, scatter_chart, ticks


def data_of(chart):
    return json.loads(unescape(re.search(r'data-chart="([^"]*)"', chart).group(1)))


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3, 7, [-2, 0, 2, 4, 6]), (95, 105, [96, 98, 100, 102, 104])],
)
def test_ticks_are_round_and_within_the_bounds(low, high, wanted):
    assert ticks(low, high) == pytest.approx(wanted)


def test_a_line_chart_carries_every_figure_and_leaves_gaps_open():
    series = [
        Series(name="a<b", points=[(0, 1.0), (1, None), (2, 3.0)], tone=0),
        Series(name="c", points=[(0, 2.0)], tone=1),
    ]
    chart = line_chart(series, x_label="iteration", y_label="y", limits=[Limit(name="stop", value=5.0)])
    data = data_of(chart)
    assert data["x"] == [0, 1, 2]
    assert data["series"] == [{"name": "a<b", "values": [1.0, None, 3.0]}, {"name": "c", "values": [2.0, None, None]}]
    assert chart.count("<polyline") == 3 and "a&lt;b" in chart and ">stop<" in chart


def test_points_lie_where_their_figures_say():
    chart = line_chart([Series(name="a", points=[(0, 0.0), (10, 1.0)], tone=0)], x_label="x", y_label="y")
    (x0, y0), (x1, y1) = (
        map(float, pair.split(",")) for pair in re.search(r'points="([^"]*)"', chart).group(1).split()
    )
    at = data_of(chart)["at"]
    assert x0 == pytest.approx(at[0], abs=0.1) and x1 == pytest.approx(at[1], abs=0.1) and x0 < x1 and y0 > y1


def test_long_curves_keep_real_figures_and_their_last_one():
    points = [(i, float(i * i)) for i in range(5001)]
    data = data_of(line_chart([Series(name="a", points=points, tone=0)], x_label="x", y_label="y"))
    assert len(data["x"]) <= 402 and data["x"][-1] == 5000
    assert all(value == x * x for x, value in zip(data["x"], data["series"][0]["values"], strict=True))


def test_a_scatter_chart_names_every_point():
    trail = Trail(name="run", points=[(0.1, 0.2, "first"), (0.2, 0.3, "second")], end=(0.3, 0.4, "end & all"), tone=2)
    chart = scatter_chart([trail], x_label="drift", y_label="gain", limits=[Limit(name="b", value=0.5, upright=True)])
    assert [text for text in re.findall("<title>([^<]*)", chart)] == ["first", "second", "end &amp; all"]


def test_charts_without_figures_say_so():
    assert "No figures" in line_chart([], x_label="x", y_label="y")
    assert "No figures" in scatter_chart([], x_label="x", y_label="y")
    assert "No drift" in heat_map(["1"], ["1"], [[None]], row_label="t", column_label="i", unit="u")


def test_a_heat_map_orders_by_lightness_and_writes_values_that_can_be_read():
    lightness = [luminance(shade(step / 50)) for step in range(51)]
    assert lightness == sorted(lightness)
    for step in range(51):
        ink = {"#000": 0.0, "#fff": 1.0}[ink_on(shade(step / 50))]
        low, high = sorted((ink, lightness[step]))
        assert (high + 0.05) / (low + 0.05) >= 4.5
    chart = heat_map(
        ["900", "20"], ["10", "20"], [[0.1, 0.2], [0.001, None]], row_label="t", column_label="i", unit="u"
    )
    assert [text for text in re.findall(r'class="cell"[^>]*>([^<]*)', chart)] == ["0.1", "0.2", "0.001"]
    assert "t 20, i 10: 0.001" in chart
