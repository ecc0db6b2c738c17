"""Charts as text: points where they belong, breaks where there is no value, and names that cannot be markup."""

from __future__ import annotations

import html
import json
import math
import re

import numpy as np
import pytest

from hdovd.pipelines.common.pages import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Line,
    line_chart,
    matrix_chart,
    ticks,
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 0.33, [0, 0.1, 0.2, 0.3]),
        (50, 480, [100, 200, 300, 400]),
        (-2, 2, [-2, -1, 0, 1, 2]),
        (3, 17, [5, 10, 15]),
    ],
)
def test_ticks_are_round_numbers_within(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def _points(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())]
        for line in re.findall(r'points="([^"]*)"', svg)
    ]


def test_corners_of_the_range_are_corners_of_the_frame() -> None:
    (line,) = _points(line_chart("t", [Line("a", [0, 1], [0, 10])], Axis("x"), Axis("y")))
    assert line == [(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, TOP)]


def test_a_value_that_is_not_there_breaks_the_line_and_a_point_alone_is_a_dot() -> None:
    svg = line_chart("t", [Line("a", [0, 1, 2, 3, 4], [1, 2, None, math.nan, 5])], Axis("x"), Axis("y"))
    assert [len(line) for line in _points(svg)] == [2]
    assert svg.count("<circle") == 1


def test_a_chart_without_points_says_so() -> None:
    assert "nothing to show" in line_chart("t", [Line("a", [0.0], [None])], Axis("x"), Axis("y"))
    assert "nothing to show" in line_chart("t", [], Axis("x"), Axis("y"))


def test_a_flat_line_has_a_range() -> None:
    (line,) = _points(line_chart("t", [Line("a", [0, 1], [3, 3])], Axis("x"), Axis("y")))
    assert line[0][1] == line[1][1] == pytest.approx((TOP + HEIGHT - BOTTOM) / 2, abs=0.06)


def test_names_are_data_and_not_markup() -> None:
    name = '"><script>alert(1)</script>'
    chart = line_chart(name, [Line(name, [0, 1], [0, 1])], Axis(name), Axis("y"))
    matrix = matrix_chart(name, np.eye(2), [name, "b"], ["c", name], low=0, high=1)
    assert "<script>" not in chart + matrix
    data = json.loads(html.unescape(re.search(r'data-chart="([^"]*)"', chart)[1]))  # type: ignore[index]
    assert data["lines"][0]["name"] == name


def test_a_matrix_says_its_values_and_leaves_the_missing_blank() -> None:
    svg = matrix_chart("m", np.array([[0.25, np.nan], [0.5, 1.0]]), ["r", "s"], ["c", "d"], low=0, high=1, digits=3)
    data = json.loads(html.unescape(re.search(r'data-matrix="([^"]*)"', svg)[1]))  # type: ignore[index]
    assert data["values"] == [[0.25, None], [0.5, 1.0]]
    assert (data["rows"], data["columns"]) == (["r", "s"], ["c", "d"])
