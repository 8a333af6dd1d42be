import math
import random
import re

import pytest

from megatron_prism.report import chart
from megatron_prism.report.curves import curve, of_lines, thin
from megatron_prism.report.scales import Axis, number, scale


def test_thinning_a_hundred_thousand_steps_keeps_every_peak_of_its_stretch_and_both_ends():
    draw = random.Random(0)
    points = [(float(step), draw.gauss(2.0, 0.1)) for step in range(100_000)]
    points[41_234] = (41_234.0, 9.0)
    points[77_777] = (77_777.0, -3.0)
    kept = thin(points, 600)
    assert len(kept) <= 600
    assert set(kept) <= set(points), "no value is made up"
    assert (points[0], points[-1]) == (kept[0], kept[-1])
    assert (41_234.0, 9.0) in kept and (77_777.0, -3.0) in kept
    assert kept == sorted(kept)


def test_a_short_curve_is_left_as_it_is():
    points = [(0.0, 1.0), (1.0, 5.0), (1.0, 4.0), (7.0, 2.0)]
    assert thin(points, 4) == points


def test_equal_places_are_thinned_too():
    assert len(thin([(1.0, float(step)) for step in range(50)], 10)) <= 10


def test_what_is_no_finite_number_is_left_out_and_counted():
    found = curve("loss", [(1, 2.0), (2, math.nan), (3, math.inf), (4, None), (5, 1.0)], 100)
    assert (found.points, found.strange, found.total) == ([(1.0, 2.0), (5.0, 1.0)], 2, 2)


def test_lines_without_the_key_or_the_place_are_left_out():
    lines = [{"step": 1, "loss": 3.0}, {"step": 2}, {"loss": 1.0}, {"step": 3, "loss": 2.0}]
    assert of_lines("run", lines, "loss", "step", 100, 10.0).points == [(1.0, 30.0), (3.0, 20.0)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0003, "3e-4"),
        (2.5e-7, "2.5e-7"),
        (0.00123, "0.00123"),
        (12.25, "12.2"),
        (999.9, "1k"),
        (1024, "1.02k"),
        (27e9, "27G"),
        (-1500, "-1.5k"),
    ],
)
def test_numbers_read_as_people_write_them(value, text):
    assert number(value) == text


def test_ticks_are_round_and_within_the_axis():
    axis = scale(Axis("loss"), [1.0, 9.0], 0, 100)
    assert [label for _, label in axis.ticks()] == ["2", "4", "6", "8"]
    assert [label for _, label in scale(Axis("rate", log=True), [1e-6, 1e-3], 0, 100).ticks()] == ["1e-6", "1e-5", "1e-4", "0.001"]
    assert [label for _, label in scale(Axis("layer", whole=True), [0, 1, 2], 0, 100).ticks()] == ["0", "1", "2"]
    assert [label for _, label in scale(Axis("norm", log=True), [0.2, 0.49], 0, 100).ticks()] == ["0.2", "0.3", "0.4", "0.5"]


def test_lines_are_told_apart_without_their_colour():
    """Each of sixteen has a dash and a mark that no other has together; the legend shows both."""
    text = chart.legend([f"run {number}" for number in range(16)])
    swatches = re.findall(r"<svg .*?</svg>", text)
    seen = {
        (re.search(r'stroke-dasharray="[^"]*"|$', one)[0], re.search(r'<(circle|path) class="mark"(?: d="M[\d.]+ [\d.]+([a-zA-Z]))?', one).groups())
        for one in swatches
    }
    assert len(swatches) == len(seen) == 16


def test_a_logarithm_of_zero_is_not_drawn():
    assert not scale(Axis("mismatch", log=True), [0.0, 1.0], 0, 100).log


@pytest.mark.parametrize("values", [[3.0, 3.0], [0.0], [-2.0, -2.0]])
def test_a_curve_of_one_value_has_an_axis(values):
    axis = scale(Axis("loss"), values, 0, 100)
    assert 0 < axis.place(values[0]) < 100


def test_counts_begin_at_zero_even_where_all_are_zero():
    axis = scale(Axis("prompts", from_zero=True), [0.0, 0.0], 100, 0)
    assert (axis.low, axis.place(0.0)) == (0.0, 100)
