import math

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from evaluation_cases import VOCAB, blocks_of, convert, dense_model, make_blocks

from moesaic._errors import InputError, RunError
from moesaic.evaluation import QualityConfig, choose_blocks, evaluate_perplexity
from moesaic.nn.layer import record_routing


def uniform_model():
    model = dense_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def test_uniform_logits_have_the_perplexity_of_the_vocabulary(blocks):
    result = evaluate_perplexity(uniform_model(), blocks)
    assert list(result.domains) == ["docs", "code"]
    for quality in result.domains.values():
        estimate = quality.perplexity
        assert estimate.value == pytest.approx(VOCAB, rel=1e-6)
        assert estimate.low == pytest.approx(VOCAB, rel=1e-6)
        assert estimate.high == pytest.approx(VOCAB, rel=1e-6)
    # 7 blocks of 17 tokens, of which the first of each is given.
    assert result.domains["docs"].tokens == 7 * 16
    assert (result.domains["docs"].documents, result.domains["code"].documents) == (4, 3)


@pytest.mark.parametrize("batch_blocks", [1, 3, 64])
def test_losses_are_those_of_one_block_at_a_time(moe, blocks, batch_blocks):
    result = evaluate_perplexity(moe, blocks, QualityConfig(batch_blocks=batch_blocks))
    assert sorted(result.losses.block_N) == list(range(12))
    for block, nll in zip(result.losses.block_N, result.losses.nll_N, strict=True):
        ids_S = torch.from_numpy(blocks.ids_NS[block].astype(np.int64))
        with torch.no_grad():
            logits_SV = moe(input_ids=ids_S[None]).logits[0]
        loss = nnf.cross_entropy(logits_SV[:-1].double(), ids_S[1:], reduction="sum")
        assert nll == pytest.approx(loss.item(), rel=1e-5)
    docs = result.losses.domain_N == 0
    expected = math.exp(result.losses.nll_N[docs].sum() / result.losses.tokens_N[docs].sum())
    assert result.domains["docs"].perplexity.value == pytest.approx(expected, rel=1e-12)


def test_long_blocks_are_summed_over_every_chunk(monkeypatch, moe, blocks):
    whole = evaluate_perplexity(moe, blocks).losses.nll_N
    monkeypatch.setattr("moesaic.evaluation.perplexity._POSITIONS", 5)
    np.testing.assert_allclose(evaluate_perplexity(moe, blocks).losses.nll_N, whole, rtol=1e-6)


@pytest.mark.parametrize("shared", [0, 4])
def test_activation_is_what_the_routers_decided(blocks, shared):
    model = convert(dense_model(), experts=5, shared=shared, threshold=0.6)
    activation = evaluate_perplexity(model, blocks).activation
    expected = {}
    for index, name in enumerate(blocks.domains):
        ids = torch.from_numpy(blocks.ids_NS[blocks.domain_N == index].astype(np.int64))
        with torch.no_grad(), record_routing(model) as routings:
            model(input_ids=ids)
        width = 4  # 24 neurons, 5 experts: 4 of each, and 4 shared or dropped
        active = [r.active_TE().double().mean(0) for r in routings]
        expected[name] = [(shared + width * a.sum().item()) / 24 for a in active]
        assert activation.mean_per_layer(name) == pytest.approx(expected[name])
    weights = [7 / 12, 5 / 12]
    means = np.average(list(expected.values()), axis=0, weights=weights)
    assert activation.mean_per_layer() == pytest.approx(means)
    assert activation.mean() == pytest.approx(means.mean())
    assert [len(layer) for layer in activation.experts_per_layer()] == [5, 5]
    per_layer = np.array(activation.experts_per_layer()).sum(1)
    assert (shared + 4 * per_layer) / 24 == pytest.approx(means)
    assert 0 < means.mean() < 1


def test_dense_model_has_no_activation(dense, blocks):
    assert evaluate_perplexity(dense, blocks).activation is None


def test_model_is_left_as_it_was(moe, blocks):
    moe.train()
    moe.lm_head.eval()
    modes = [module.training for module in moe.modules()]
    first = evaluate_perplexity(moe, blocks).losses.nll_N
    assert [module.training for module in moe.modules()] == modes
    assert all(parameter.grad is None for parameter in moe.parameters())
    moe.eval()
    np.testing.assert_array_equal(evaluate_perplexity(moe, blocks).losses.nll_N, first)


def test_half_precision_loses_little(blocks):
    model = dense_model()
    exact = evaluate_perplexity(model, blocks).domains["docs"].perplexity.value
    half = evaluate_perplexity(model.bfloat16(), blocks).domains["docs"].perplexity.value
    assert half == pytest.approx(exact, rel=0.05)


def test_chosen_blocks_are_nested_and_of_every_domain():
    blocks = make_blocks({"docs": [1] * 9, "code": [2] * 4})
    few, more = (choose_blocks(blocks, n, seed=3) for n in (2, 5))
    assert np.bincount(blocks.domain_N[few]).tolist() == [2, 2]
    assert np.bincount(blocks.domain_N[more]).tolist() == [5, 5]
    assert set(few) < set(more)
    assert not np.array_equal(few, choose_blocks(blocks, 2, seed=4))
    assert choose_blocks(blocks, 100, seed=0).tolist() == list(range(17))


def test_chosen_blocks_are_of_many_documents():
    blocks = make_blocks({"docs": [50, 1, 3]})
    three, four = (blocks.document_N[choose_blocks(blocks, n, seed=0)] for n in (3, 4))
    assert three.tolist() == [0, 1, 2]
    assert len(four) == 4
    assert set(four) == {0, 1, 2}
    numbers = {choose_blocks(blocks, 3, seed)[0] for seed in range(8)}
    assert len(numbers) > 3


def test_domain_without_text_is_said(caplog, blocks):
    empty = blocks_of(blocks.ids_NS, blocks.domain_N, blocks.document_N, ("docs", "code", "law"))
    choose_blocks(empty, 3, seed=0)
    assert "no held-out text of domain law; it is left out" in caplog.text


def test_text_that_cannot_be_read_is_refused(dense, blocks):
    with pytest.raises(InputError, match="has 0 blocks, at least 1 is needed; add documents"):
        evaluate_perplexity(dense, blocks_of(np.zeros((0, 17)), [], [], ("docs",)))
    with pytest.raises(InputError, match="at least 2 tokens, got 1; 512 is usual"):
        evaluate_perplexity(dense, blocks_of([[5]], [0], [0], ("docs",)))
    with pytest.raises(InputError, match="holds token 61, the model knows 61; pack the text again"):
        evaluate_perplexity(dense, blocks_of([[5, VOCAB]], [0], [0], ("docs",)))
    with pytest.raises(InputError, match="blocks of 65 tokens are longer than the model's 64 pos"):
        evaluate_perplexity(dense, blocks_of([[5] * 65], [0], [0], ("docs",)))
    with pytest.raises(InputError, match="blocks per domain must be at least 1, got 0; raise it"):
        choose_blocks(blocks, 0, seed=0)


def test_loss_that_is_not_finite_stops(dense, blocks):
    with torch.no_grad():
        dense.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match="loss of broken on domain 'docs' is not finite; load"):
        evaluate_perplexity(dense, blocks, name="broken")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_blocks": 0}, "batch_blocks must be at least 1, got 0; 2 is usual"),
        ({"resamples": 20}, "resamples must be at least 100 for a 95% interval, got 20"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(InputError, match=message):
        QualityConfig(**options)
