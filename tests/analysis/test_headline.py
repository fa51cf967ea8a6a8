"""The sentences at the top say what the numbers say, also when they are bad news."""

import pytest
from records import make_record, speed

from moesaic.analysis import headline


@pytest.fixture
def record():
    return make_record()


def test_what_a_good_result_says(record):
    said = headline(record)
    assert said.lead == (
        "dsmoe uses 64% of the feed-forward weights for each token, and its held-out perplexity "
        "is 1.21x that of the dense model."
    )
    assert said.lost.startswith("Perplexity rises by 21% (interval +18% to +25%), most on ")
    assert said.gained == (
        "36% fewer active feed-forward weights and 21% fewer FLOPs per token. Writing text runs "
        "at 1.35x the speed of dense and reading a prompt runs at 1.30x the speed of dense."
    )
    assert said.beside_pruning == (
        "At 64% active, flap has 1.41x the perplexity of dense, dsmoe 1.21x: dsmoe does better."
    )


def test_activation_sparsity_is_a_baseline_and_no_pruning(record):
    before = headline(record)
    flap = next(model for model in record["models"] if model["name"] == "flap")
    teal = {**flap, "name": "teal", "kind": "activation-sparsity"}
    assert headline({**record, "models": [teal, *record["models"]]}) == before
    others = [model for model in record["models"] if model is not flap]
    assert "teal" not in str(headline({**record, "models": [teal, *others]}))


def test_a_loss_to_static_pruning_is_said(record):
    record["models"][1]["quality"].update(ratio=1.1, ratio_low=1.08, ratio_high=1.12)
    assert headline(record).beside_pruning.endswith("dsmoe 1.21x: flap does better.")


def test_overlapping_intervals_are_said(record):
    record["models"][1]["quality"].update(ratio=1.23, ratio_low=1.2, ratio_high=1.26)
    said = headline(record).beside_pruning
    assert said.endswith("dsmoe does better, though the intervals overlap.")


def test_the_baseline_at_the_nearest_fraction_is_taken(record):
    far = dict(record["models"][1], name="far", cost={"active_ffn_fraction": 0.3})
    record["models"].insert(1, far)
    assert "flap" in headline(record).beside_pruning
    record["models"].remove(record["models"][2])
    said = headline(record).beside_pruning
    assert said.startswith("At 30% active, far has")
    assert said.endswith("Compare with care: dsmoe has 63.8% active.")


def test_slower_is_called_slower_and_equal_equal(record):
    rates = record["models"][2]["speed"]
    rates["decode_tokens_per_s"] = speed(30.0)
    rates["prefill_tokens_per_s"] = speed(1000.0)
    said = headline(record).gained
    assert "Writing text is slower, 0.79x the speed of dense" in said
    assert "reading a prompt is about as fast as dense (0.99x)" in said


def test_no_loss(record):
    quality = record["models"][2]["quality"]
    quality.update(ratio=1.01, ratio_low=0.98, ratio_high=1.04)
    assert headline(record).lost == (
        "No measurable loss: perplexity changes by +1.0% (interval -2.0% to +4.0%)."
    )
    quality.update(ratio=0.9, ratio_low=0.88, ratio_high=0.92)
    assert headline(record).lost == "Nothing: perplexity falls by 10% (interval -12% to -8.0%)."


def test_parts_not_measured_are_left_out(record):
    del record["models"][0]
    del record["models"][1]["quality"]
    said = headline(record)
    assert said.lead == "dsmoe uses 64% of the feed-forward weights for each token."
    assert said.lost == ""
    assert said.gained == "36% fewer active feed-forward weights."
