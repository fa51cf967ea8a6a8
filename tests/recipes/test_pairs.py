"""Two methods on the same documents: what the interval of their ratio says."""

import numpy as np
import pytest

from moesaic.analysis import Comparison, verdicts
from moesaic.evaluation import QualityConfig
from moesaic.evaluation.intervals import BlockLosses
from moesaic.recipes.comparison.pairs import paired

TOKENS = 10
# What a document is like: it moves every model alike, far more than the methods differ.
LEVEL_N = np.random.default_rng(0).normal(3.0, 1.0, 12)


def line(method, more_N, *, active=0.5, seed=0, trained=False, **options):
    losses = BlockLosses(
        nll_N=(LEVEL_N + more_N) * TOKENS,
        tokens_N=np.full(12, TOKENS),
        block_N=np.arange(12),
        domain_N=np.zeros(12, int),
        document_N=np.arange(12),
        domains=("docs",),
        text="abc",
    )
    return {
        "method": method,
        "active": active,
        "seed": seed,
        "trained": trained,
        "status": "done",
        "losses": losses.to_plain(),
    } | options


def lows(lines):
    return {(p.method, p.other, p.budget, p.trained): p.low for p in paired(lines, QualityConfig())}


def test_an_even_lead_has_no_interval():
    found = lows([line("a", np.zeros(12)), line("b", np.full(12, 0.02))])
    assert found == pytest.approx(
        {("a", "b", 0.5, False): np.exp(0.02), ("b", "a", 0.5, False): np.exp(-0.02)}
    )


def test_the_lowest_of_the_seeds_counts():
    lines = [
        line("a", np.zeros(12)),
        line("a", np.full(12, 0.03), seed=1),
        line("b", np.full(12, 0.05)),
        line("b", np.full(12, 0.02), seed=2),
    ]
    # The worse seed of a beside the better one of b.
    assert lows(lines)["a", "b", 0.5, False] == pytest.approx(np.exp(-0.01))


def test_a_lead_on_a_few_documents_is_none():
    more_N = np.full(12, -0.01)
    more_N[:3] = 0.06
    found = lows([line("a", np.zeros(12)), line("b", more_N)])
    assert np.mean(more_N) > 0
    assert found["a", "b", 0.5, False] < 1


def test_only_what_is_alike_is_paired():
    lines = [
        line("a", np.zeros(12)),
        line("b", np.zeros(12), active=0.75),
        line("c", np.zeros(12), trained=True),
        line("d", np.zeros(12), status="error"),
    ]
    assert paired(lines, QualityConfig()) == []


def test_one_seed_without_losses_takes_a_method_out():
    lines = [line("a", np.zeros(12)), line("b", np.ones(12)), line("b", np.ones(12), seed=1)]
    assert len(paired(lines, QualityConfig())) == 2
    del lines[-1]["losses"]
    assert paired(lines, QualityConfig()) == []


def test_pairs_settle_a_verdict_that_intervals_leave_open():
    quality = {"domains": {"docs": {"perplexity": 10.0}}, "ratio_low": 1.0, "ratio_high": 1.3}
    rest = {"kind": "compress", "static": False, "seconds": {}}
    cost = {"active_ffn_fraction": 0.5, "active_parameters": 1.0}
    lines = [
        line(name, np.full(12, more), quality={**quality, "ratio": ratio}, cost=cost, **rest)
        for name, more, ratio in (("a", 0.0, 1.10), ("b", 0.02, 1.12))
    ]
    protocol = {"methods": {n: {"compress": n} for n in "ab"}, "budgets": [0.5], "trained": [False]}
    asked = {"protocol": protocol, "lines": lines}
    assert "not on enough documents" in verdicts(Comparison(**asked))[0]
    found = verdicts(Comparison(**asked, pairs=paired(lines, QualityConfig())))
    assert found[0].startswith("At 0.5 active without training, a is best: 1.10")
