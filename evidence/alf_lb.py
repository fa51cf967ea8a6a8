"""Loss-free balancing: does a choice bias that moves even the load (arXiv 2408.15664, 2512.03915)?

A small Llama of 16 experts a layer, of which a token uses 2, starts from routers that favour four
of them. It is trained on the same text with no balancing, with the bias, and with a load balance
loss. The bias should bring the busiest expert to at most 1.3 times the mean load, where it is above
2 without, at a loss no higher than with the auxiliary loss.

Loads are those of held-out blocks of all documents. The bias evens what is chosen in the text that
it moved by, and not in every part of it: loads in eighths of the held-out text are shown beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evidence._common import (
    Frame,
    Seeds,
    Sizes,
    alike_bytes,
    load_by_chance,
    run,
    skew_routers,
    verdict,
)
from moesaic.nn.layer import LayerConfig

FRAME = Frame()
WIDTH, EXPERTS, TOP_K = 32, 16, 2
FAVOURITES, SKEW, STEP, BALANCE = 4, 10.0, 0.001, 1e-2
PARTS, WINDOWS = 8, 512
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "bias": ({"bias_step": STEP}, {}),
    "loss": ({}, {"load-balance": {"coef": BALANCE, "share_of": "choices"}}),
}


def train(way: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Train one way; loss, and load of the busiest expert over the mean, on held-out text."""
    options, losses = WAYS[way]
    layer = LayerConfig(
        num_experts=EXPERTS,
        width=WIDTH,
        router="sigmoid-top-k",
        router_options={"top_k": TOP_K, "normalize": True, **options},
    )
    model = FRAME.mixture(seed, layer, losses)
    skew_routers(model, FAVOURITES, SKEW)
    text, held = alike_bytes()
    windows = sizes["windows"]
    start = FRAME.loads(model, windows, held)
    FRAME.train(model, seed, sizes["steps"], text=text)
    loss, _ = FRAME.validate(model, windows, held)
    parts = [FRAME.loads(model, windows // PARTS, part) for part in held.chunk(PARTS)]
    return {
        "loss": loss,
        "load_at_start": start,
        "load": FRAME.loads(model, windows, held),
        "load_in_parts": np.mean(parts, axis=0).tolist(),
    }


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the seeds; loads are means over layers."""
    seeds = Seeds(results)
    holds = {
        "without balancing the busiest expert has over twice the mean, on every seed": min(
            seeds.values("none", "load")
        )
        > 2.0,
        "with the bias it has at most 1.3 times the mean, on every seed": max(
            seeds.values("bias", "load")
        )
        <= 1.3,
        "the loss with the bias is at most that with the auxiliary loss": seeds.mean("bias", "loss")
        <= seeds.mean("loss", "loss"),
    }
    choices = WINDOWS * FRAME.length * TOP_K
    chance, chance_in_parts = (load_by_chance(n, EXPERTS) for n in (choices, choices // PARTS))
    none, bias, aux = (seeds.mean(way, "load") for way in WAYS)
    return holds, (
        f"{verdict(holds)}; the busiest of {EXPERTS} experts has {none:.2f} times the mean load "
        f"without balancing, {bias:.2f} with the bias and {aux:.2f} with the loss, where chance "
        f"makes {chance:.2f} of even choices; in an eighth of the text the bias leaves "
        f"{seeds.mean('bias', 'load_in_parts'):.2f} ({chance_in_parts:.2f} by chance); "
        f"nats per byte are {seeds.mean('none', 'loss'):.3f}, "
        f"{seeds.mean('bias', 'loss'):.3f} and {seeds.mean('loss', 'loss'):.3f}."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "alf-lb",
        argv,
        lambda seed, sizes: {way: train(way, seed, sizes) for way in WAYS},
        judge,
        config={
            **FRAME.config(),
            "width": WIDTH,
            "experts": EXPERTS,
            "top_k": TOP_K,
            "favourites": FAVOURITES,
            "skew": SKEW,
            "bias_step": STEP,
            "balance": BALANCE,
        },
        sizes={"steps": 1000, "windows": WINDOWS},
    )


if __name__ == "__main__":
    main()
