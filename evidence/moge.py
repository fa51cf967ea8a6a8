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
from torch import Tensor

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
from moesaic.nn.layer import LayerConfig, record_routing

LAYERS, DIM, WIDTH, EXPERTS, GROUPS = 2, 32, 32, 16, 4
LENGTH, BATCH, RATE, BALANCE, TOKENS = 48, 12, 3e-3, 1e-2, 16
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("topk-softmax", {"top_k": GROUPS, "renormalize": False}),
    "grouped": ("grouped-top-k", {"num_groups": GROUPS}),
}


@torch.no_grad()
def device_loads(model: Any, held: Tensor, batches: int) -> dict[str, float]:
    """Busiest device over the mean and imbalance score, means over batches of 16 tokens."""
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


def train(way: str, seed: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Train one way; its loss and how even its devices are on held-out text."""
    data, held = text_bytes(400_000, 60_000)
    torch.manual_seed(seed)
    router, options = WAYS[way]
    layer = LayerConfig(num_experts=EXPERTS, width=WIDTH, router=router, router_options=options)
    losses = {"load-balance": {"coef": BALANCE, "share_of": "choices"}}
    model = tiny_mixture(tiny_config(layers=LAYERS, dim=DIM, width=WIDTH), to_plain(layer), losses)
    generator = torch.Generator().manual_seed(seed)
    optimise(model, lambda: batch(data, BATCH, LENGTH, generator), sizes["steps"], RATE)
    loss, _ = validate(model, held, LENGTH, sizes["windows"])
    return {"loss": loss, **device_loads(model, held, sizes["windows"])}


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the seeds."""
    seeds = results["seeds"]

    def values(way: str, key: str) -> list[float]:
        return [seed[way][key] for seed in seeds]

    more_S = np.subtract(values("grouped", "loss"), values("plain", "loss"))
    noise = float(np.ptp(values("plain", "loss")))
    holds = {
        "every batch is even with groups": min(values("grouped", "even_batches")) == 1.0,
        "hardly any is without (under one in twenty)": max(values("plain", "even_batches")) < 0.05,
        "the loss is within 0.03 nats of plain top-4": bool(abs(more_S.mean()) < 0.03),
    }
    missed = [claim for claim, true in holds.items() if not true]
    verdict = (
        "all came out at this scale" if not missed else f"not at this scale: {'; '.join(missed)}"
    )
    ratio = float(np.mean(values("plain", "max_over_mean")))
    score = float(np.mean(values("plain", "imbalance")))
    return holds, (
        f"The card's predictions: {verdict}; in batches of {TOKENS} tokens the busiest of {GROUPS} "
        f"devices has {ratio:.2f} times the mean work by plain top-{GROUPS} (imbalance score "
        f"{score:.2f}) and exactly the mean by groups, whose loss differs by {more_S.mean():+.3f} "
        f"nats per byte (seeds of plain top-{GROUPS} lie {noise:.3f} apart)."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    options = arguments("MoGE", argv)
    sizes = {"steps": 3 if options.quick else 250, "windows": 8 if options.quick else 64}
    seeds = (0,) if options.quick else (0, 1, 2)
    results = {"seeds": [{"seed": s, **{way: train(way, s, sizes) for way in WAYS}} for s in seeds]}
    holds, sentence = judge(results)
    config = {
        "layers": LAYERS,
        "dim": DIM,
        "width": WIDTH,
        "experts": EXPERTS,
        "groups": GROUPS,
        "length": LENGTH,
        "batch": BATCH,
        "rate": RATE,
        "balance": BALANCE,
        **sizes,
    }
    return write_result("moge", options.out, config, results, holds, sentence)


if __name__ == "__main__":
    main()
