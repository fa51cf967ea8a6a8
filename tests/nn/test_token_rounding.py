"""Token rounding: counts in whole tiles, as near to top-k as they can be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_cases import make_router, set_scores, tokens


def routed(rounding, tile_rows, *, num_experts=8, top_k=2, num_tokens=256, seed=0):
    """Routing of the same tokens in training with rounding, and by plain top-k."""
    options = {"top_k": top_k, "tile_rows": tile_rows, "rounding": rounding}
    router = make_router("token-rounding", num_experts, seed=seed, **options).train()
    plain = make_router("topk-softmax", num_experts, seed=seed, top_k=top_k)
    # Each loads the weights of the other.
    plain.load_state_dict(router.state_dict())
    h_TD = tokens(num_tokens, seed=seed + 1)
    return router(h_TD), plain(h_TD)


CASES = pytest.mark.parametrize(
    ("num_experts", "top_k", "tile_rows", "num_tokens"),
    [(8, 2, 8, 256), (6, 3, 5, 65), (16, 1, 32, 512), (4, 4, 16, 64), (3, 2, 7, 70)],
    ids=str,
)


@CASES
@pytest.mark.parametrize("rounding", ["nearest", "up", "down"])
def test_every_count_is_whole_tiles(rounding, num_experts, top_k, tile_rows, num_tokens):
    rounded, plain = routed(
        rounding, tile_rows, num_experts=num_experts, top_k=top_k, num_tokens=num_tokens
    )
    counts_E, chosen_E = rounded.counts_E(), plain.counts_E()
    # T is a multiple of M, so that no count is cut at T.
    assert num_tokens % tile_rows == 0
    assert (counts_E % tile_rows == 0).all()
    change_E = (counts_E - chosen_E).abs()
    assert (change_E <= tile_rows / 2 if rounding == "nearest" else change_E < tile_rows).all()
    if rounding == "up":
        assert (rounded.active_TE() >= plain.active_TE()).all()
    if rounding == "down":
        assert (rounded.active_TE() <= plain.active_TE()).all()
    if top_k < num_experts:
        assert change_E.any()


@settings(max_examples=30, deadline=None)
@given(
    tile_rows=st.integers(1, 40),
    num_tokens=st.integers(0, 70),
    rounding=st.sampled_from(["nearest", "up", "down"]),
    seed=st.integers(0, 2**31),
)
def test_counts_are_cut_at_the_tokens_there_are(tile_rows, num_tokens, rounding, seed):
    rounded, plain = routed(rounding, tile_rows, num_tokens=num_tokens, seed=seed)
    round_ = {"nearest": round, "up": lambda x: -(-x // 1), "down": lambda x: x // 1}[rounding]
    for count, chosen in zip(rounded.counts_E().tolist(), plain.counts_E().tolist(), strict=True):
        assert count == min(round_(chosen / tile_rows) * tile_rows, num_tokens)


@pytest.mark.parametrize("rounding", ["nearest", "up", "down"])
def test_tiles_of_one_row_are_top_k(rounding):
    rounded, plain = routed(rounding, 1)
    assert torch.equal(rounded.ids_TK, plain.ids_TK)
    assert torch.equal(rounded.weights_TK, plain.weights_TK)


def test_evaluation_is_top_k():
    router = make_router("token-rounding", 6, top_k=2, tile_rows=32)
    plain = make_router("topk-softmax", 6, top_k=2)
    h_TD = tokens(63)
    assert torch.equal(router(h_TD).ids_TK, plain(h_TD).ids_TK)
    assert torch.equal(router(h_TD).weights_TK, plain(h_TD).weights_TK)


def padding(counts_E, tile_rows):
    """Rows that a product in tiles computes for nothing, as a share of the rows it needs."""
    return ((-counts_E % tile_rows).sum() / counts_E.sum()).item()


@pytest.mark.parametrize("rounding", ["nearest", "up", "down"])
def test_no_row_is_padding(rounding):
    rounded, plain = routed(rounding, 128, num_experts=64, num_tokens=4096)
    # A mean of 128 tokens an expert leaves about half a tile of padding to each.
    assert padding(plain.counts_E(), 128) > 0.1
    assert padding(rounded.counts_E(), 128) == 0


BY_HAND = [
    # p of 4 tokens and 2 experts; top 1 gives expert 0 the tokens 0 1 2 and expert 1 the token 3.
    [0.9, 0.1],
    [0.6, 0.4],
    [0.8, 0.2],
    [0.3, 0.7],
]


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        # 3 and 1 become 4 and 2. Expert 0 adds token 3, at its raw 0.3; expert 1 adds the one it
        # scores highest, token 1, at 0.4. Chosen ones weigh 1: top 1, renormalised.
        ("up", [[1, 0], [1, 0.4], [1, 0], [0.3, 1]]),
        # 3 and 1 become 2 and 0. All gates are 1, so the later token goes.
        ("down", [[1, 0], [1, 0], [0, 0], [0, 0]]),
        # 1.5 tiles round to 2 and 0.5 to 0, half to even.
        ("nearest", [[1, 0], [1, 0], [1, 0], [0.3, 0]]),
    ],
)
def test_by_hand(rounding, expected):
    router = make_router("token-rounding", 2, top_k=1, tile_rows=2, rounding=rounding).train()
    routing = router(set_scores(router, torch.tensor(BY_HAND).log()))
    expected_TE = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(routing.weights_TE(), expected_TE)


def test_the_weakest_chosen_token_is_dropped():
    # Top 2 of 3: every token chooses the experts 0 and 1, expert 1 at p1 / (p0 + p1):
    # 0.4, 0.11, 0.45, so rounding 3 down to 2 drops token 1 from expert 1.
    probs_TE = torch.tensor([[0.48, 0.32, 0.2], [0.81, 0.1, 0.09], [0.495, 0.405, 0.1]])
    router = make_router("token-rounding", 3, top_k=2, tile_rows=2, rounding="down").train()
    routing = router(set_scores(router, probs_TE.log()))
    assert routing.active_TE()[:, 1].tolist() == [True, False, True]
    # And expert 0 loses the token that gives it least, token 2 at 0.55.
    assert routing.active_TE()[:, 0].tolist() == [True, True, False]


def test_gradients_are_those_of_the_probabilities():
    router = make_router("token-rounding", 4, top_k=2, tile_rows=16).train()
    h_TD = tokens(64)
    routing = router(h_TD)
    probs_TE = (h_TD @ router.weight.T).softmax(-1)
    top_TK, ids_TK = probs_TE.topk(2)
    chosen_TE = torch.zeros(64, 4, dtype=torch.bool).scatter(1, ids_TK, True)
    expected_TE = torch.where(chosen_TE, probs_TE / top_TK.sum(1, keepdim=True), probs_TE)
    expected_TE = expected_TE * routing.active_TE()
    assert (routing.active_TE() != chosen_TE).any()
    torch.testing.assert_close(routing.weights_TE(), expected_TE)
    probe_TE = tokens(64, 4, seed=3)
    grads = [
        torch.autograd.grad((w_TE * probe_TE).sum(), router.weight, retain_graph=True)[0]
        for w_TE in (routing.weights_TE(), expected_TE)
    ]
    torch.testing.assert_close(*grads)
