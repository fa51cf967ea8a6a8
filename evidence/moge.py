"""MoGE: are devices even when every token takes as many experts of each (arXiv 2505.21411)?

A small Llama of 16 experts a layer, of which a token uses 4, is trained on the same text by plain
top-4 and by the best of each of 4 groups, with the same load balance loss. The devices that hold
the groups should carry equal work in every batch of 16 tokens, at a loss within the noise of plain
top-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from evidence._common import Frame, Seeds, Sizes, run, text_bytes, verdict
from moesaic.nn.layer import LayerConfig, record_routing

FRAME = Frame()
WIDTH, EXPERTS, GROUPS, BALANCE, TOKENS = 32, 16, 4, 1e-2, 16
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("topk-softmax", {"top_k": GROUPS, "renormalize": False}),
    "grouped": ("grouped-top-k", {"num_groups": GROUPS}),
}


@torch.no_grad()
def device_loads(model: Any, batches: int) -> dict[str, float]:
    """Busiest device over the mean and imbalance score, means over batches of 16 tokens."""
    _, held = text_bytes()
    ids_BS = held[: batches * TOKENS].reshape(batches, TOKENS)
    with record_routing(model) as routings:
        model(input_ids=ids_BS, use_cache=False)
    active_LBSE = torch.stack([r.active_TE().reshape(batches, TOKENS, EXPERTS) for r in routings])
    load_LBG = active_LBSE.sum(2).unflatten(-1, (GROUPS, -1)).sum(-1).double()
    most_LB, least_LB = load_LBG.amax(-1), load_LBG.amin(-1)
    return {
        "max_over_mean": float((most_LB / load_LBG.mean(-1)).mean()),
        "imbalance": float(((most_LB - least_LB) / TOKENS).mean()),
        "even_batches": float((most_LB == least_LB).double().mean()),
    }


def train(way: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Train one way; its loss and how even its devices are on held-out text."""
    router, options = WAYS[way]
    layer = LayerConfig(num_experts=EXPERTS, width=WIDTH, router=router, router_options=options)
    losses = {"load-balance": {"coef": BALANCE, "share_of": "choices"}}
    model = FRAME.mixture(seed, layer, losses)
    FRAME.train(model, seed, sizes["steps"])
    loss, _ = FRAME.validate(model, sizes["windows"])
    return {"loss": loss, **device_loads(model, sizes["windows"])}


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the seeds."""
    seeds = Seeds(results)
    more_S = np.subtract(seeds.values("grouped", "loss"), seeds.values("plain", "loss"))
    noise = float(np.ptp(seeds.values("plain", "loss")))
    holds = {
        "every batch is even with groups": min(seeds.values("grouped", "even_batches")) == 1.0,
        "hardly any is without (under one in twenty)": max(seeds.values("plain", "even_batches"))
        < 0.05,
        "the loss is within 0.03 nats of plain top-4": bool(abs(more_S.mean()) < 0.03),
    }
    ratio = seeds.mean("plain", "max_over_mean")
    score = seeds.mean("plain", "imbalance")
    return holds, (
        f"{verdict(holds)}; in batches of {TOKENS} tokens the busiest of {GROUPS} "
        f"devices has {ratio:.2f} times the mean work by plain top-{GROUPS} (imbalance score "
        f"{score:.2f}) and exactly the mean by groups, whose loss differs by {more_S.mean():+.3f} "
        f"nats per byte (seeds of plain top-{GROUPS} lie {noise:.3f} apart)."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "moge",
        argv,
        lambda seed, sizes: {way: train(way, seed, sizes) for way in WAYS},
        judge,
        config={
            **FRAME.config(),
            "width": WIDTH,
            "experts": EXPERTS,
            "groups": GROUPS,
            "balance": BALANCE,
        },
        sizes={"steps": 250, "windows": 64},
    )


if __name__ == "__main__":
    main()
