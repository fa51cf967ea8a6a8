"""Loss-free balancing: does a choice bias that moves even the load (arXiv 2408.15664, 2512.03915)?

A small Llama of 16 experts a layer, of which a token uses 2, starts from routers that favour four
of them. It is trained on the same text with no balancing, with the bias, and with a load balance
loss. The bias should bring the busiest expert to at most 1.3 times the mean load, where it is above
2 without, at a loss no higher than with the auxiliary loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evidence._common import Frame, Seeds, Sizes, run, skew_routers, verdict
from moesaic.nn.layer import LayerConfig

FRAME = Frame()
WIDTH, EXPERTS, TOP_K = 32, 16, 2
FAVOURITES, SKEW, STEP, BALANCE = 4, 10.0, 0.005, 1e-2
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
    start = FRAME.loads(model, sizes["windows"])
    FRAME.train(model, seed, sizes["steps"])
    loss, _ = FRAME.validate(model, sizes["windows"])
    end = FRAME.loads(model, sizes["windows"])
    return {"loss": loss, "load_at_start": start, "load": end}


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
    none, bias, aux = (seeds.mean(way, "load") for way in WAYS)
    return holds, (
        f"{verdict(holds)}; the busiest of {EXPERTS} experts has {none:.2f} times "
        f"the mean load without balancing, {bias:.2f} with the bias and {aux:.2f} with the loss; "
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
        sizes={"steps": 1000, "windows": 64},
    )


if __name__ == "__main__":
    main()
