"""Loss-free balancing: does a choice bias that moves even the load (arXiv 2408.15664, 2512.03915)?

A small Llama of 16 experts a layer, of which a token uses 2, starts from routers that favour four
of them. It is trained on the same text with no balancing, with the bias, and with a load balance
loss. The bias should bring the busiest expert to at most 1.3 times the mean load, where it is above
2 without, at a loss no higher than with the auxiliary loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from evidence._common import (
    arguments,
    batch,
    max_over_mean,
    optimise,
    skew_routers,
    text_bytes,
    tiny_config,
    tiny_mixture,
    validate,
    write_result,
)
from moesaic._config import to_plain
from moesaic.nn.layer import LayerConfig

LAYERS, DIM, WIDTH, EXPERTS, TOP_K = 2, 32, 32, 16, 2
LENGTH, BATCH, RATE = 48, 12, 3e-3
FAVOURITES, SKEW, STEP, BALANCE = 4, 10.0, 0.005, 1e-2
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "bias": ({"bias_step": STEP}, {}),
    "loss": ({}, {"load-balance": {"coef": BALANCE, "share_of": "choices"}}),
}


def train(way: str, seed: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Train one way; loss, and load of the busiest expert over the mean, on held-out text."""
    data, held = text_bytes(400_000, 60_000)
    options, losses = WAYS[way]
    torch.manual_seed(seed)
    layer = LayerConfig(
        num_experts=EXPERTS,
        width=WIDTH,
        router="sigmoid-top-k",
        router_options={"top_k": TOP_K, "normalize": True, **options},
    )
    config = tiny_config(layers=LAYERS, dim=DIM, width=WIDTH)
    model = tiny_mixture(config, to_plain(layer), losses)
    skew_routers(model, FAVOURITES, SKEW)
    start = max_over_mean(model, held, LENGTH, sizes["windows"])
    generator = torch.Generator().manual_seed(seed)
    optimise(model, lambda: batch(data, BATCH, LENGTH, generator), sizes["steps"], RATE)
    loss, _ = validate(model, held, LENGTH, sizes["windows"])
    end = max_over_mean(model, held, LENGTH, sizes["windows"])
    return {"loss": loss, "load_at_start": start, "load": end}


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the seeds; loads are means over layers."""
    seeds = results["seeds"]

    def loads(way: str) -> list[float]:
        return [float(np.mean(seed[way]["load"])) for seed in seeds]

    def loss(way: str) -> float:
        return float(np.mean([seed[way]["loss"] for seed in seeds]))

    holds = {
        "without balancing the busiest expert has over twice the mean, on every seed": min(
            loads("none")
        )
        > 2.0,
        "with the bias it has at most 1.3 times the mean, on every seed": max(loads("bias")) <= 1.3,
        "the loss with the bias is at most that with the auxiliary loss": loss("bias")
        <= loss("loss"),
    }
    missed = [claim for claim, true in holds.items() if not true]
    verdict = (
        "all came out at this scale" if not missed else f"not at this scale: {'; '.join(missed)}"
    )
    none, bias, aux = (float(np.mean(loads(way))) for way in ("none", "bias", "loss"))
    return holds, (
        f"The card's predictions: {verdict}; the busiest of {EXPERTS} experts has {none:.2f} times "
        f"the mean load without balancing, {bias:.2f} with the bias and {aux:.2f} with the loss; "
        f"nats per byte are {loss('none'):.3f}, {loss('bias'):.3f} and {loss('loss'):.3f}."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    options = arguments("loss-free balancing", argv)
    sizes = {"steps": 3 if options.quick else 1000, "windows": 8 if options.quick else 64}
    seeds = (0,) if options.quick else (0, 1, 2)
    results = {"seeds": [{"seed": s, **{way: train(way, s, sizes) for way in WAYS}} for s in seeds]}
    holds, sentence = judge(results)
    config = {
        "layers": LAYERS,
        "dim": DIM,
        "width": WIDTH,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "length": LENGTH,
        "batch": BATCH,
        "rate": RATE,
        "favourites": FAVOURITES,
        "skew": SKEW,
        "bias_step": STEP,
        "balance": BALANCE,
        **sizes,
    }
    return write_result("alf-lb", options.out, config, results, holds, sentence)


if __name__ == "__main__":
    main()
