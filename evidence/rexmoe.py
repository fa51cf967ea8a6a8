"""ReXMoE: does it help to choose among the experts of neighbouring layers (arXiv 2510.17483)?

A Llama of eight small layers of 8 experts, of which a token uses 2, is trained on the same text
with every layer for itself, and in groups of four: from the beginning, and with a pool that grows
in training. The growing pool should have the lowest loss, and a higher one at first. In one group
of all layers, experts should be less evenly loaded than in groups of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from evidence._common import Frame, Seeds, Sizes, held_windows, run, verdict
from moesaic.nn.layer import LayerConfig, record_routing

FRAME = Frame(layers=8, batch=8)
WIDTH, EXPERTS, TOP_K = 16, 8, 2
# Layers of a group, and whether its pool grows.
WAYS = {
    "alone": (1, False),
    "four": (4, False),
    "four, growing": (4, True),
    "two": (2, False),
    "eight": (8, False),
}


def build(way: str, seed: int, steps: int) -> Any:
    """Make the model; a fifth and three fifths of the training are the paper's steps."""
    reuse, grows = WAYS[way]
    layer = LayerConfig(
        num_experts=EXPERTS,
        width=WIDTH,
        reuse=reuse,
        router="growing-top-k",
        router_options={
            "top_k": TOP_K,
            "initial": EXPERTS if grows else EXPERTS * reuse,
            "start_step": steps // 5,
            "end_step": 3 * steps // 5,
        },
    )
    return FRAME.mixture(seed, layer)


@torch.no_grad()
def violation(model: Any, reuse: int, windows: int) -> float:
    """Mean over groups of the largest load of an expert over the mean load, less one."""
    with record_routing(model) as routings:
        model(input_ids=held_windows(FRAME.length, windows), use_cache=False)
    loads = [routing.counts_E().double() for routing in routings]
    groups = [torch.stack(loads[i : i + reuse]).sum(0) for i in range(0, len(loads), reuse)]
    return float(np.mean([float(load_E.max() / load_E.mean()) - 1 for load_E in groups]))


def train(way: str, seed: int, sizes: Sizes) -> dict[str, float]:
    """Train one way; its loss early and late, and how uneven its experts are, on held-out text."""
    steps, windows = sizes["steps"], sizes["windows"]
    model = build(way, seed, steps)
    early: list[float] = []

    def look(step: int, routings: list[Any]) -> None:
        if step == steps // 5:
            early.append(FRAME.validate(model, windows)[0])
            model.train()

    FRAME.train(model, seed, steps, look)
    loss, _ = FRAME.validate(model, windows)
    return {
        "early": early[0],
        "loss": loss,
        "violation": violation(model, WAYS[way][0], windows),
    }


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the means over seeds."""
    seeds = Seeds(results)

    def by_way(measure: str) -> dict[str, float]:
        return {way: seeds.mean(way, measure) for way in WAYS}

    loss, early, violation = by_way("loss"), by_way("early"), by_way("violation")
    holds = {
        "with a growing pool the loss is at most that without": loss["four, growing"]
        <= loss["four"],
        "and at most that of layers alone": loss["four, growing"] <= loss["alone"],
        "while the pool is small the loss is higher than with the whole one": early["four, growing"]
        > early["four"],
        "one group of all layers loads its experts less evenly than groups of two": violation[
            "eight"
        ]
        > violation["two"],
    }
    found = "; ".join(
        f"{way} {loss[way]:.3f} ({early[way]:.3f} after a fifth), {violation[way]:.1f}"
        for way in WAYS
    )
    return holds, (
        f"{verdict(holds)}. Nats per byte, and by how many mean loads the busiest expert of a "
        f"group is above the mean: {found}."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "rexmoe",
        argv,
        lambda seed, sizes: {way: train(way, seed, sizes) for way in WAYS},
        judge,
        config={
            **FRAME.config(),
            "width": WIDTH,
            "experts": EXPERTS,
            "top_k": TOP_K,
        },
        sizes={"steps": 100, "windows": 64},
    )


if __name__ == "__main__":
    main()
