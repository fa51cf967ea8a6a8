"""Selective Sinkhorn routing: do a few balanced passes even the load (arXiv 2511.08972)?

A small Llama of 16 experts a layer, of which a token uses 2, starts from routers that favour four
of them and has no auxiliary loss. It is trained on the same text with no pass, some or all passes
routed by a transport plan, and always evaluated by plain top-2. The load of the busiest expert over
the mean should fall as plans become more frequent, at no cost in loss.
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
from moesaic.nn.routing import Routing

LAYERS, DIM, WIDTH, EXPERTS, TOP_K = 2, 32, 32, 16, 2
LENGTH, BATCH, RATE = 48, 12, 3e-3
FAVOURITES, SKEW, TEMPERATURE, NOISE = 4, 10.0, 0.5, 0.1
PROBABILITIES = (0.0, 0.1, 1.0)


def train(probability: float, seed: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Train at one probability; loss and loads on held-out text, and loads in training."""
    data, held = text_bytes(400_000, 60_000)
    torch.manual_seed(seed)
    layer = LayerConfig(
        num_experts=EXPERTS,
        width=WIDTH,
        router="selective-sinkhorn",
        router_options={
            "top_k": TOP_K,
            "probability": probability,
            "temperature": TEMPERATURE,
            "noise": NOISE,
        },
    )
    model = tiny_mixture(tiny_config(layers=LAYERS, dim=DIM, width=WIDTH), to_plain(layer), {})
    skew_routers(model, FAVOURITES, SKEW)
    generator = torch.Generator().manual_seed(seed)
    trained: list[float] = []

    def watch(step: int, routings: list[Routing]) -> None:
        for routing in routings:
            load_E = routing.counts_E().double()
            trained.append(float(load_E.max() / load_E.mean()))

    optimise(model, lambda: batch(data, BATCH, LENGTH, generator), sizes["steps"], RATE, watch)
    loss, _ = validate(model, held, LENGTH, sizes["windows"])
    load = max_over_mean(model, held, LENGTH, sizes["windows"])
    return {"loss": loss, "load": load, "load_in_training": float(np.mean(trained))}


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the seeds; loads are means over layers."""
    seeds = results["seeds"]

    def loads(way: str) -> list[float]:
        return [float(np.mean(seed[way]["load"])) for seed in seeds]

    def mean(way: str, key: str) -> float:
        return float(np.mean([seed[way][key] for seed in seeds]))

    ways = [way for way in seeds[0] if way != "seed"]
    means = [float(np.mean(loads(way))) for way in ways]
    never, some, always = ways[0], ways[1], ways[-1]
    holds = {
        "plain top-k has over twice the mean load, on every seed": min(loads(never)) > 2.0,
        "passes that are all routed by a plan have at most 1.3 times the mean load": mean(
            always, "load_in_training"
        )
        <= 1.3,
        "plain top-k after such training has at most 1.3 times the mean load": max(loads(always))
        <= 1.3,
        "the load of plain top-k falls as plans become more frequent": means
        == sorted(means, reverse=True),
        "some plans cost no loss (within 0.02 nats)": mean(some, "loss")
        < mean(never, "loss") + 0.02,
    }
    missed = [claim for claim, true in holds.items() if not true]
    verdict = (
        "all came out at this scale" if not missed else f"not at this scale: {'; '.join(missed)}"
    )
    found = "; ".join(
        f"{way}: {load:.2f} times the mean load at {mean(way, 'loss'):.3f} nats per byte"
        for way, load in zip(ways, means, strict=True)
    )
    return holds, (
        f"The card's predictions: {verdict}. Plain top-{TOP_K} of {EXPERTS} on held-out text, by "
        f"the part of training passes with a plan: {found}. In passes that were all routed by a "
        f"plan the busiest expert had {mean(always, 'load_in_training'):.2f} times the mean load."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    options = arguments("selective Sinkhorn routing", argv)
    sizes = {"steps": 3 if options.quick else 200, "windows": 8 if options.quick else 64}
    seeds = (0,) if options.quick else (0, 1, 2)
    results = {
        "seeds": [
            {"seed": seed, **{f"{p:g}": train(p, seed, sizes) for p in PROBABILITIES}}
            for seed in seeds
        ]
    }
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
        "temperature": TEMPERATURE,
        "noise": NOISE,
        **sizes,
    }
    return write_result("selective-sinkhorn", options.out, config, results, holds, sentence)


if __name__ == "__main__":
    main()
