"""Sigma-MoE-Tiny, arXiv 2512.16248: more experts in the first stage, and loads over processes."""

from __future__ import annotations

import pytest
import torch
from nn_cases import hand_routing, make_layer, make_loss, make_router, tokens
from torch import distributed, multiprocessing

from moesaic.nn.layer import end_step, record_routing

E = 6
ALL = torch.ones(1, 63, dtype=torch.bool)


def test_k_is_the_early_one_until_the_switch_and_then_the_final_one():
    router = make_router("progressive-top-k", E, early_top_k=4, early_steps=3)
    h_TD = tokens(63)
    counts = []
    for _ in range(6):
        counts.append(router.train()(h_TD).ids_TK.shape[1])
        assert router.eval()(h_TD).ids_TK.shape[1] == 1
        router.end_step()
    assert counts == [4, 4, 4, 1, 1, 1]


@pytest.mark.parametrize("saved_at", [1, 2, 3, 4])
def test_a_checkpoint_on_either_side_of_the_switch_goes_on(saved_at):
    def counts(router, steps):
        found = []
        for _ in range(steps):
            found.append(router(tokens(5)).ids_TK.shape[1])
            router.end_step()
        return found

    options = {"early_top_k": 4, "early_steps": 3}
    router = make_router("progressive-top-k", E, **options).train()
    before = counts(router, saved_at)
    resumed = make_router("progressive-top-k", E, seed=9, **options).train()
    resumed.load_state_dict(router.state_dict())
    assert before + counts(resumed, 6 - saved_at) == [4, 4, 4, 1, 1, 1]


def test_equal_stages_are_plain_top_1_bit_by_bit():
    progressive = make_layer(
        "progressive-top-k", router_config={"top_k": 1, "early_top_k": 1}, dtype=torch.float32
    ).train()
    plain = make_layer(
        "topk-softmax", router_config={"top_k": 1, "renormalize": False}, dtype=torch.float32
    ).train()
    for layer in (progressive, plain):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        for step in range(4):
            optimizer.zero_grad()
            layer(tokens(63, seed=step)).square().sum().backward()
            optimizer.step()
            end_step(layer)
    assert torch.equal(progressive(tokens(63)), plain(tokens(63)))


def test_executed_experts_are_the_sum_of_the_ks_of_the_layers():
    ks = [4, 2, 1]
    model = torch.nn.ModuleList(
        make_layer("progressive-top-k", router_config={"early_top_k": k, "early_steps": 2})
        for k in ks
    ).train()
    executed = []
    for _ in range(3):
        with record_routing(model) as routings:
            for layer in model:
                layer(tokens(63, dtype=torch.float64))
        executed.append(sum(int(routing.active_TE().sum()) for routing in routings) / 63)
        end_step(model)
    assert executed == [sum(ks), sum(ks), len(ks)]


def test_weights_do_not_jump_at_the_switch():
    router = make_router("progressive-top-k", E, early_top_k=3, early_steps=1).train()
    h_TD = tokens(63)
    early = router(h_TD)
    router.end_step()
    late = router(h_TD)
    # The first choice and its probability are those of both stages.
    assert torch.equal(early.ids_TK[:, :1], late.ids_TK)
    assert torch.equal(early.weights_TK[:, :1], late.weights_TK)
    late.weights_TK.sum().backward()
    assert router.weight.grad.abs().max() > 1e-3


def test_the_balance_loss_is_met_by_scores_near_zero_whatever_the_loads():
    router, h_TD = make_router("progressive-top-k", E), tokens(63)
    loss = make_loss("load-balance", share_of="choices")
    losses, chosen = [], []
    # Powers of two scale without rounding.
    for factor in (1.0, 2.0**-10, 2.0**-10):
        with torch.no_grad():
            router.weight *= factor
        routing = router(h_TD)
        losses.append(loss(routing, ALL).item())
        chosen.append(routing.ids_TK)
    assert torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[0], chosen[2])
    assert chosen[0].flatten().bincount(minlength=E).max() > 1.5 * 63 / E
    assert losses[0] > 1.05
    assert losses[2] == pytest.approx(1.0, abs=1e-4)


def test_the_balance_loss_of_even_loads_and_probabilities_is_one_and_teaches_by_them_alone():
    ids = [[t % E] for t in range(60)]
    routing = hand_routing(torch.zeros(60, E), ids)
    routing.scores_TE.requires_grad_()
    routing.weights_TK.requires_grad_()
    value = make_loss("load-balance", share_of="choices")(routing, ALL[:, :60])
    assert value.item() == pytest.approx(1.0)
    value.backward()
    assert routing.scores_TE.grad is not None
    assert routing.weights_TK.grad is None


def test_the_scale_of_the_balance_loss_does_not_follow_k():
    router, h_TD = make_router("progressive-top-k", E, early_top_k=3, early_steps=1), tokens(63)
    with torch.no_grad():
        router.weight *= 1e-5
    losses = []
    for _ in range(2):
        routing = router.train()(h_TD)
        losses.append(make_loss("load-balance", share_of="choices")(routing, ALL).item())
        router.end_step()
    assert losses == pytest.approx([1.0, 1.0], abs=1e-4)


def halves():
    """Two routings of equal size, as of two processes, and both as one."""
    router, h_TD = make_router("progressive-top-k", E), tokens(62)
    return router(h_TD[:31]), router(h_TD[31:]), router(h_TD)


def global_loss(routing):
    mask_BS = torch.ones(1, routing.ids_TK.shape[0], dtype=torch.bool)
    return make_loss("load-balance", scope="global", share_of="choices")(routing, mask_BS)


def test_one_process_counts_its_own_loads():
    routing = halves()[0]
    local = make_loss("load-balance", share_of="choices")(routing, ALL[:, :31])
    assert torch.equal(global_loss(routing), local)


def test_two_processes_pool_their_loads_and_keep_their_probabilities(monkeypatch):
    first, second, both = halves()
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    losses = []
    for own, other in ((first, second), (second, first)):
        sums = torch.cat([other.counts_E().float(), torch.tensor([31.0])])
        monkeypatch.setattr(distributed, "all_reduce", lambda values, sums=sums: values.add_(sums))
        losses.append(global_loss(own))
        # Loads of both, probabilities of one.
        share_E = both.counts_E() / 62
        expected = E * (share_E * own.scores_TE.softmax(-1).mean(0)).sum()
        torch.testing.assert_close(losses[-1], expected)
    monkeypatch.undo()
    torch.testing.assert_close(sum(losses) / 2, global_loss(both))
    assert abs(losses[0] - losses[1]) > 1e-3


def one_of_two(rank, path, results):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    results[rank] = global_loss(halves()[rank])
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_real_processes_agree_with_one(tmp_path):
    results = torch.zeros(2).share_memory_()
    multiprocessing.spawn(one_of_two, args=(tmp_path / "meet", results), nprocs=2)
    torch.testing.assert_close(results.mean(), global_loss(halves()[2]))
