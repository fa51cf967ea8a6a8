"""Sigma-MoE-Tiny: do low layers balance if they start with more experts (arXiv 2512.16248)?

A small Llama of 8 layers of 32 experts, of which a token uses 1, is trained on the same text with
the same balance loss: with one expert from the first step on, and with 8 and 4 experts in the two
lowest layers for most of the steps. With one, the lowest layer should be less even than the
seventh, its probabilities even while its loads are not; after the early stage it should be more
even than with one from the start, at a final loss no worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evidence._common import Frame, Seeds, Sizes, run, text_bytes, verdict
from moesaic.nn.layer import LayerConfig, record_routing

FRAME = Frame(layers=8)
WIDTH, EXPERTS, BALANCE = 16, 32, 1e-2
LOW, HIGH = 0, 6
WAYS: dict[str, tuple[int, ...]] = {"one": (1,) * 8, "progressive": (8, 4, 1, 1, 1, 1, 1, 1)}


def evenness(share_E: Tensor) -> float:
    """Entropy of a distribution over that of an even one."""
    return float(torch.special.entr(share_E.double()).sum() / np.log(EXPERTS))


@torch.no_grad()
def layers(model: Any, windows: int) -> dict[str, list[float]]:
    """How even every layer is on held-out text: loads, dead experts, probabilities."""
    _, held = text_bytes()
    starts = np.linspace(0, len(held) - FRAME.length - 1, windows).astype(int)
    ids_BS = torch.stack([held[start : start + FRAME.length] for start in starts])
    with record_routing(model) as routings:
        model(input_ids=ids_BS, use_cache=False)
    loads = [routing.counts_E() / routing.ids_TK.shape[0] for routing in routings]
    return {
        "load": [float(load_E.max() * EXPERTS) for load_E in loads],
        "dead": [float((load_E == 0).sum()) for load_E in loads],
        "load_evenness": [evenness(load_E) for load_E in loads],
        "probability_evenness": [evenness(r.scores_TE.softmax(-1).mean(0)) for r in routings],
    }


def train(way: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Train one way; its loss, and how even its lowest and its seventh layer are."""
    made = [
        LayerConfig(
            num_experts=EXPERTS,
            width=WIDTH,
            router="progressive-top-k",
            router_options={"early_top_k": early, "early_steps": sizes["early_steps"]},
        )
        for early in WAYS[way]
    ]
    losses = {"load-balance": {"coef": BALANCE, "share_of": "choices"}}
    model = FRAME.mixture(seed, made, losses)
    FRAME.train(model, seed, sizes["steps"])
    loss, active = FRAME.validate(model, sizes["windows"])
    found = layers(model, sizes["windows"])
    ends = {
        f"{measure}_{name}": values[index]
        for measure, values in found.items()
        for name, index in (("low", LOW), ("high", HIGH))
    }
    return {"loss": loss, "active": active, **ends, "layers": found}


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the means over seeds."""
    seeds = Seeds(results)
    one, progressive = (
        {key: seeds.mean(way, key) for key in results["seeds"][0][way] if key != "layers"}
        for way in WAYS
    )
    holds = {
        "with one expert from the start the lowest layer is less even than the seventh": one[
            "load_low"
        ]
        > one["load_high"],
        "the lowest layer then has more dead experts than the seventh": one["dead_low"]
        > one["dead_high"],
        "the probabilities of the lowest layer are more even than its loads": one[
            "probability_evenness_low"
        ]
        > one["load_evenness_low"],
        "after an early stage of more experts the lowest layer is more even than without": (
            progressive["load_low"] < one["load_low"]
        ),
        "the final loss is no worse (within 0.02 nats)": progressive["loss"] < one["loss"] + 0.02,
        "tokens use one expert in every layer at the end": progressive["active"] == 1.0,
    }
    return holds, (
        f"{verdict(holds)}; the busiest of {EXPERTS} experts of the lowest layer has "
        f"{one['load_low']:.2f} times the mean load with one expert from the start "
        f"({one['dead_low']:.1f} dead) and {progressive['load_low']:.2f} after an early stage "
        f"({progressive['dead_low']:.1f} dead), that of the seventh {one['load_high']:.2f} and "
        f"{progressive['load_high']:.2f}; the evenness of probabilities and loads in the lowest "
        f"layer is {one['probability_evenness_low']:.3f} and {one['load_evenness_low']:.3f} with "
        f"one; nats per byte are {one['loss']:.3f} and {progressive['loss']:.3f}."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "sigma-moe-tiny",
        argv,
        lambda seed, sizes: {way: train(way, seed, sizes) for way in WAYS},
        judge,
        config={
            **FRAME.config(),
            "width": WIDTH,
            "experts": EXPERTS,
            "balance": BALANCE,
            "early_top_k": {way: list(early) for way, early in WAYS.items()},
        },
        sizes={"steps": 300, "early_steps": 240, "windows": 64},
    )


if __name__ == "__main__":
    main()
