"""EvoMoE: do copies of one trained expert and a gate that grows sparse help (arXiv 2112.14397)?

A small Llama is trained on the same text for the same number of steps: as a mixture of 8 experts
with a top-1 gate from scratch; dense first and then with 8 copies of its networks and a top-1 gate;
and dense first, then with copies of which a part is masked and the gate that goes from all experts
to one. Evaluated with one expert per token, the last should be best and the first worst, and its
experts per token should fall over the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evidence._common import Frame, Seeds, Sizes, run, tiny_llama, verdict
from moesaic.conversion.sparse_upcycling import SparseUpcycling, convert_sparse_upcycling
from moesaic.nn.layer import LayerConfig

FRAME = Frame()
WIDTH, EXPERTS, BALANCE = 64, 8, 1e-2
WAYS = ("scratch", "copies", "evomoe")


def copies_of(way: str, sizes: Sizes, seed: int) -> SparseUpcycling:
    """How the dense model becomes a mixture."""
    options: dict[str, Any] = {"renormalize": False}
    if way == "evomoe":
        steps = sizes["soft_steps"]
        options = {
            "router": "dense-to-sparse",
            "router_options": {
                "temperature": {"start": 2.0, "end": 0.3, "steps": steps},
                "soft_steps": steps,
            },
            "diversify": "mask",
        }
    return SparseUpcycling(
        copies=EXPERTS, top_k=1, active=1.0, balance_coef=BALANCE, seed=seed, **options
    )


def train(way: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Train one way; its loss with one expert per token, and experts per token over the steps."""
    counts: list[float] = []

    def note(step: int, routings: list[Any]) -> None:
        counts.append(float(np.mean([float(r.active_T().float().mean()) for r in routings])))

    dense_steps, steps = sizes["dense_steps"], sizes["steps"]
    if way == "scratch":
        layer = LayerConfig(
            num_experts=EXPERTS,
            width=WIDTH,
            router="topk-softmax",
            router_options={"top_k": 1, "renormalize": False},
        )
        model = FRAME.mixture(seed, layer, {"load-balance": {"coef": BALANCE}})
        FRAME.train(model, seed, dense_steps + steps, note)
    else:
        model = tiny_llama(seed, layers=FRAME.layers, dim=FRAME.dim, width=WIDTH)
        FRAME.train(model, seed, dense_steps)
        model, _ = convert_sparse_upcycling(model, None, copies_of(way, sizes, seed))
        FRAME.train(model, seed + 100, steps, note)
    loss, active = FRAME.validate(model, sizes["windows"])
    quarters = [float(np.mean(part)) for part in np.array_split(counts, min(4, len(counts)))]
    return {"loss": loss, "active": active, "experts_by_quarter": quarters}


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the means over seeds."""
    seeds = Seeds(results)
    scratch, copies, evomoe = (seeds.mean(way, "loss") for way in WAYS)
    falls = [seed["evomoe"]["experts_by_quarter"] for seed in seeds.all]
    mean = np.mean(falls, axis=0).tolist()
    holds = {
        "copies of a trained expert beat top-1 from scratch": copies < scratch,
        "masked copies with the gate from dense to sparse are no worse than plain copies": evomoe
        <= copies,
        "the experts per token of that gate fall over the training, on every seed": all(
            fall == sorted(fall, reverse=True) and fall[-1] < fall[0] for fall in falls
        ),
    }
    return holds, (
        f"{verdict(holds)}; with one expert per token nats per byte are {scratch:.3f} from "
        f"scratch, {copies:.3f} from copies and {evomoe:.3f} from masked copies with the gate, "
        f"whose experts per token are {', '.join(f'{value:.2f}' for value in mean)} in the "
        "quarters of its training."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "evomoe",
        argv,
        lambda seed, sizes: {way: train(way, seed, sizes) for way in WAYS},
        judge,
        config={**FRAME.config(), "width": WIDTH, "experts": EXPERTS, "balance": BALANCE},
        sizes={"dense_steps": 150, "steps": 300, "soft_steps": 180, "windows": 64},
    )


if __name__ == "__main__":
    main()
