"""The page of training health: what it shows of a history, and which files it refuses."""

import base64
import json
import re
import zlib

import pytest
from test_report import Page

from moesaic._errors import InputError
from moesaic.analysis import health_summary, read_health, render_health
from moesaic.analysis.health import layer_maps
from moesaic.cli.main import main


def line(step, *layers, warnings=()):
    return {
        "step": step,
        "steps": 1,
        "tokens": sum(layers[0][1]) // 2,
        "layers": [
            {"name": name, "tokens": 8, "counts": counts, "entropy": entropy, "saturation": 0.25}
            for name, counts, entropy in layers
        ],
        "warnings": list(warnings),
    }


SENTENCE = "layers.1 <b>: expert 3 is dead; do something"
LINES = [
    line(1, ("layers.0", [4, 4, 4, 4], 0.9), ("layers.1", [16, 0, 0, 0], 0.5)),
    line(
        2,
        ("layers.0", [4, 4, 4, 4], 0.8),
        ("layers.1", [8, 8, 0, 0], None),
        warnings=[{"kind": "dead", "layer": "layers.1", "sentence": SENTENCE}],
    ),
]


def pixels(picture):
    """Read the palette indices back out of a picture that `_colours.png` wrote."""
    data = base64.b64decode(picture.partition(",")[2])
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    (packed,) = re.findall(rb"IDAT(.*?).{4}\x00\x00\x00\x00IEND", data, re.S)
    raw = zlib.decompress(packed)
    return [list(raw[y * (width + 1) + 1 : (y + 1) * (width + 1)]) for y in range(height)]


def test_maps_hold_loads_by_expert_and_step():
    even, skewed = layer_maps(LINES)
    # 4 times the mean and 2 times, on a scale of 32 levels that ends at 3 times.
    assert pixels(skewed.picture) == [[31, 21], [0, 21], [0, 0], [0, 0]]
    assert pixels(even.picture) == [[10, 10]] * 4
    assert (skewed.load, skewed.least, skewed.unused) == (3.0, 0.0, 2)
    assert skewed.entropy is None


def test_long_histories_are_summed_up():
    lines = [line(n + 1, ("layers.0", [n % 2, 1 - n % 2], 0.5)) for n in range(960)]
    (found,) = layer_maps(lines)
    assert found.num_columns == 240
    assert pixels(found.picture) == [[10] * 240] * 2
    assert [tick.label for tick in found.ticks][:2] == ["4", "124"]


def test_page_is_offline_and_escapes():
    html = render_health(LINES)
    page = Page(html)
    text = "".join(page.text)
    assert "1 warning in 2 steps" in text
    assert SENTENCE in text
    assert "<b>:" not in html
    assert "script" not in re.sub(r"default-src[^\"]*", "", html)
    assert not re.search(r"(src|href)=\"(?!#|data:)", html)


def test_summary_has_the_worst_of_the_last_line():
    summary = health_summary(LINES)
    assert summary["load"] == 2.0
    assert summary["dead"] == 2.0
    assert summary["entropy"] == 0.8
    assert summary["warnings"] == [SENTENCE]
    assert summary["tokens"] == 16


def test_command_draws_the_page(tmp_path, capsys):
    text = "".join(json.dumps(one) + "\n" for one in LINES)
    (tmp_path / "health.jsonl").write_text(text + '{"step": 3, "lay')
    output = tmp_path / "page.html"
    assert main(["report", "health", str(tmp_path), "--output", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    assert output.read_text() == render_health(LINES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no line yet"),
        ('{"loss": 1}\n', "line 1, is no line of training health"),
        (json.dumps(LINES[0] | {"layers": [{"name": "a", "counts": ["x"]}]}), "line 1, is no line"),
        ("{\n" + json.dumps(LINES[0]), "line 1, is no line"),
    ],
)
def test_other_files_are_refused(text, message, tmp_path):
    path = tmp_path / "health.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_health(path)
    path.unlink()
    with pytest.raises(InputError, match=r"health\.jsonl does not exist; train with"):
        read_health(tmp_path)
