"""Chain-of-Experts: is it better to run few experts twice than many once (arXiv 2506.18945)?

A small Llama of 16 experts a layer is trained on the same text with 4 experts chosen once, and with
2 chosen twice in a row: with a router for each iteration and with one for both; where the decoder
adds the input of the layer itself (`change`), and as the paper writes it, so that it is added twice
(`inner`); and without any residual between iterations. All run 4 experts for a token. The chain
should have a lower loss than one choice, and with one router a higher one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evidence._common import Frame, Seeds, Sizes, run, verdict
from moesaic.nn.layer import LayerConfig

FRAME = Frame(layers=4)
WIDTH, EXPERTS, CALLS, BALANCE = 16, 16, 4, 0.001
WAYS: dict[str, dict[str, Any]] = {
    "once": {"iterations": 1},
    "chain": {"iterations": 2, "iteration_residual": "change"},
    "one router": {"iterations": 2, "iteration_residual": "change", "one_router": True},
    "once, inner": {"iterations": 1, "iteration_residual": "inner"},
    "chain, inner": {"iterations": 2, "iteration_residual": "inner"},
    "chain, no residual": {"iterations": 2, "iteration_residual": "none"},
}


def train(way: str, seed: int, sizes: Sizes) -> dict[str, float]:
    """Train one way; its loss, and how many experts run for a token, on held-out text."""
    options = WAYS[way]
    layer = LayerConfig(
        num_experts=EXPERTS,
        width=WIDTH,
        router="topk-softmax",
        router_options={"top_k": CALLS // options["iterations"], "renormalize": False},
        **options,
    )
    losses = {"load-balance": {"coef": BALANCE, "scope": "sequence"}}
    model = FRAME.mixture(seed, layer, losses)
    FRAME.train(model, seed, sizes["steps"])
    loss, experts = FRAME.validate(model, sizes["windows"])
    return {"loss": loss, "calls": sum(experts) / FRAME.layers}


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the means over seeds."""
    seeds = Seeds(results)
    loss = {way: seeds.mean(way, "loss") for way in WAYS}
    holds = {
        f"every way runs {CALLS} experts for a token": all(
            abs(seeds.mean(way, "calls") - CALLS) < 1e-6 for way in WAYS
        ),
        "a chain has a lower loss than one choice of as many": loss["chain"] < loss["once"],
        "one router for both iterations has a higher loss than one choice": loss["one router"]
        > loss["once"],
    }
    best = min(("chain", "chain, inner"), key=lambda way: loss[way])
    found = "; ".join(f"{way} {value:.3f}" for way, value in loss.items())
    form = "once, by the decoder" if best == "chain" else "twice, as the paper writes it"
    return holds, (
        f"{verdict(holds)}. Nats per byte: {found}. Of the two forms of the chain, the better has "
        f"the layer's input added {form}."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "chain-of-experts",
        argv,
        lambda seed, sizes: {way: train(way, seed, sizes) for way in WAYS},
        judge,
        config={
            **FRAME.config(),
            "width": WIDTH,
            "experts": EXPERTS,
            "calls": CALLS,
            "balance": BALANCE,
        },
        sizes={"steps": 150, "windows": 64},
    )


if __name__ == "__main__":
    main()
