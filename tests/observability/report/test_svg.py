import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.observability.report.run import duration, short, trailing_mean
from slime.observability.report.svg import Line, line_chart, ticks, y_range

FINITE = st.floats(min_value=-1e12, max_value=1e12, allow_nan=False)


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 1.0, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(3.0, 38.0, 4) == [10.0, 20.0, 30.0]
    assert ticks(-0.05, 0.05, 2) == [-0.05, 0.0, 0.05]


@given(values=st.lists(FINITE, min_size=1, max_size=20), unit=st.booleans())
def test_the_range_holds_every_value_and_has_ticks(values: list[float], unit: bool):
    low, high = y_range(values, unit_interval=unit)
    assert low < high
    assert low <= min(values) and max(values) <= high


@given(ys=st.lists(FINITE | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=600))
def test_any_series_with_a_finite_value_is_drawn_inside_the_picture(ys: list[float]):
    ys = [*ys, 1.0]
    svg = line_chart([Line("a", range(len(ys)), ys)], width=350, height=170, x_label="step")
    assert "nan" not in svg and "inf" not in svg
    for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", svg):
        assert 0 <= float(x) <= 350 and 0 <= float(y) <= 170


def test_a_gap_of_nan_breaks_the_line():
    ys = [0.0, 1.0, math.nan, 1.0, 0.0]
    svg = line_chart([Line("a", range(5), ys)], width=350, height=170, x_label="step")
    assert svg.count('<path class="line') == 2


def test_the_trailing_mean_equals_a_plain_loop_and_skips_nan():
    values = [1.0, 2.0, math.nan, 4.0, 5.0]
    assert trailing_mean(values, 2) == [1.0, 1.5, 2.0, 4.0, 4.5]
    assert math.isnan(trailing_mean([math.nan], 3)[0])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.4124, "0.412"), (4.657, "4.66"), (38.21, "38.2"), (1840.2, "1,840"), (52341.0, "52.3k")]
    + [(2.5e6, "2.50M"), (5e-7, "5e-7"), (-0.0012, "-0.001"), (100.0, "100"), (math.inf, "inf")],
)
def test_numbers_are_short(value: float, text: str):
    assert short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.44, "8.44 s"), (95.0, "1 min 35 s"), (3700.0, "1 h 2 min"), (7199.0, "2 h 0 min")]
)
def test_durations_are_readable(seconds: float, text: str):
    assert duration(seconds) == text
