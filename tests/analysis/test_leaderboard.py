"""The leaderboard from made-up lines: who is ranked where, and what it says."""

from __future__ import annotations

import pytest

from moesaic.analysis import (
    Leaderboard,
    board_verdicts,
    leaderboard_markdown,
    render_leaderboard,
)
from moesaic.analysis.leaderboard import standings


def line(name, loss, *, seed=0, ratio=1.0, sees_batch=False, load=1.5, **more):
    """A finished cell of two layers of 4 experts."""
    layer = {"num_experts": 4, "width": 8, "shared_width": 16, "router": "topk-softmax"}
    layers = [{"max_over_mean": load, "entropy": 0.9, "dead": 1, "experts": 4}] * 2
    return {
        "architecture": name,
        "seed": seed,
        "status": "done",
        "sees_batch": sees_batch,
        "config": {"layers": [layer] * 2},
        "quality": {"loss": loss},
        "flops": {"ratio": ratio},
        "experts_used": [2.0, 3.0],
        "balance": {"max_over_mean": load, "entropy": 0.9, "dead": 2, "experts": 8}
        | {"layers": layers},
        "cost": {"total_parameters": 12_345, "active_parameters": 6_000},
        "speed": {"train_tokens_per_s": 1500.0},
        "curve": [[10, 5.0], [100, 3.0], [200, loss]],
        "machine": {"cpu": "<b>a CPU</b>"},
        "versions": {"commit": "abc"},
    } | more


def dense(loss, **more):
    layer = {"num_experts": 0, "width": 0, "shared_width": 64, "router": ""}
    return line("dense", loss, config={"layers": [layer]}, experts_used=[], balance=None) | more


def board(*lines, names=("dense", "a", "b", "c")):
    protocol = {"architectures": {name: {} for name in names}, "train": {"tokens": 1000}}
    return Leaderboard(protocol=protocol, lines=lines)


def test_the_lowest_loss_at_equal_cost_leads():
    found = standings(
        board(
            dense(2.5),
            line("a", 2.0, ratio=1.06),
            line("b", 2.25, ratio=0.96),
            line("c", 1.5, sees_batch=True),
        )
    )
    assert [one.name for one in found] == ["b", "dense", "c", "a"]
    assert [one.why_unranked for one in found] == [
        "",
        "",
        "its routing sees other and later tokens",
        "it costs 106% of the FLOPs",
    ]
    b = found[0]
    assert (b.experts_used.value, b.experts, b.width, b.shared) == (2.5, 4, 8, 16)
    assert (b.max_over_mean.value, b.entropy.value, b.dead, b.total_experts) == (1.5, 0.9, 2.0, 8)
    assert b.layers == [1.5, 1.5]
    assert (found[1].width, found[1].max_over_mean, found[1].experts_used) == (64, None, None)


def test_one_seed_off_its_cost_is_enough_not_to_be_ranked():
    (one, *_) = standings(board(line("a", 2.0), line("a", 2.5, seed=1, ratio=0.9)))
    assert one.loss == (2.25, 2.0, 2.5)
    assert one.why_unranked == "it costs 90.0% of the FLOPs"


def test_sentences_say_what_is_settled():
    lines = [dense(2.6), line("a", 2.5), line("b", 2.4, load=1.25)]
    assert board_verdicts(board(*lines)) == [
        "After 1,000 tokens b has the lowest loss, 2.400 nats per token, of 3 at equal FLOPs per "
        "token.",
        "It was one seed, so small differences mean nothing.",
        "b is the most even: its busiest expert has 1.25 times the mean load.",
    ]
    seeds = [dense(2.9, seed=1), line("a", 2.3, seed=1), line("b", 2.3, seed=1, load=1.25)]
    found = board_verdicts(board(*lines, *seeds))
    assert found[0].startswith("After 1,000 tokens b has the lowest loss, 2.350 (2.300-2.400) nats")
    assert "nats per token over 2 seeds, of 3" in found[0]
    assert found[1] == "The seeds of a overlap with it: nothing is settled."
    apart = [line("a", 2.7, seed=2), line("b", 2.2, seed=2)]
    settled = board_verdicts(board(*lines[:1], *apart, line("b", 2.1)))
    assert not any("settled" in sentence for sentence in settled)
    nothing = board_verdicts(board(line("c", 1.0, sees_batch=True)))
    assert nothing == ["No architecture was measured at the cost that was asked for."]


def test_markdown_has_a_row_for_what_was_measured_and_a_reason_for_the_rest():
    failed = {"architecture": "b", "seed": 0, "status": "error", "reason": "it broke"}
    text = leaderboard_markdown(board(dense(2.5), line("a", 2.0, ratio=1.2), failed))
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert rows[2:] == [
        "| dense | 2.500 | 1.000 | - | - | - | - | 1.50k | 12.3k | 6.00k | 1 |",
        "| a (not ranked) | 2.000 | 1.200 | 2.50 + 2 of 4 | 1.50 | 0.900 | 2 of 8 | 1.50k | 12.3k "
        "| 6.00k | 1 |",
    ]
    assert text.endswith("Not measured:\n\n- b: it broke\n")


def test_every_row_says_its_seeds_and_how_far_they_are_apart():
    seeds = [line("a", 2.0), line("a", 2.25, seed=1, ratio=1.02, load=1.25, experts_used=[3.0])]
    found = board(dense(2.5), *seeds)
    rows = [row for row in leaderboard_markdown(found).splitlines() if row.startswith("|")]
    assert rows[2] == (
        "| a | 2.125 (2.000-2.250) | 1.010 (1.000-1.020) | 2.75 (2.50-3.00) + 2 of 4 "
        "| 1.38 (1.25-1.50) | 0.900 | 2 of 8 | 1.50k | 12.3k | 6.00k | 2 |"
    )
    assert rows[3].endswith("| 1 |")
    assert "- Not all have 2 seeds: dense 1." in leaderboard_markdown(found)
    page = render_leaderboard(found)
    assert page.count("<small>2 seeds</small>") == page.count("<small>1 seed</small>") == 1


def test_the_page_escapes_and_draws():
    names = ("dense", "<i>a</i>")
    lines = [dense(2.5), line("<i>a</i>", 2.0)]
    page = render_leaderboard(board(*lines, names=names))
    assert "<i>a</i>" not in page
    assert "<b>a CPU</b>" not in page
    assert "&lt;i&gt;a&lt;/i&gt;" in page
    # Curves of both, loads of the one that has any.
    assert page.count("<svg role=") == 2
    assert page.count("times the mean<") == 2
    # The first tenth of a curve is left out: 10 of 200 tokens.
    assert "5.000 after" not in page
    assert "3.000 after 100 tokens" in page


@pytest.mark.parametrize("lines", [(), (dense(2.5),)], ids=["nothing", "dense alone"])
def test_a_page_of_little_still_renders(lines):
    page = render_leaderboard(board(*lines))
    assert page.count("<svg role=") == len(lines)
