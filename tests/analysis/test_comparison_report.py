"""A comparison in words, as a table and as a page: who wins, how surely, and who is not ranked."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import Page

from moesaic._errors import InputError
from moesaic.analysis import Comparison, Pair, comparison_markdown, render_comparison, verdicts
from moesaic.analysis.comparison import entries, pareto, ranked
from moesaic.analysis.comparison_page import pareto_chart

KINDS = {"dsmoe": "convert", "flap": "compress", "wanda": "compress", "oracle": "bound"}


def line(method, active, ratio, *, seed=0, trained=False, measured=None, half=0.05, **options):
    return {
        "method": method,
        "active": active,
        "seed": seed,
        "trained": trained,
        "status": "done",
        "kind": KINDS[method],
        "static": KINDS[method] == "compress",
        "quality": {
            "domains": {"docs": {"perplexity": 10 * ratio}, "code": {"perplexity": 5 * ratio}},
            "ratio": ratio,
            "ratio_low": ratio - half,
            "ratio_high": ratio + half,
        },
        "cost": {
            "active_ffn_fraction": active if measured is None else measured,
            "active_parameters": 1e8,
        },
        "seconds": {"conversion": 4.0, "evaluation": 2.0, "total": 9.0},
        "peak_bytes": 2_000_000_000,
        "machine": {"cpu": "a processor"},
        "versions": {"moesaic": "0.1.0", "commit": "abc"},
    } | options


def failed(method, active, status, reason, **options):
    return {
        "method": method,
        "active": active,
        "seed": 0,
        "trained": False,
        "status": status,
        "reason": reason,
        "kind": KINDS[method],
        "static": False,
        "seconds": {},
    } | options


def compared(*lines, budgets=(0.5,), trained=(False,)):
    protocol = {
        "model": "a <model>",
        "budgets": list(budgets),
        "trained": list(trained),
        "train": {"tokens": 32768},
        "methods": {one["method"]: {one["kind"]: one["method"]} for one in lines},
    }
    return Comparison(protocol=protocol, lines=lines)


def test_a_clear_winner_and_the_best_static_method():
    lines = [line("dsmoe", 0.5, 1.23, half=0.03), line("flap", 0.5, 1.6), line("wanda", 0.5, 1.4)]
    assert verdicts(compared(*lines)) == [
        "At 0.5 active without training, dsmoe is best: 1.23 (1.20-1.26); the best static method "
        "is wanda: 1.40 (1.35-1.45)."
    ]


def test_a_static_winner_is_said_to_be_static():
    lines = [line("dsmoe", 0.5, 1.8, trained=True), line("flap", 0.5, 1.3, trained=True)]
    assert verdicts(compared(*lines, trained=(True,))) == [
        "At 0.5 active after training on 32,768 tokens, flap is best: 1.30 (1.25-1.35); it is "
        "static, the same weights serve every token."
    ]


def test_overlapping_intervals_settle_nothing():
    lines = [line("dsmoe", 0.5, 1.3), line("flap", 0.5, 1.38), line("wanda", 0.5, 1.5)]
    assert verdicts(compared(*lines)) == [
        "At 0.5 active without training, dsmoe is ahead, 1.30 (1.25-1.35), but not on enough "
        "documents for it to be settled against flap 1.38 (1.33-1.43); the best static method is "
        "flap."
    ]


@pytest.mark.parametrize(("low", "settled"), [(1.001, True), (1.0, False), (0.97, False)])
def test_the_same_documents_settle_what_overlapping_intervals_do_not(low, settled):
    lines = [line("dsmoe", 0.5, 1.3), line("flap", 0.5, 1.38)]
    pair = Pair(method="dsmoe", other="flap", budget=0.5, trained=False, low=low)
    (sentence,) = verdicts(replace(compared(*lines), pairs=[pair]))
    assert ("dsmoe is best: 1.30" in sentence) == settled
    assert ("settled against flap" in sentence) == (not settled)
    table = comparison_markdown(replace(compared(*lines), pairs=[pair]))
    assert ("| **1.38 (1.33-1.43)** |" in table) == (not settled)
    # A pair at another budget, or after training, says nothing of this one.
    for other in (replace(pair, budget=0.75), replace(pair, trained=True)):
        assert "not on enough documents" in verdicts(replace(compared(*lines), pairs=[other]))[0]


def test_intervals_that_are_apart_do_not_settle_what_the_documents_do_not():
    lines = [line("dsmoe", 0.5, 1.1), line("flap", 0.5, 1.4)]
    pair = Pair(method="dsmoe", other="flap", budget=0.5, trained=False, low=0.99)
    assert "not on enough documents" in verdicts(replace(compared(*lines), pairs=[pair]))[0]


def test_a_bound_never_wins():
    lines = [line("oracle", 0.5, 1.01), line("dsmoe", 0.5, 1.5)]
    comparison = compared(*lines)
    assert verdicts(comparison) == [
        "At 0.5 active without training, only dsmoe was measured: 1.50 (1.45-1.55)."
    ]
    text = comparison_markdown(comparison)
    assert "| **1.01" not in text
    assert text.index("| bound | 0.5 active |") > text.index("| dsmoe |")
    assert pareto(entries(comparison), False)[0].method == "dsmoe"


@pytest.mark.parametrize(("measured", "counts"), [(0.52, True), (0.48, True), (0.521, False)])
def test_what_is_off_its_budget_is_marked_and_not_ranked(measured, counts):
    lines = [line("dsmoe", 0.5, 1.1, measured=measured), line("flap", 0.5, 1.4)]
    comparison = compared(*lines)
    order = [entry.method for entry in ranked(entries(comparison), 0.5, False)]
    assert order == (["dsmoe", "flap"] if counts else ["flap"])
    text = comparison_markdown(comparison)
    assert ("1.10 (1.05-1.15) at 0.521, not ranked" in text) == (not counts)
    assert ("not ranked</small>" in render_comparison(comparison)) == (not counts)


def test_one_seed_off_its_budget_takes_the_method_out():
    lines = [line("dsmoe", 0.5, 1.1), line("dsmoe", 0.5, 1.1, seed=1, measured=0.6)]
    assert ranked(entries(compared(*lines)), 0.5, False) == []
    assert verdicts(compared(*lines)) == [
        "At 0.5 active without training no method was measured within 0.02 of the budget."
    ]


def test_seeds_are_one_entry_whose_interval_holds_them_all():
    # sqrt(1.0 * 1.44) = 1.2; from the lowest low to the highest high.
    lines = [line("dsmoe", 0.5, 1.0), line("dsmoe", 0.5, 1.44, seed=1)]
    (entry,) = entries(compared(*lines))
    assert entry.ratio.value == pytest.approx(1.2)
    assert (entry.ratio.low, entry.ratio.high) == pytest.approx((0.95, 1.49))
    assert entry.seeds == 2
    assert entry.domains == pytest.approx({"docs": 12.0, "code": 6.0})
    assert entry.seconds["conversion"] == 4.0


def test_markdown_is_a_table():
    lines = [
        line("dsmoe", 0.75, 1.1),
        line("dsmoe", 0.5, 1.3),
        line("flap", 0.75, 1.5),
        failed("flap", 0.5, "refused", "active must be at least 0.6, got 0.5; raise it"),
        failed("wanda", 0.75, "error", "RuntimeError: no"),
    ]
    text = comparison_markdown(compared(*lines, budgets=(0.75, 0.5)))
    rows = [one for one in text.splitlines() if one.startswith("|")]
    assert rows == [
        "| method | 0.75 active | 0.5 active |",
        "| --- | --- | --- |",
        "| dsmoe | **1.10 (1.05-1.15)** | **1.30 (1.25-1.35)** |",
        "| flap (static) | 1.50 (1.45-1.55) | refused |",
        "| wanda | failed | - |",
    ]
    assert "- flap at 0.5: active must be at least 0.6, got 0.5; raise it" in text
    assert "- wanda at 0.75: RuntimeError: no" in text


def test_a_failed_seed_is_told_beside_those_that_are_done():
    lines = [line("dsmoe", 0.5, 1.2), failed("dsmoe", 0.5, "error", "it broke", seed=1)]
    comparison = compared(*lines)
    (entry,) = entries(comparison)
    assert (entry.status, entry.seeds, entry.reason) == ("done", 1, "it broke")
    assert "it broke" in comparison_markdown(comparison)
    assert "one of the seeds failed. it broke" in render_comparison(comparison)


def test_the_page_holds_the_numbers_and_nothing_runs():
    lines = [
        line("dsmoe", 0.75, 1.1),
        line("dsmoe", 0.5, 1.3),
        line("flap", 0.75, 1.6),
        line("flap", 0.5, 40.0, half=2.0),
        line("oracle", 0.5, 1.01),
        failed("wanda", 0.5, "error", "<script>alert(1)</script>"),
    ]
    html = render_comparison(compared(*lines, budgets=(0.75, 0.5)))
    page = Page(html)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "a &lt;model&gt;" in html
    (header, *rows) = page.tables["free-table"]
    assert [cell["text"] for cell in header] == ["method", "0.75 active", "0.5 active"]
    assert [cell["value"] for cell in rows[0][1:]] == pytest.approx([1.1, 1.3])
    assert [row[0]["text"] for row in rows] == ["dsmoe", "flapstatic", "wanda"]
    bounds = page.tables["free-bounds"][1]
    assert "value" not in bounds[1]
    assert bounds[2]["value"] == pytest.approx(1.01)
    assert {"free", "details", "missing", "protocol"} <= set(page.ids)
    assert html.count('class="best"') == 2
    assert "(logarithmic)" in html
    assert "2.00 GB" in html


def test_the_chart_shows_every_point_and_the_front():
    lines = [
        line("dsmoe", 0.75, 1.1, measured=0.70),
        line("dsmoe", 0.5, 1.5),
        line("flap", 0.75, 1.2),
        line("flap", 0.5, 1.4),
        line("oracle", 0.5, 1.05),
    ]
    found = entries(compared(*lines, budgets=(0.75, 0.5)))
    assert [(e.method, e.budget) for e in pareto(found, False)] == [("flap", 0.5), ("dsmoe", 0.75)]
    chart = pareto_chart(found, False)
    assert [s.name for s in chart.series] == ["Pareto front", "dsmoe", "flap", "oracle (bound)"]
    assert [len(s.marks) for s in chart.series] == [2, 2, 2, 1]
    assert len({(s.colour, s.shape) for s in chart.series}) == 4
    assert all(0 <= mark.y <= 100 for s in chart.series for mark in s.marks)
    assert pareto_chart(found, True) is None


def test_lines_of_several_machines_and_commits_say_so():
    other = {"machine": {"cpu": "another"}, "versions": {"moesaic": "0.1.0", "commit": "def"}}
    lines = [line("dsmoe", 0.5, 1.2), line("flap", 0.5, 1.4), line("wanda", 0.5, 1.5, **other)]
    page = Page(render_comparison(compared(*lines)))
    text = " ".join(page.text)
    assert "abc, def" in text
    assert ("Machine 1" in text, "Machine 2" in text, "Machine 3" in text) == (True, True, False)


def test_budgets_and_states_of_a_methods_own():
    lines = [
        line("dsmoe", 0.5, 1.3),
        line("dsmoe", 0.5, 1.1, trained=True),
        line("flap", 0.75, 1.4),
        line("oracle", 1.0, 1.0),
    ]
    comparison = compared(*lines, trained=(False, True))
    methods = comparison.protocol["methods"]
    methods["flap"] |= {"budgets": [0.75], "trained": [False]}
    methods["oracle"] |= {"budgets": [1.0], "trained": [False]}
    asked = [(e.method, e.budget, e.trained, e.status) for e in entries(comparison)]
    assert asked == [
        ("dsmoe", 0.5, False, "done"),
        ("flap", 0.75, False, "done"),
        ("oracle", 1.0, False, "done"),
        ("dsmoe", 0.5, True, "done"),
    ]
    text = comparison_markdown(comparison)
    assert [row for row in text.splitlines() if row.startswith("|")] == [
        "| method | 0.5 active | 0.75 active |",
        "| --- | --- | --- |",
        "| dsmoe | **1.30 (1.25-1.35)** |  |",
        "| flap (static) |  | **1.40 (1.35-1.45)** |",
        "| bound | 1 active |",
        "| --- | --- |",
        "| oracle | 1.00 (0.95-1.05) |",
        "| method | 0.5 active |",
        "| --- | --- |",
        "| dsmoe | **1.10 (1.05-1.15)** |",
    ]
    # No sentence about a budget that only a bound has.
    assert [sentence.partition(",")[0] for sentence in verdicts(comparison)] == [
        "At 0.5 active without training",
        "At 0.75 active without training",
        "At 0.5 active after training on 32",
    ]
    rows = Page(render_comparison(comparison)).tables["free-table"]
    assert [cell["text"] for cell in rows[2]] == ["flapstatic", "", "1.40x1.35-1.45"]


def scores(acc, half):
    return {"last-word-docs": {"acc": acc, "acc_low": acc - half, "acc_high": acc + half}}


def test_accuracy_stands_beside_the_ratio_and_the_dense_parent():
    # The mean of two seeds is 0.6, from the lowest low to the highest high.
    lines = [
        line("dsmoe", 0.5, 1.2, accuracy=scores(0.5, 0.125)),
        line("dsmoe", 0.5, 1.2, seed=1, accuracy=scores(0.75, 0.125)),
        line("oracle", 0.5, 1.01, accuracy=scores(0.75, 0.125)),
        line("flap", 0.5, 1.4),
    ]
    dense = {
        "quality": {"domains": {"docs": {"perplexity": 10}, "code": {"perplexity": 5}}},
        "cost": {"active_parameters": 2e8},
        "accuracy": scores(0.875, 0.0625),
    }
    comparison = replace(compared(*lines), dense=dense)
    table = comparison_markdown(comparison).partition("### Accuracy on questions\n\n")[2]
    assert table.splitlines()[:5] == [
        "| method | active |  | perplexity ratio | last-word-docs |",
        "| --- | --- | --- | --- | --- |",
        "| dense parent | 1 |  | 1.00 | 87.5% (81.2%-93.8%) |",
        "| dsmoe | 0.5 |  | 1.20 (1.15-1.25) | 62.5% (37.5%-87.5%) |",
        "| oracle (bound) | 0.5 |  | 1.01 (0.96-1.06) | 75.0% (62.5%-87.5%) |",
    ]
    header, *rows = Page(render_comparison(comparison)).tables["details-table"]
    place = [cell["text"] for cell in header].index("last-word-docs")
    shown = {row[0]["text"]: row[place] for row in rows}
    assert [shown[name].get("value") for name in ("dense", "dsmoe", "oraclebound")] == [
        0.875,
        0.625,
        0.75,
    ]
    assert shown["dsmoe"]["text"] == "62.5%37.5%-87.5%"
    assert shown["flap"]["text"] == "-"
    assert rows[1][5]["text"] == "1.20x1.15-1.25"


def test_questions_of_several_files_are_counted_together():
    def of(right, count):
        return {"acc": right / count, "acc_low": 0.0, "acc_high": 1.0, "questions": count}

    lines = [
        line("dsmoe", 0.5, 1.2, accuracy={"a": of(10, 40), "b": of(45, 60)}),
        line("dsmoe", 0.5, 1.2, seed=1, accuracy={"a": of(5, 40), "b": of(45, 60)}),
        line("flap", 0.5, 1.4, accuracy={"a": of(0, 40), "b": of(0, 60)}),
    ]
    table = comparison_markdown(compared(*lines)).partition("### Accuracy on questions\n\n")[2]
    header, _, *rows = table.splitlines()[:4]
    assert header == "| method | active |  | perplexity ratio | all | a | b |"
    # Wilson's ends for 55, 50 and 0 of 100, from tables.
    assert "| 52.5% (40.4%-64.4%) |" in rows[0]
    assert "| 0% (0%-3.7%) | 0% (0%-100%) |" in rows[1]


def test_without_questions_there_is_no_table_of_accuracy():
    assert "Accuracy" not in comparison_markdown(compared(line("flap", 0.5, 1.4)))


def test_no_result_at_all_is_a_page_too():
    comparison = Comparison(
        protocol={"model": "m", "budgets": [0.5], "trained": [False], "methods": {"flap": {}}},
        lines=[],
    )
    assert "No cell was measured yet." in render_comparison(comparison)
    assert comparison_markdown(comparison) == "No cell was measured yet.\n"


def test_a_wrong_number_is_named():
    broken = line("flap", 0.5, 1.2)
    broken["quality"]["ratio"] = "much"
    with pytest.raises(InputError, match="'ratio' in the evaluation record must be a number"):
        render_comparison(compared(broken))


RATIOS = st.lists(st.floats(1.0, 50.0), min_size=2, max_size=3)


@given(RATIOS, st.floats(0.001, 2.0))
def test_the_winner_has_the_lowest_ratio_and_is_best_only_if_nothing_overlaps(ratios, half):
    names = ["dsmoe", "flap", "wanda"][: len(ratios)]
    lines = [line(n, 0.5, r, half=half) for n, r in zip(names, ratios, strict=True)]
    (sentence,) = verdicts(compared(*lines))
    best = names[ratios.index(min(ratios))]
    second = sorted(ratios)[1]
    assert f", {best} is " in sentence
    clear = second - half > min(ratios) + half
    assert (" is best" in sentence) == clear
    assert json.dumps(sentence)
