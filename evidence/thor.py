"""THOR: does the consistency loss make experts interchangeable (arXiv 2110.04260)?

A small Llama of four experts a layer, one of which is drawn at random, is trained on the same text
with the consistency of two passes at several coefficients, and evaluated with an expert drawn for
every token. As the coefficient grows, models of one expert alone should come closer to each other,
the loss should depend less on the draw, and at 5 it should be below that at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from evidence._common import Frame, Seeds, Sizes, held_windows, run, verdict
from moesaic.nn.layer import LayerConfig, moe_layers
from moesaic.nn.losses._base import LossConfig, Passes
from moesaic.nn.losses.consistency import consistency_loss

FRAME = Frame()
WIDTH, EXPERTS, DRAWS = 64, 4, 8
COEFS = (0.0, 1.0, 5.0)
WAYS = {f"alpha {coef:g}": coef for coef in COEFS}


def build(coef: float, seed: int) -> Any:
    """Make the model; at 0 it makes both passes, too, so that the work is equal."""
    layer = LayerConfig(num_experts=EXPERTS, width=WIDTH, router="stochastic")
    return FRAME.mixture(seed, layer, {"consistency": {"coef": coef}})


@torch.no_grad()
def alone(model: Any, expert: int, ids_BS: torch.Tensor) -> torch.Tensor:
    """Logits of the model whose every layer has this expert alone."""

    def choose(router: Any, args: Any, routing: Any) -> Any:
        routing.ids_TK.fill_(expert)
        return routing

    handles = [layer.router.register_forward_hook(choose) for layer in moe_layers(model)]
    logits: torch.Tensor = model(input_ids=ids_BS, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits.flatten(0, 1)


def apart(model: Any, windows: int) -> float:
    """Mean divergence of the models of one expert each, over pairs, on held-out text."""
    ids_BS = held_windows(FRAME.length, windows)
    logits = [alone(model, expert, ids_BS) for expert in range(EXPERTS)]
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    gaps = [
        float(consistency_loss(Passes(one, other), mask_BS, LossConfig()))
        for one, other in combinations(logits, 2)
    ]
    return float(np.mean(gaps))


def train(coef: float, seed: int, sizes: Sizes) -> dict[str, float]:
    """Train at one coefficient; held-out loss over draws, and how far experts are apart."""
    model = build(coef, seed)
    FRAME.train(model, seed, sizes["steps"])
    losses = []
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        losses.append(FRAME.validate(model, sizes["windows"])[0])
    return {
        "loss": float(np.mean(losses)),
        "deviation": float(np.std(losses)),
        "apart": apart(model, sizes["windows"]),
    }


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the means over seeds."""
    seeds = Seeds(results)

    def by_coef(measure: str) -> list[float]:
        return [seeds.mean(way, measure) for way in WAYS]

    def falls(values: list[float]) -> bool:
        return values == sorted(values, reverse=True)

    apart, deviation, loss = by_coef("apart"), by_coef("deviation"), by_coef("loss")
    holds = {
        "models of one expert come closer as alpha grows": falls(apart),
        "the loss depends less on the draw as alpha grows": falls(deviation),
        "at alpha 5 the loss is below that at 0": loss[-1] < loss[0],
    }
    found = "; ".join(
        f"{way}: {gap:.4f} nats between models of one expert, loss {value:.3f} with a deviation of "
        f"{spread:.4f} over draws"
        for way, gap, value, spread in zip(WAYS, apart, loss, deviation, strict=True)
    )
    return holds, f"{verdict(holds)}. {found[0].upper()}{found[1:]}."


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "thor",
        argv,
        lambda seed, sizes: {way: train(coef, seed, sizes) for way, coef in WAYS.items()},
        judge,
        config={
            **FRAME.config(),
            "width": WIDTH,
            "experts": EXPERTS,
            "alphas": list(COEFS),
            "draws": DRAWS,
        },
        sizes={"steps": 200, "windows": 64},
    )


if __name__ == "__main__":
    main()
