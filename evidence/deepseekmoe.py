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

import numpy as np
import torch
from torch import Tensor, nn

from evidence._common import (
    arguments,
    batch,
    optimise,
    text_bytes,
    tiny_config,
    tiny_mixture,
    validate,
    write_result,
)
from moesaic._config import to_plain
from moesaic.nn.layer import LayerConfig, moe_layers, record_routing

LAYERS, DIM, WIDTH, LENGTH, BATCH, BALANCE, RATE = 2, 48, 24, 48, 12, 1e-2, 3e-3


def layer(top_k: int, *, fine: bool) -> LayerConfig:
    """Coarse experts, or a quarter of their width and one that is shared."""
    return LayerConfig(
        num_experts=31 if fine else 8,
        width=WIDTH if fine else 4 * WIDTH,
        shared_width=WIDTH if fine else 0,
        router="topk-softmax",
        router_options={"top_k": top_k, "renormalize": False},
    )


def build(top_k: int, *, fine: bool) -> Any:
    """Make one of the models, with the paper's loss."""
    losses = {"load-balance": {"coef": BALANCE, "share_of": "choices"}}
    config = tiny_config(layers=LAYERS, dim=DIM, width=4 * WIDTH)
    return tiny_mixture(config, to_plain(layer(top_k, fine=fine)), losses)


@torch.no_grad()
def ablate(model: Any, held: Tensor, windows: int) -> dict[str, float]:
    """Loss without the shared expert and one more routed, and without the busiest routed one."""
    wider = build(8, fine=True)
    wider.load_state_dict(model.state_dict())
    for moe in moe_layers(wider):
        assert moe.shared is not None
        moe.shared.weights().down.zero_()
    shared, _ = validate(wider, held, LENGTH, windows)
    with record_routing(model) as routings:
        model(input_ids=held[: 16 * LENGTH].reshape(16, LENGTH), use_cache=False)
    busiest = [int(routing.counts_E().argmax()) for routing in routings]
    handles = [
        moe.router.register_forward_hook(without(expert))
        for moe, expert in zip(moe_layers(model), busiest, strict=True)
        if moe.router is not None
    ]
    routed, _ = validate(model, held, LENGTH, windows)
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


def one_seed(seed: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Train both models on the same text and ablate the second."""
    train, held = text_bytes(400_000, 60_000)
    out: dict[str, Any] = {"seed": seed}
    for name, top_k, fine in (("coarse", 2, False), ("fine", 7, True)):
        torch.manual_seed(seed)
        model = build(top_k, fine=fine)
        generator = torch.Generator().manual_seed(seed)
        draw = batch(train, BATCH * sizes["steps"], LENGTH, generator).split(BATCH)
        optimise(model, iter(draw).__next__, sizes["steps"], RATE)
        loss, experts = validate(model, held, LENGTH, sizes["windows"])
        weights = sum(p.numel() for p in model.parameters())
        out[name] = {"loss": loss, "experts": experts, "weights": weights}
    out["fine"] |= ablate(model, held, sizes["windows"])
    return out


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the means over seeds."""

    def mean(way: str, key: str) -> float:
        return float(np.mean([seed[way][key] for seed in results["seeds"]]))

    coarse, fine = mean("coarse", "loss"), mean("fine", "loss")
    shared = mean("fine", "without shared") - fine
    routed = mean("fine", "without a routed one") - fine
    better = sum(seed["fine"]["loss"] < seed["coarse"]["loss"] for seed in results["seeds"])
    holds = {
        "fine experts and a shared one reach a lower loss": fine < coarse,
        "they do on every seed": better == len(results["seeds"]),
        "losing the shared expert costs over twice a routed one": shared > 2 * max(routed, 0.0),
    }
    missed = [claim for claim, true in holds.items() if not true]
    verdict = (
        "all came out at this scale" if not missed else f"not at this scale: {'; '.join(missed)}"
    )
    return holds, (
        f"The card's predictions: {verdict}; 1 shared and 7 of 31 fine experts reach {fine:.3f} "
        f"nats per byte where 2 of 8 coarse ones reach {coarse:.3f}, lower on {better} of "
        f"{len(results['seeds'])} seeds; without its shared expert the loss rises by {shared:.3f}, "
        f"without its busiest routed one by {routed:.3f}."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    options = arguments("DeepSeekMoE", argv)
    sizes = {"steps": 3 if options.quick else 250, "windows": 8 if options.quick else 64}
    seeds = (0,) if options.quick else (0, 1, 2)
    results = {"seeds": [one_seed(seed, sizes) for seed in seeds]}
    holds, sentence = judge(results)
    config = {
        "layers": LAYERS,
        "dim": DIM,
        "fine_width": WIDTH,
        "length": LENGTH,
        "batch": BATCH,
        "balance": BALANCE,
        "rate": RATE,
        **sizes,
    }
    return write_result("deepseekmoe", options.out, config, results, holds, sentence)


if __name__ == "__main__":
    main()
