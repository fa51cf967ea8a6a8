import dataclasses
import json

import numpy as np
import pytest

from moesaic._errors import InputError
from moesaic.evaluation import perplexity_ratio
from moesaic.evaluation.intervals import BlockLosses, domain_quality


def losses(nll_N, document_N=None, domain_N=None, tokens=10, domains=("docs", "code")):
    nll_N = np.asarray(nll_N, float)
    return BlockLosses(
        nll_N=nll_N,
        tokens_N=np.full(nll_N.size, tokens),
        block_N=np.arange(nll_N.size),
        domain_N=np.zeros(nll_N.size, int) if domain_N is None else np.asarray(domain_N),
        document_N=np.arange(nll_N.size) if document_N is None else np.asarray(document_N),
        domains=domains,
        text="abc",
    )


def normal(num_documents, seed=0, mean=20.0):
    return losses(np.random.default_rng(seed).normal(mean, 3.0, num_documents))


def test_two_documents_by_hand():
    # Draws of two documents with mean losses ln 2 and ln 8 give ln 2, ln 4 or ln 8, with
    # probabilities 1/4, 1/2, 1/4, so the interval is both ends and the point is ln 4.
    quality = domain_quality(losses(np.log([2, 8]) * 10), 1000, 0)["docs"]
    assert quality.perplexity.value == pytest.approx(4)
    assert (quality.perplexity.low, quality.perplexity.high) == pytest.approx((2, 8))
    assert (quality.tokens, quality.documents) == (20, 2)


def test_perplexity_is_weighted_by_tokens():
    one = losses([10 * np.log(2), 30 * np.log(4)])
    one = dataclasses.replace(one, tokens_N=np.array([10, 30]))
    value = domain_quality(one, 100, 0)["docs"].perplexity.value
    assert value == pytest.approx(np.exp((10 * np.log(2) + 30 * np.log(4)) / 40))


@pytest.mark.parametrize("seed", range(5))
def test_interval_contains_the_point_and_shrinks_with_documents(seed):
    widths = []
    for num_documents in (10, 40, 640):
        estimate = domain_quality(normal(num_documents, seed), 1000, seed)["docs"].perplexity
        assert estimate.low < estimate.value < estimate.high
        widths.append(np.log(estimate.high / estimate.low))
    assert widths[0] > 1.3 * widths[1] > 1.3 * 2.5 * widths[2]
    # Theory: 2 * 1.96 * sigma / sqrt(U), in nats per token.
    assert widths[2] == pytest.approx(2 * 1.96 * 0.3 / np.sqrt(640), rel=0.15)


def test_interval_covers_the_truth():
    inside = 0
    for seed in range(200):
        estimate = domain_quality(normal(40, seed), 200, seed)["docs"].perplexity
        inside += estimate.low <= np.exp(2.0) <= estimate.high
    # 95% of 200 nominally; a percentile interval over 40 documents covers a little less.
    assert 178 <= inside <= 199


def test_blocks_of_a_document_are_drawn_together():
    nll_U = np.random.default_rng(1).normal(20, 3, 8)
    whole = domain_quality(losses(nll_U), 500, 0)["docs"].perplexity
    split = domain_quality(losses(np.repeat(nll_U, 3), np.repeat(np.arange(8), 3)), 500, 0)
    assert dataclasses.astuple(split["docs"].perplexity) == pytest.approx(
        dataclasses.astuple(whole)
    )


def test_one_document_falls_back_to_its_blocks():
    quality = domain_quality(losses([18, 20, 25], [7, 7, 7]), 500, 0)["docs"]
    assert quality.perplexity.low < quality.perplexity.value < quality.perplexity.high
    assert quality.documents == 1


def test_draws_depend_on_the_seed_alone():
    one = domain_quality(normal(10), 500, 0)
    assert one == domain_quality(normal(10), 500, 0)
    assert one != domain_quality(normal(10), 500, 1)


def test_ratio_of_a_model_to_itself_is_exactly_one():
    ratio = perplexity_ratio(normal(9), normal(9), 500, 0)
    assert dataclasses.astuple(ratio) == (1.0, 1.0, 1.0)


def test_paired_interval_ignores_what_both_models_share():
    dense = normal(30)
    # Worse by a tenth of a nat per token everywhere: the ratio is certain, though neither is.
    worse = dataclasses.replace(dense, nll_N=dense.nll_N + 1.0)
    ratio = perplexity_ratio(worse, dense, 500, 0)
    assert dataclasses.astuple(ratio) == pytest.approx((np.exp(0.1),) * 3)
    noisy = dataclasses.replace(
        dense, nll_N=dense.nll_N + np.random.default_rng(5).normal(1.0, 0.3, 30)
    )
    ratio = perplexity_ratio(noisy, dense, 500, 0)
    single = domain_quality(dense, 500, 0)["docs"].perplexity
    assert ratio.low < ratio.value < ratio.high
    assert ratio.high / ratio.low < (single.high / single.low) ** 0.3


def test_ratio_is_the_geometric_mean_over_domains():
    domain_N = [0, 0, 0, 1]
    dense = losses(np.log([2, 2, 2, 2]) * 10, domain_N=domain_N)
    worse = losses(np.log([4, 4, 4, 18]) * 10, domain_N=domain_N)
    # Ratios 2 and 9, whatever the number of blocks: sqrt(18).
    assert perplexity_ratio(worse, dense, 100, 0).value == pytest.approx(np.sqrt(18))


def test_losses_at_other_blocks_keep_their_order():
    some = normal(6).at(np.array([4, 1]))
    assert some.block_N.tolist() == [4, 1]
    assert some.nll_N.tolist() == normal(6).nll_N[[4, 1]].tolist()
    assert some.at(np.array([1])).document_N.tolist() == [1]


def test_ratio_needs_the_same_blocks():
    dense = normal(6)
    message = "needs both models on the same blocks; evaluate them with the same text"
    with pytest.raises(InputError, match=message):
        perplexity_ratio(dense.at(np.arange(5)), dense, 100, 0)
    with pytest.raises(InputError, match=message):
        perplexity_ratio(dataclasses.replace(dense, text="other"), dense, 100, 0)
    with pytest.raises(InputError, match="block 6 of the text was not evaluated; evaluate every"):
        dense.at(np.array([0, 6]))


def test_losses_come_back_from_plain_data():
    one = losses([1.5, 2.25], document_N=[4, 4], domain_N=[1, 0])
    again = BlockLosses.from_plain(json.loads(json.dumps(one.to_plain())))
    for field in dataclasses.fields(BlockLosses):
        left, right = getattr(one, field.name), getattr(again, field.name)
        assert np.array_equal(left, right)
        assert getattr(left, "dtype", None) == getattr(right, "dtype", None)
