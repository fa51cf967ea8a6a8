"""The main table in a terminal, and the numbers as people read them."""

import math

import pytest
from records import make_record
from rich.console import Console

from moesaic._errors import InputError
from moesaic.analysis import _format, summary_rows, summary_table


def printed(record, width):
    console = Console(width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(summary_table(record))
    return capture.get()


def test_rows_are_the_models_as_text():
    rows = summary_rows(make_record())
    assert [row["model"] for row in rows] == ["dense", "flap", "dsmoe"]
    assert len({tuple(row) for row in rows}) == 1
    assert rows[2]["kind"] == "dsmoe"
    assert rows[2]["ratio to dense"] == "1.21x (1.18-1.25)"
    assert rows[2]["active FFN"] == "63.8%"
    assert rows[2]["active parameters"] == "106M of 137M"
    assert rows[2]["router parameters"] == "2.76M"
    assert rows[2]["bytes"] == "538 MB"
    assert rows[2]["decode tokens/s"] == "51.7 (1.35x)"
    assert rows[0]["ratio to dense"] == "1.00x"


def test_numbers_nobody_measured_are_dashes_and_empty_columns_are_gone():
    record = make_record()
    del record["models"][1]["speed"]
    del record["models"][1]["quality"]["domains"]["docs"]
    for model in record["models"]:
        del model["cost"]["flops_per_token"]
    rows = summary_rows(record)
    assert rows[1]["decode tokens/s"] == "-"
    assert rows[1]["perplexity docs"] == "-"
    assert "FLOPs per token" not in rows[0]


def test_a_record_from_before_routers_were_counted_reads_as_it_did():
    record = make_record()
    now = summary_rows(record)
    for model in record["models"]:
        del model["cost"]["router_parameters"]
    for row, old in zip(now, summary_rows(record), strict=True):
        assert row.pop("router parameters") in ("0", "2.76M")
        assert old == row


def test_three_models_fit_a_terminal_of_80_columns():
    text = printed(make_record(), 80)
    assert max(map(len, text.splitlines())) <= 80
    for row in summary_rows(make_record()):
        for key, value in row.items():
            if key != "kind":
                assert value in text
    assert "\u2026" not in text


def test_many_models_get_a_line_each():
    record = make_record(domains=("docs",))
    record["models"] += [dict(record["models"][2], name=f"other [{i}]") for i in range(6)]
    lines = printed(record, 140).splitlines()
    for i in range(6):
        assert sum(f"other [{i}]" in line and "1.21x" in line for line in lines) == 1


def test_nothing_measured():
    record = {"schema": 1, "models": [{"name": "dense"}]}
    assert summary_rows(record) == [{"model": "dense", "kind": "unknown"}]
    assert "nothing measured" in printed(record, 80)


def test_a_record_of_another_schema_is_refused():
    with pytest.raises(InputError, match=r"has schema 3, this version reads schema 1"):
        summary_table({"schema": 3, "models": [{"name": "a"}]})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (11.6123, "11.6"),
        (9.996, "10.0"),
        (101.4, "101"),
        (12345.0, "12300"),
        (0.00123456, "0.00123"),
        (-2.5, "-2.50"),
        (1.5e12, "1.50e+12"),
        (math.inf, "inf"),
    ],
)
def test_significant(value, text):
    assert _format.significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (512, "512"),
        (38.24, "38.2"),
        (999.6, "1.00k"),
        (1000, "1.00k"),
        (999_600, "1.00M"),
        (134_515_008, "135M"),
        (7.2e9, "7.20G"),
        (3e21, "3000E"),
    ],
)
def test_scaled(value, text):
    assert _format.scaled(value) == text


def test_byte_size():
    assert [_format.byte_size(v) for v in (12, 4096, 269_030_016)] == ["12 B", "4.10 kB", "269 MB"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0%"), (0.638, "63.8%"), (1.0, "100%"), (0.0042, "0.42%"), (0.9997, "100%")],
)
def test_percent(value, text):
    assert _format.percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1.00x"), (0.026, "0.0260x"), (9.996, "10.0x"), (23.4, "23.4x")]
)
def test_multiple(value, text):
    assert _format.multiple(value) == text
