"""Union of Experts: do parts of one network beat a mixture at equal work (arXiv 2503.02495)?

Three small Llamas with the same arithmetic for each token learn the same text: a union, whose
network is cut into 4 parts and whose attention into 4 heads, a token using 2 of each; a top-2
mixture of 4 experts with whole attention; and a dense network of half the mixture's width. The
union's parts are wider by what its attention saves. It should reach a loss no higher than the
mixture. Then the union as published, whose experts take a share of the sequence at weight one: its
outputs should depend on later tokens, where those of the union do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evidence._common import Frame, Seeds, Sizes, run, text_bytes, verdict
from moesaic.nn.layer import LayerConfig
from moesaic.nn.routers.data_selection import DataSelection, DataSelectionConfig
from moesaic.nn.selective_attention import SelectiveAttention

FRAME = Frame()
WIDTH, EXPERTS, TOP_K, BALANCE = 64, 4, 2, 1e-2
# Half of four square matrices is what half the heads save; two plain parts hold 4 D for each unit
# of their width.
WIDER = (4 * FRAME.dim**2 // 2) // (4 * FRAME.dim)
WAYS: dict[str, dict[str, Any] | None] = {
    "union": {"capacity": 1.0},
    "as published": {"capacity": 0.5, "weight": "none"},
    "mixture": None,
    "dense": None,
}


class Attention(nn.Module):
    """Selective attention in the place of a Llama's."""

    def __init__(self, router: DataSelectionConfig) -> None:
        super().__init__()
        self.union = SelectiveAttention(
            FRAME.dim, EXPERTS, DataSelection(FRAME.dim, EXPERTS, router)
        )

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, **rest: Any
    ) -> tuple[Tensor, None]:
        """Ignore the mask: windows of text have no padding."""
        return self.union(hidden_states, position_embeddings), None


def build(way: str, seed: int) -> Any:
    """Make the model of a way."""
    router = WAYS[way]
    losses: dict[str, Any] = {}
    options: dict[str, Any] = {"activation": "gelu", "experts": "plain"}
    if way == "dense":
        layer = LayerConfig(num_experts=0, shared_width=TOP_K * WIDTH, **options)
    elif router is None:
        routing = {"router": "topk-softmax", "router_options": {"top_k": TOP_K}}
        layer = LayerConfig(num_experts=EXPERTS, width=WIDTH, **routing, **options)
        losses = {"load-balance": {"coef": BALANCE}}
    else:
        routing = {"router": "data-selection", "router_options": {"top_k": TOP_K, **router}}
        layer = LayerConfig(num_experts=EXPERTS, width=WIDTH + WIDER, **routing, **options)
    model = FRAME.mixture(seed, layer, losses, EXPERTS * WIDTH)
    if router is not None:
        for decoder in model.model.layers:
            decoder.self_attn = Attention(DataSelectionConfig(top_k=TOP_K, **router))
    return model


def work(way: str) -> int:
    """Multiplications of weights for a token and layer, routers left out."""
    if WAYS[way] is None:
        return 4 * FRAME.dim**2 + 2 * FRAME.dim * TOP_K * WIDTH
    heads = 4 * FRAME.dim**2 * TOP_K // EXPERTS
    return heads + 2 * FRAME.dim * TOP_K * (WIDTH + WIDER)


@torch.no_grad()
def leak(model: Any) -> float:
    """Largest change of earlier logits when the last token of a window is another."""
    _, held = text_bytes()
    ids_BS = held[: 16 * FRAME.length].reshape(16, FRAME.length)
    other_BS = ids_BS.clone()
    other_BS[:, -1] = (ids_BS[:, -1] + 1) % 128
    before, after = (model(input_ids=ids, use_cache=False).logits for ids in (ids_BS, other_BS))
    return float((before - after)[:, :-1].abs().max())


def train(way: str, seed: int, sizes: Sizes) -> dict[str, float]:
    """Train one way; loss on held-out text, weights, work, and what it hears of later tokens."""
    model = build(way, seed)
    FRAME.train(model, seed, sizes["steps"])
    loss, _ = FRAME.validate(model, sizes["windows"])
    weights = sum(p.numel() for p in model.parameters())
    return {"loss": loss, "weights": weights, "work": work(way), "leak": leak(model)}


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the means over seeds."""
    seeds = Seeds(results)
    loss = {way: seeds.mean(way, "loss") for way in WAYS}
    holds = {
        "the union reaches a loss no higher than the mixture of equal work": loss["union"]
        <= loss["mixture"],
        "it is below the dense network of equal work": loss["union"] < loss["dense"],
        "no output of the union depends on later tokens": max(seeds.values("union", "leak")) < 1e-4,
        "as published outputs depend on later tokens, on every seed": min(
            seeds.values("as published", "leak")
        )
        > 1e-2,
    }
    better = sum(
        union <= mixture
        for union, mixture in zip(
            seeds.values("union", "loss"), seeds.values("mixture", "loss"), strict=True
        )
    )
    return holds, (
        f"{verdict(holds)}; at equal work the union reaches {loss['union']:.3f} nats per byte, the "
        f"top-{TOP_K} mixture {loss['mixture']:.3f} and the dense network {loss['dense']:.3f}; the "
        f"union is no higher than the mixture on {better} of {len(seeds.all)} seeds. As published "
        f"it reads {loss['as published']:.3f}, which means little: another last byte changes "
        f"earlier logits by up to {max(seeds.values('as published', 'leak')):.2f}."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "union-of-experts",
        argv,
        lambda seed, sizes: {way: train(way, seed, sizes) for way in WAYS},
        judge,
        config={
            **FRAME.config(),
            "width": WIDTH,
            "wider": WIDER,
            "experts": EXPERTS,
            "top_k": TOP_K,
            "balance": BALANCE,
        },
        sizes={"steps": 400, "windows": 64},
    )


if __name__ == "__main__":
    main()
