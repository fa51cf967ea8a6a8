"""Selective Sinkhorn routing: do a few balanced passes even the load (arXiv 2511.08972)?

A small Llama of 16 experts a layer, of which a token uses 2, starts from routers that favour four
of them and has no auxiliary loss. It is trained on the same text with no pass, some or all passes
routed by a transport plan, and always evaluated by plain top-2. The load of the busiest expert over
the mean should fall as plans become more frequent, at no cost in loss.

A plan evens the mass and not the choices: like tokens, a space is one byte in six, have like rows,
and their two largest entries are the same two experts. Noise in the gains, of the paper's size,
parts them. And a plan absorbs whatever is added to all scores of one expert, so that nothing in it
teaches plain top-k to do without.
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
from moesaic.nn.routing import Routing

FRAME = Frame()
WIDTH, EXPERTS, TOP_K = 32, 16, 2
FAVOURITES, SKEW, TEMPERATURE, NOISE = 4, 10.0, 0.5, 1.0
PROBABILITIES = (0.0, 0.1, 1.0)


def train(probability: float, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Train at one probability; loss and loads on held-out text, and loads in training."""
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
    model = FRAME.mixture(seed, layer)
    skew_routers(model, FAVOURITES, SKEW)
    trained: list[float] = []

    def watch(step: int, routings: list[Routing]) -> None:
        for routing in routings:
            load_E = routing.counts_E().double()
            trained.append(float(load_E.max() / load_E.mean()))

    text, held = alike_bytes()
    FRAME.train(model, seed, sizes["steps"], watch, text)
    loss, _ = FRAME.validate(model, sizes["windows"], held)
    load = FRAME.loads(model, sizes["windows"], held)
    return {"loss": loss, "load": load, "load_in_training": float(np.mean(trained))}


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the seeds; loads are means over layers."""
    seeds = Seeds(results)
    ways = [f"{probability:g}" for probability in PROBABILITIES]
    means = [seeds.mean(way, "load") for way in ways]
    never, some, always = ways[0], ways[1], ways[-1]
    holds = {
        "plain top-k has over twice the mean load, on every seed": min(seeds.values(never, "load"))
        > 2.0,
        "passes that are all routed by a plan have at most 1.3 times the mean load": seeds.mean(
            always, "load_in_training"
        )
        <= 1.3,
        "plain top-k after such training has at most 1.3 times the mean load": max(
            seeds.values(always, "load")
        )
        <= 1.3,
        "the load of plain top-k falls as plans become more frequent": means
        == sorted(means, reverse=True),
        "some plans cost no loss (within 0.02 nats)": seeds.mean(some, "loss")
        < seeds.mean(never, "loss") + 0.02,
    }
    chance = load_by_chance(FRAME.batch * FRAME.length * TOP_K, EXPERTS)
    found = "; ".join(
        f"{way}: {load:.2f} times the mean load at {seeds.mean(way, 'loss'):.3f} nats per byte"
        for way, load in zip(ways, means, strict=True)
    )
    return holds, (
        f"{verdict(holds)}. Plain top-{TOP_K} of {EXPERTS} on held-out text, by "
        f"the part of training passes with a plan: {found}. In passes that were all routed by a "
        f"plan the busiest expert had {seeds.mean(always, 'load_in_training'):.2f} times the mean "
        f"load ({chance:.2f} by chance, were all as likely)."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "selective-sinkhorn",
        argv,
        lambda seed, sizes: {f"{p:g}": train(p, seed, sizes) for p in PROBABILITIES},
        judge,
        config={
            **FRAME.config(),
            "width": WIDTH,
            "experts": EXPERTS,
            "top_k": TOP_K,
            "favourites": FAVOURITES,
            "skew": SKEW,
            "temperature": TEMPERATURE,
            "noise": NOISE,
        },
        sizes={"steps": 200, "windows": 512},
    )


if __name__ == "__main__":
    main()
