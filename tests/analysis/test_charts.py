"""Axes, ticks and colours: what a reader takes from the charts without reading numbers."""

import itertools
import math
import struct
import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moesaic.analysis import _activation, _charts, _colours


def test_lightness_grows_with_every_level():
    light = [_colours.luminance(level) for level in range(_colours.LEVELS)]
    assert all(b > a * 1.03 for a, b in itertools.pairwise(light))


@pytest.mark.parametrize("level", range(_colours.LEVELS))
def test_text_on_every_colour_is_readable(level):
    light = _colours.luminance(level)
    dark = _colours.text_colour(level) == "#000"
    contrast = (light + 0.05) / 0.05 if dark else 1.05 / (light + 0.05)
    assert contrast >= 4.5
    assert dark or level < _colours.FIRST_BRIGHT


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200))
def test_scale_covers_its_values(values):
    scale = _colours.scale_for(values, trim=0.0)
    assert 0 <= scale.low <= min(values) + 1e-9
    assert max(values) - 1e-9 <= scale.high <= 1
    assert scale.low < scale.high
    levels = [scale.level(v) for v in sorted(values)]
    assert levels == sorted(levels)


def test_one_outlier_does_not_flatten_the_scale():
    values = [0.6 + 0.001 * i for i in range(99)] + [0.0]
    assert _colours.scale_for(values) == _colours.Scale(low=0.6, high=0.7)


def test_picture_is_a_png_with_those_levels():
    image = _colours.png([[0, 31, None], [5, 5, 5]])
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", image[16:24]) == (3, 2)
    start = image.index(b"IDAT")
    size = struct.unpack(">I", image[start - 4 : start])[0]
    pixels = zlib.decompress(image[start + 4 : start + 4 + size])
    assert pixels == bytes([0, 0, 31, 32, 0, 5, 5, 5])


@given(
    low=st.floats(-1e6, 1e6),
    span=st.floats(0, 1e6),
    log=st.booleans(),
)
@example(low=100000.42228292476, span=1e-05, log=False)
def test_ticks_lie_inside_the_axis_in_order(low, span, log):
    axis = _charts.axis_for([low, low + span], allow_log=log)
    ticks = [tick.at for tick in _charts.ticks_for(axis, str)]
    assert 2 <= len(ticks) <= 12
    assert ticks == sorted(set(ticks))
    assert ticks[0] >= -0.1
    assert ticks[-1] <= 100.1


def test_wide_ranges_are_logarithmic_where_allowed():
    assert _charts.axis_for([1, 20], allow_log=True).log
    assert not _charts.axis_for([1, 4], allow_log=True).log
    assert not _charts.axis_for([1, 20]).log


def test_points_that_are_not_finite_are_dropped():
    points = _charts.Points(name="a", x=[0, 1, 2], y=[1, math.nan, 3], titles=["", "", ""])
    chart = _charts.line_chart(
        [points], title="t", x_title="x", y_title="y", write_x=str, write_y=str
    )
    assert len(chart.series[0].marks) == 2
    nothing = _charts.Points(name="a", x=[0], y=[math.inf], titles=[""])
    assert (
        _charts.line_chart([nothing], title="t", x_title="x", y_title="y", write_x=str, write_y=str)
        is None
    )


def test_names_never_cover_another_point():
    near = [
        _charts.Points(name=name, x=[x], y=[y], titles=[""], line=False)
        for name, x, y in (("alone", 0.1, 9.0), ("left", 0.5, 1.0), ("right", 0.52, 1.0))
    ]
    chart = _charts.line_chart(near, title="t", x_title="x", y_title="y", write_x=str, write_y=str)
    labels = [s.marks[0].label for s in _charts.label_points(chart).series]
    assert labels == ["alone", "left", ""]


def test_thin_keeps_the_mean():
    values, size = _charts.thin([float(i) for i in range(1000)], limit=100)
    assert (len(values), size) == (100, 10)
    assert values[0] == 4.5
    assert _charts.thin([1.0, 2.0]) == ([1.0, 2.0], 1)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", " the"),
        ("    ", "\u00b7\u00b7\u00b7\u00b7"),
        ("\n", "\u21b5"),
        ("\n\n", "\u21b5\n\u21b5"),
        ("\n    x", "\u21b5\n    x"),
        ("\t", "\u2192\t"),
        ("", "\u2205"),
        ("\x00a", "\ufffda"),
    ],
)
def test_whitespace_is_made_visible(text, shown):
    assert _activation.visible(text) == shown
