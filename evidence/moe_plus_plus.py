"""MoE++: do tokens use fewer networks as free experts count less (arXiv 2410.07348)?

A small Llama of 8 experts a layer, of which a token uses 2, is trained on the same text with a
zero, a copy and two constant experts beside them, residuals between routers, and the balance loss
at several tau; and without any of it. The mean number of networks a token uses should fall with tau
as the formula says, at a loss no worse than without at the paper's tau of 0.75.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evidence._common import Frame, Seeds, Sizes, run, verdict
from moesaic.nn.layer import LayerConfig

FRAME = Frame()
WIDTH, EXPERTS, TOP_K, FREE = 32, 8, 2, 4
# The paper's beta is 0.01 over far more steps; balance has to act within hundreds.
BALANCE = 0.1
TAUS = (1.0, 0.75, 0.1)
WAYS: dict[str, float | None] = {f"tau {tau:g}": tau for tau in TAUS} | {"plain": None}


def build(tau: float | None, seed: int) -> Any:
    """Make the model, plain where there is no tau."""
    options: dict[str, Any] = {"top_k": TOP_K}
    router = "zero-computation"
    losses: dict[str, Any] = {"heterogeneous-balance": {"coef": BALANCE, "tau": tau}}
    if tau is None:
        router, options["renormalize"] = "topk-softmax", False
        # The same loss but for a factor E.
        losses = {"load-balance": {"coef": BALANCE / EXPERTS}}
    layers = []
    for index in range(FRAME.layers):
        if tau is not None:
            options = {**options, "residual": index > 0}
        layers.append(
            LayerConfig(num_experts=EXPERTS, width=WIDTH, router=router, router_options=options)
        )
    return FRAME.mixture(seed, layers, losses)


def train(tau: float | None, seed: int, sizes: Sizes) -> dict[str, float]:
    """Train one way; its loss and how many networks a token uses, on held-out text."""
    model = build(tau, seed)
    FRAME.train(model, seed, sizes["steps"])
    loss, experts = FRAME.validate(model, sizes["windows"])
    return {"loss": loss, "experts": float(np.mean(experts))}


def expected(tau: float) -> float:
    """Networks per token where the loss is at balance."""
    return TOP_K * tau * EXPERTS / (tau * EXPERTS + FREE)


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the means over seeds."""
    seeds = Seeds(results)
    ways = [f"tau {tau:g}" for tau in TAUS]
    counts = [seeds.mean(way, "experts") for way in ways]
    formula = [expected(tau) for tau in TAUS]
    holds = {
        "a smaller tau uses fewer networks": counts == sorted(counts, reverse=True),
        "their number is within 0.25 of the formula": max(
            abs(a - b) for a, b in zip(counts, formula, strict=True)
        )
        < 0.25,
        "at tau 0.75 the loss is no worse than without free experts (within 0.02 nats)": seeds.mean(
            "tau 0.75", "loss"
        )
        < seeds.mean("plain", "loss") + 0.02,
    }
    found = "; ".join(
        f"{way}: {count:.2f} networks ({by:.2f} by the formula) at {seeds.mean(way, 'loss'):.3f}"
        for way, count, by in zip(ways, counts, formula, strict=True)
    )
    return holds, (
        f"{verdict(holds)}. {found} nats per byte; plain top-{TOP_K} reaches "
        f"{seeds.mean('plain', 'loss'):.3f} with {TOP_K}."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "moe-plus-plus",
        argv,
        lambda seed, sizes: {way: train(tau, seed, sizes) for way, tau in WAYS.items()},
        judge,
        config={
            **FRAME.config(),
            "width": WIDTH,
            "experts": EXPERTS,
            "free": FREE,
            "top_k": TOP_K,
            "taus": list(TAUS),
            "balance": BALANCE,
        },
        sizes={"steps": 200, "windows": 64},
    )


if __name__ == "__main__":
    main()
