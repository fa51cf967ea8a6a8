"""What predictions come to in words, and how far they are off."""

import pytest

from moesaic.analysis import (
    Comparison,
    Prediction,
    Suggestion,
    advice,
    check_sentence,
    checks,
    render_comparison,
)
from moesaic.analysis.suggestion import forecasts, predictions_markdown

KINDS = {
    "dsmoe": "convert",
    "dsmoe-thresholds": "convert",
    "flap": "compress",
    "teal": "compress",
    "neuron-bound": "bound",
}


def suggestion(**ratios):
    """Ratios at 0.75, 0.5 and 0.25; `_` in a name stands for `-`."""
    budgets = (0.75, 0.5, 0.25)
    return Suggestion(
        conversion="dsmoe",
        budgets=budgets,
        predictions=tuple(
            Prediction(
                method=name.replace("_", "-"),
                kind=KINDS[name.replace("_", "-")],
                static=name == "flap",
                budget=budget,
                ratio=ratio,
                low=ratio and ratio * 0.9,
                high=ratio and ratio * 1.1,
                active=budget,
                blocks=6,
                reason="" if ratio else "it cannot",
            )
            for name, values in ratios.items()
            for budget, ratio in zip(budgets, values, strict=True)
        ),
    )


def test_thresholds_win_and_pruning_takes_over():
    said = advice(
        suggestion(
            dsmoe=[1.17, 1.9, 200.0],
            flap=[1.42, 9.7, 150.0],
            teal=[1.02, 1.25, 300.0],
            neuron_bound=[1.0, 1.0, 1.1],
        )
    )
    assert said == [
        "Without training, predicted to lose least: teal at 0.75 (2.0%) and 0.5 (25%); flap at "
        "0.25 (150 times the perplexity).",
        "dsmoe loses 17% at 0.75, 90% at 0.5 and 200 times the perplexity at 0.25: convert only "
        "if you will train, or take 0.75.",
        "Static pruning is predicted to lose no more, without a router: flap at 0.25 (150 times "
        "the perplexity).",
    ]


def test_a_conversion_that_can_be_used():
    assert advice(suggestion(dsmoe=[1.01, 1.08, 1.4], flap=[1.1, 1.2, 1.5]))[1:] == [
        "dsmoe can be used as it is at 0.5 (8.0%); it loses 40% at 0.25, so convert there only if "
        "you will train."
    ]
    assert advice(suggestion(dsmoe=[1.01, 1.02, 1.05]))[1:] == [
        "dsmoe can be used as it is at all of them, 5.0% at the lowest."
    ]


def test_what_thresholds_would_give():
    said = advice(suggestion(dsmoe=[1.09, 1.5, 20.0], dsmoe_thresholds=[1.02, 1.14, None]))
    assert said == [
        "Without training, predicted to lose least: dsmoe-thresholds at 0.75 (2.0%) and 0.5 (14%); "
        "dsmoe at 0.25 (20.0 times the perplexity).",
        "dsmoe can be used as it is at 0.75 (9.0%); it loses 50% at 0.5 and 20.0 times the "
        "perplexity at 0.25, so convert there only if you will train.",
        "With thresholds within its blocks, which save weights and on a CPU no time (--preset "
        "thresholds), it is predicted to lose 2.0% at 0.75 and 14% at 0.5.",
    ]


def test_a_conversion_that_is_lost():
    said = advice(suggestion(dsmoe=[3.0, 4.0, 5.0], flap=[1.5, 2.5, 6.0]))
    assert said[1].endswith("do not convert without training.")
    assert said[2].endswith("flap at 0.75 (50%) and 0.5 (2.50 times the perplexity).")


def test_one_budget_has_no_other_to_take():
    cells = tuple(p for p in suggestion(dsmoe=[1.1, 1.5, 2.0]).predictions if p.budget == 0.5)
    asked = Suggestion(conversion="dsmoe", budgets=(0.5,), predictions=cells)
    assert advice(asked)[1] == "dsmoe loses 50% at 0.5: convert only if you will train."


def test_what_is_off_its_budget_or_refused_is_not_compared():
    cells = suggestion(dsmoe=[1.1, 1.2, 1.3], teal=[None, None, None]).predictions
    off = Prediction(
        method="flap", kind="compress", budget=0.5, ratio=1.0, low=1.0, high=1.0, active=0.9
    )
    asked = Suggestion(conversion="dsmoe", budgets=(0.75, 0.5, 0.25), predictions=(*cells, off))
    assert [p.method for p in asked.at(0.5)] == ["dsmoe"]
    assert off.text() == "1.00 (1.00-1.00) at 0.90"
    assert asked.predictions[-2].text() == "-"
    none = Suggestion(conversion="dsmoe", budgets=(0.5,), predictions=(off,))
    assert advice(none) == ["No method meets a budget of 0.5 within 0.04."]


def line(method, active, ratio, *, trained=False, seed=0):
    return {
        "method": method,
        "active": active,
        "seed": seed,
        "trained": trained,
        "status": "done",
        "kind": "convert",
        "static": False,
        "quality": {"ratio": ratio, "ratio_low": ratio, "ratio_high": ratio, "domains": {}},
        "cost": {"active_ffn_fraction": active, "active_parameters": 1},
    }


def test_predictions_beside_results():
    protocol = {
        "budgets": [0.75, 0.5],
        "methods": {"dsmoe": {"convert": "dsmoe"}, "flap": {"compress": "flap"}},
        "trained": [False, True],
        "train": {"tokens": 1},
    }
    made = suggestion(dsmoe=[1.1, 1.6, 2.0], flap=[1.2, 3.0, 4.0]).predictions
    comparison = Comparison(
        protocol=protocol,
        lines=[
            # Two seeds: their geometric mean is 1.
            line("dsmoe", 0.75, 0.5),
            line("dsmoe", 0.75, 2.0, seed=1),
            line("dsmoe", 0.5, 2.0),
            line("flap", 0.5, 3.0),
            line("flap", 0.75, 1.0, trained=True),
        ],
        predictions=made,
    )
    found = checks(comparison)
    assert [(c.method, c.budget) for c in found] == [("dsmoe", 0.75), ("dsmoe", 0.5), ("flap", 0.5)]
    assert [c.off for c in found] == pytest.approx([0.1, -0.2, 0.0])
    assert check_sentence(found) == (
        "2 of 3 predictions were within 15% of what was measured; half of them within 10%."
    )
    text = predictions_markdown(comparison)
    assert "| dsmoe | 0.5 | 1.60 (1.44-1.76) | 2.00 | -20.0% |" in text
    assert "| flap | 0.25 | 4.00 (3.60-4.40) | - | - |" in text


def test_what_is_predicted_and_not_measured_is_named_best_first():
    made = suggestion(dsmoe=[1.1, 1.6, 2.0], flap=[1.05, None, 1.5]).predictions
    bound = Prediction(
        method="best", kind="bound", budget=0.75, ratio=1.0, low=1.0, high=1.0, active=0.75
    )
    comparison = Comparison(
        protocol={
            "budgets": [0.75, 0.5],
            "methods": {"dsmoe": {"convert": "dsmoe"}},
            "trained": [False],
        },
        lines=[line("dsmoe", 0.5, 2.0)],
        predictions=(*made, bound),
    )
    assert forecasts(comparison) == [
        "At 0.75 active without training, predicted and not measured: flap 1.05 (0.95-1.16), "
        "dsmoe 1.10 (0.99-1.21).",
        "At 0.25 active without training, predicted and not measured: flap 1.50 (1.35-1.65), "
        "dsmoe 2.00 (1.80-2.20).",
    ]
    text = predictions_markdown(comparison)
    assert "| flap | 0.5 | - | - | - |" in text
    assert "Not predicted:\n\n- flap at 0.5: it cannot\n" in text
    page = render_comparison(comparison)
    assert page.count('<tr><th scope="row">flap</th>') == 3
    assert "<td>1.60 (1.44-1.76)</td><td>2.00</td><td>-20.0%</td>" in page
