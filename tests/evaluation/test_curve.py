from itertools import pairwise

import numpy as np
import pytest
from evaluation_cases import convert, dense_model

from moesaic._errors import InputError
from moesaic.evaluation import (
    QualityConfig,
    choose_blocks,
    evaluate_perplexity,
    threshold_at,
    threshold_curve,
)
from moesaic.nn.layer import moe_layers


def thresholds(model):
    return [layer.router.threshold for layer in moe_layers(model)]


@pytest.fixture
def moe():
    # The paper's normalisation would make a gate near one half count double at half activity.
    return convert(dense_model(), normalize="none")


def test_threshold_is_restored_after_an_error(moe):
    moe_layers(moe)[1].router.threshold = 0.7
    with threshold_at(moe, 0.25):
        assert thresholds(moe) == [0.25, 0.25]
    with pytest.raises(KeyboardInterrupt, match="stop"), threshold_at(moe, 0.25):
        raise KeyboardInterrupt("stop")
    assert thresholds(moe) == [0.5, 0.7]


def test_curve_is_monotone_in_compute(moe, blocks):
    dense = evaluate_perplexity(dense_model(), blocks).losses
    points = threshold_curve(moe, blocks, dense, (0.9, 0.0, 0.5, 0.25, 0.75), QualityConfig())
    assert [p["threshold"] for p in points] == [0.0, 0.25, 0.5, 0.75, 0.9]
    active = [p["active_ffn_fraction"] for p in points]
    assert active[0] == 1.0
    assert all(a > b for a, b in pairwise(active))
    assert all(p["ratio_low"] <= p["ratio"] <= p["ratio_high"] for p in points)
    assert thresholds(moe) == [0.5, 0.5]


def test_point_is_the_model_at_that_threshold(blocks):
    moe = convert(dense_model(), threshold=0.6)
    dense = evaluate_perplexity(dense_model(), blocks)
    own = evaluate_perplexity(moe, blocks)
    few = choose_blocks(blocks, 2, seed=0)
    for block_N in (None, few):
        (point,) = threshold_curve(
            moe, blocks, dense.losses, [0.6], QualityConfig(), block_N=block_N
        )
        numbers = np.arange(12) if block_N is None else block_N
        mine, parents = own.losses.at(numbers), dense.losses.at(numbers)
        logs = []
        for index, name in enumerate(blocks.domains):
            nll = [x.nll_N[x.domain_N == index].mean() / 16 for x in (mine, parents)]
            assert point["domains"][name] == pytest.approx(np.exp(nll[0]))
            logs.append(nll[0] - nll[1])
        assert point["ratio"] == pytest.approx(np.exp(np.mean(logs)))


def test_curve_without_a_threshold_to_move_is_refused():
    model = convert(dense_model(), router="topk-softmax")
    with (
        pytest.raises(InputError, match="no router of this model is a sigmoid-threshold"),
        threshold_at(model, 0.5),
    ):
        pass


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_threshold_out_of_range_is_refused(moe, threshold):
    with (
        pytest.raises(InputError, match=rf"threshold must be in \[0, 1\), got {threshold}; 0.5"),
        threshold_at(moe, threshold),
    ):
        pass
