"""COMET: do soft trees come down to k experts, and does exchanging experts help (arXiv 2306.02824)?

A layer of 8 experts of one hidden layer reads the 8 x 8 digits that scikit-learn carries and is
trained for the same few steps by soft trees and by plain top-2, each with and without a search over
which expert sits where. Trees should use at most 2 experts in the end; with the search the median
test loss over seeds should be no worse and its spread smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from evidence._common import Seeds, Sizes, run, verdict
from moesaic.nn.layer import LayerConfig, MoELayer, end_step, record_routing

PIXELS, CLASSES, EXPERTS, WIDTH, TOP_K = 64, 10, 8, 16, 2
BATCH, RATE, TEST = 64, 5e-3, 500
GAMMA, ENTROPY = 1.0, 0.003
ROUTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "trees": ("soft-trees", {"num_trees": TOP_K, "gamma": GAMMA, "entropy_coef": ENTROPY}),
    "top-k": ("topk-softmax", {"top_k": TOP_K}),
}
WAYS = ("trees", "trees+", "top-k", "top-k+")


def digits() -> tuple[Tensor, Tensor]:
    """Images, [N, 64] in [0, 1], and their classes, in the order of the data set."""
    images, classes = load_digits(return_X_y=True)
    return torch.from_numpy(images).float() / 16, torch.from_numpy(classes)


def build(way: str, sizes: Sizes) -> nn.Sequential:
    """Make a classifier whose one hidden part is the layer."""
    router, options = ROUTERS[way.removesuffix("+")]
    if way.endswith("+"):
        options = {"router": router, "options": options, "search_steps": sizes["search_steps"]}
        router = "permutation-search"
    layer = LayerConfig(
        num_experts=EXPERTS,
        width=WIDTH,
        router=router,
        router_options=options,
        experts="plain",
        activation="relu",
        bias=True,
    )
    return nn.Sequential(MoELayer(PIXELS, layer), nn.Linear(PIXELS, CLASSES))


def train(way: str, seed: int, sizes: Sizes) -> dict[str, float]:
    """Train one way; its loss and errors on the test images, and the experts an image uses."""
    torch.manual_seed(seed)
    images, classes = digits()
    model = build(way, sizes)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    first = 0.0
    for step in range(sizes["steps"]):
        rows = torch.randint(len(images) - TEST, (BATCH,), generator=generator)
        with record_routing(model) as routings:
            loss = F.cross_entropy(model(images[rows]), classes[rows])
        loss = loss + sum(routings[0].aux.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        end_step(model)
        if step == 0:
            first = float(routings[0].active_T().double().mean())
    model.eval()
    with torch.no_grad(), record_routing(model) as routings:
        logits = model(images[-TEST:])
    return {
        "loss": float(F.cross_entropy(logits, classes[-TEST:])),
        "error": float((logits.argmax(1) != classes[-TEST:]).double().mean()),
        "first_experts": first,
        "experts": float(routings[0].active_T().double().mean()),
        "most_experts": float(routings[0].active_T().max()),
    }


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the seeds."""
    seeds = Seeds(results)
    median = {way: float(np.median(seeds.values(way, "loss"))) for way in WAYS}
    spread = {way: float(np.ptp(seeds.values(way, "loss"))) for way in WAYS}
    holds = {
        "trees use at most 2 experts in the mean at the end, on every seed": max(
            seeds.values("trees", "experts")
        )
        <= TOP_K
    }
    for way in ROUTERS:
        holds[f"the median loss of {way} is no worse with the search"] = (
            median[f"{way}+"] <= median[way]
        )
        holds[f"the spread of {way} over seeds is smaller with the search"] = (
            spread[f"{way}+"] < spread[way]
        )
    found = "; ".join(
        f"{way}: {median[way]:.3f} ({spread[way]:.3f} apart, "
        f"{100 * seeds.mean(way, 'error'):.1f}% wrong, {seeds.mean(way, 'experts'):.2f} experts)"
        for way in WAYS
    )
    return holds, (
        f"{verdict(holds)}. Median test loss over seeds, + with the search: {found}. Trees begin "
        f"with {seeds.mean('trees', 'first_experts'):.1f} experts an image and end with "
        f"{seeds.mean('trees', 'experts'):.2f}, {max(seeds.values('trees', 'most_experts')):.0f} "
        "at most."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "comet",
        argv,
        lambda seed, sizes: {way: train(way, seed, sizes) for way in WAYS},
        judge,
        config={
            "experts": EXPERTS,
            "width": WIDTH,
            "top_k": TOP_K,
            "batch": BATCH,
            "rate": RATE,
            "gamma": GAMMA,
            "entropy": ENTROPY,
        },
        sizes={"steps": 600, "search_steps": 150},
        num_seeds=5,
    )


if __name__ == "__main__":
    main()
