"""DeepSeekMoE: do fine experts and a shared one beat coarse experts (arXiv 2401.06066)?

Two small Llamas with the same weights and the same active weights per token learn the same text: 8
experts of which a token uses 2, and a quarter of their width, 31 of which it uses 7 beside one that
is shared. The second should reach the lower loss. Then, without training, its shared expert is
taken away for one routed expert more, and instead the routed expert that is used most: the first
should cost far more than the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evidence._common import Frame, Seeds, Sizes, run, text_bytes, verdict
from moesaic.nn.layer import LayerConfig, moe_layers, record_routing

FRAME = Frame(dim=48)
WIDTH, BALANCE = 24, 1e-2


def layer(top_k: int, *, fine: bool) -> LayerConfig:
    """Coarse experts, or a quarter of their width and one that is shared."""
    return LayerConfig(
        num_experts=31 if fine else 8,
        width=WIDTH if fine else 4 * WIDTH,
        shared_width=WIDTH if fine else 0,
        router="topk-softmax",
        router_options={"top_k": top_k, "renormalize": False},
    )


def build(seed: int, top_k: int, *, fine: bool) -> Any:
    """Make one of the models, with the paper's loss."""
    losses = {"load-balance": {"coef": BALANCE, "share_of": "choices"}}
    return FRAME.mixture(seed, layer(top_k, fine=fine), losses, 4 * WIDTH)


@torch.no_grad()
def ablate(model: Any, windows: int) -> dict[str, float]:
    """Loss without the shared expert and one more routed, and without the busiest routed one."""
    wider = build(0, 8, fine=True)
    wider.load_state_dict(model.state_dict())
    for moe in moe_layers(wider):
        assert moe.shared is not None
        moe.shared.weights().down.zero_()
    _, held = text_bytes()
    shared, _ = FRAME.validate(wider, windows)
    with record_routing(model) as routings:
        model(input_ids=held[: 16 * FRAME.length].reshape(16, FRAME.length), use_cache=False)
    busiest = [int(routing.counts_E().argmax()) for routing in routings]
    handles = [
        moe.router.register_forward_hook(without(expert))
        for moe, expert in zip(moe_layers(model), busiest, strict=True)
        if moe.router is not None
    ]
    routed, _ = FRAME.validate(model, windows)
    for handle in handles:
        handle.remove()
    return {"without shared": shared, "without a routed one": routed}


def without(expert: int) -> Any:
    """A hook that routes by the next best where a token chose one expert."""

    def choose_again(router: nn.Module, args: tuple[Tensor, ...], routing: Any) -> Any:
        scores_TE = routing.scores_TE.clone()
        scores_TE[:, expert] = -torch.inf
        ids_TK = scores_TE.topk(routing.ids_TK.shape[1], dim=1).indices
        weights_TK = routing.scores_TE.softmax(-1).gather(1, ids_TK)
        return type(routing)(ids_TK, weights_TK, scores_TE, routing.num_experts)

    return choose_again


def one_seed(seed: int, sizes: Sizes) -> dict[str, Any]:
    """Train both models on the same text and ablate the second."""
    out: dict[str, Any] = {}
    for name, top_k, fine in (("coarse", 2, False), ("fine", 7, True)):
        model = build(seed, top_k, fine=fine)
        FRAME.train(model, seed, sizes["steps"])
        loss, experts = FRAME.validate(model, sizes["windows"])
        weights = sum(p.numel() for p in model.parameters())
        out[name] = {"loss": loss, "experts": experts, "weights": weights}
    out["fine"] |= ablate(model, sizes["windows"])
    return out


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the means over seeds."""
    seeds = Seeds(results)
    coarse, fine = seeds.mean("coarse", "loss"), seeds.mean("fine", "loss")
    shared = seeds.mean("fine", "without shared") - fine
    routed = seeds.mean("fine", "without a routed one") - fine
    better = sum(seed["fine"]["loss"] < seed["coarse"]["loss"] for seed in seeds.all)
    holds = {
        "fine experts and a shared one reach a lower loss": fine < coarse,
        "they do on every seed": better == len(seeds.all),
        "losing the shared expert costs over twice a routed one": shared > 2 * max(routed, 0.0),
    }
    return holds, (
        f"{verdict(holds)}; 1 shared and 7 of 31 fine experts reach {fine:.3f} "
        f"nats per byte where 2 of 8 coarse ones reach {coarse:.3f}, lower on {better} of "
        f"{len(seeds.all)} seeds; without its shared expert the loss rises by {shared:.3f}, "
        f"without its busiest routed one by {routed:.3f}."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "deepseekmoe",
        argv,
        one_seed,
        judge,
        config={**FRAME.config(), "fine_width": WIDTH, "balance": BALANCE},
        sizes={"steps": 250, "windows": 64},
    )


if __name__ == "__main__":
    main()
