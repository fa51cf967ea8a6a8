"""RMoE: does a router that hears the layers before route better (arXiv 2408.06793)?

A Llama of six small layers of 8 experts, of which a token uses 2, is trained on the same text with
the recurrent router, with its two ablations (every layer starts from zero; the state goes on
without its gradient) and with the usual linear router. The recurrent one should have the lowest
loss and the most mutual information between the first choices of neighbouring layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from evidence._common import Frame, Seeds, Sizes, held_windows, run, verdict
from moesaic.nn.layer import LayerConfig, moe_layers, record_routing

FRAME = Frame(layers=6)
WIDTH, EXPERTS, TOP_K, SIZE, BALANCE = 32, 8, 2, 32, 0.01
# Memory of the recurrent router; none for the linear one.
WAYS = {"recurrent": "passed", "from zero": "none", "detached": "detached", "linear": None}


def build(memory: str | None, seed: int) -> Any:
    """Make the model."""
    layers = []
    for index in range(FRAME.layers):
        router, options = "topk-softmax", {"top_k": TOP_K, "renormalize": True}
        if memory is not None:
            router = "recurrent-top-k"
            options = {**options, "size": SIZE, "memory": memory, "first": index == 0}
        layers.append(
            LayerConfig(num_experts=EXPERTS, width=WIDTH, router=router, router_options=options)
        )
    model = FRAME.mixture(seed, layers, {"load-balance": {"coef": BALANCE}})
    # The usual deviation of 0.02 gives scores of order one at the paper's width, and at this one
    # next to none, twice over where two maps follow each other.
    with torch.no_grad():
        for moe in moe_layers(model):
            for router in moe.routers():
                for name, parameter in router.named_parameters():
                    if not name.startswith("cell."):
                        parameter.mul_(parameter.shape[1] ** -0.5 / 0.02)
    return model


def information(one_T: torch.Tensor, other_T: torch.Tensor) -> float:
    """Mutual information of two choices, in nats."""
    joint_EE = torch.bincount(one_T * EXPERTS + other_T, minlength=EXPERTS**2).double()
    joint_EE = joint_EE.reshape(EXPERTS, EXPERTS) / len(one_T)
    apart_EE = joint_EE.sum(1, keepdim=True) * joint_EE.sum(0)
    both_EE = joint_EE > 0
    return float((joint_EE[both_EE] * (joint_EE[both_EE] / apart_EE[both_EE]).log()).sum())


@torch.no_grad()
def neighbours(model: Any, windows: int) -> float:
    """Mean information between the first choices of neighbouring layers, on held-out text."""
    with record_routing(model) as routings:
        model(input_ids=held_windows(FRAME.length, windows), use_cache=False)
    first = [routing.ids_TK[:, 0] for routing in routings]
    return float(np.mean([information(a, b) for a, b in pairwise(first)]))


def train(memory: str | None, seed: int, sizes: Sizes) -> dict[str, float]:
    """Train one way; its loss, and what layers tell of each other, on held-out text."""
    model = build(memory, seed)
    FRAME.train(model, seed, sizes["steps"])
    loss, _ = FRAME.validate(model, sizes["windows"])
    return {"loss": loss, "information": neighbours(model, sizes["windows"])}


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the means over seeds."""
    seeds = Seeds(results)
    loss = {way: seeds.mean(way, "loss") for way in WAYS}
    told = {way: seeds.mean(way, "information") for way in WAYS}
    holds = {
        "the loss is at most that of the linear router": loss["recurrent"] <= loss["linear"],
        "from zero or detached the loss is higher": max(loss["from zero"], loss["detached"])
        > loss["recurrent"],
        "neighbouring layers tell more of each other than with the linear router": told["recurrent"]
        > told["linear"],
    }
    found = "; ".join(f"{way} {loss[way]:.3f} and {told[way]:.2f}" for way in WAYS)
    return holds, (
        f"{verdict(holds)}. Nats per byte, and nats of information between the first choices of "
        f"neighbouring layers: {found}."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "rmoe",
        argv,
        lambda seed, sizes: {way: train(memory, seed, sizes) for way, memory in WAYS.items()},
        judge,
        config={
            **FRAME.config(),
            "width": WIDTH,
            "experts": EXPERTS,
            "top_k": TOP_K,
            "size": SIZE,
            "balance": BALANCE,
        },
        sizes={"steps": 220, "windows": 64},
    )


if __name__ == "__main__":
    main()
