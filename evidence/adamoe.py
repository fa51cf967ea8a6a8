"""AdaMoE: null experts let tokens use fewer experts at the same quality (arXiv 2406.13233).

A small Llama is trained, its networks are copied into 8 experts each, top-2 is trained briefly,
and then (a) top-2 and (b) 8 null experts with top-3 are trained on with the same text. The load of
(b) should fall below 2, differ between tokens, and cost no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from evidence._common import (
    Seeds,
    Sizes,
    batch,
    optimise,
    run,
    text_bytes,
    tiny_config,
    tiny_llama,
    tiny_mixture,
    validate,
    verdict,
)
from moesaic.nn.layer import LayerConfig, moe_layers, record_routing

EXPERTS, NULL, SLOTS, LENGTH, BALANCE = 8, 8, 3, 64, 1e-2
DIM, WIDTH = 64, 256


def upcycle(dense: Any) -> Any:
    """Copy every network of a dense model into all experts of a top-2 layer."""
    layer = LayerConfig(
        num_experts=EXPERTS, width=WIDTH, router="topk-softmax", router_options={"top_k": 2}
    )
    losses = {"load-balance": {"coef": BALANCE}}
    model = tiny_mixture(tiny_config(dim=DIM, width=WIDTH), layer, losses)
    rest = {k: v for k, v in dense.state_dict().items() if ".mlp." not in k}
    model.load_state_dict(rest, strict=False)
    with torch.no_grad():
        for old, new in zip(dense.model.layers, moe_layers(model), strict=True):
            gate_up = torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight])
            new.experts.gate_up_proj.copy_(gate_up.expand(EXPERTS, -1, -1))
            new.experts.down_proj.copy_(old.mlp.down_proj.weight.expand(EXPERTS, -1, -1))
    return model


def add_null_experts(model: Any) -> Any:
    """Give a top-2 model null experts, whose rows start as copies of the real ones."""
    layer = LayerConfig(
        num_experts=EXPERTS,
        width=WIDTH,
        router="null-experts",
        router_options={"num_null": NULL, "top_k": SLOTS},
    )
    losses = {"null-balance": {"coef": BALANCE}}
    wider = tiny_mixture(tiny_config(dim=DIM, width=WIDTH), layer, losses)
    state = model.state_dict()
    for name in [name for name in state if name.endswith("router.weight")]:
        state[name] = torch.cat([state[name], state[name][:NULL]])
    wider.load_state_dict(state)
    return wider


@torch.no_grad()
def token_load(model: Any, held: torch.Tensor) -> dict[str, float]:
    """Mean and spread over tokens of the real experts used, over layers."""
    ids_BS = held[: 32 * LENGTH].reshape(32, LENGTH)
    with record_routing(model) as routings:
        model(input_ids=ids_BS, use_cache=False)
    load_LT = torch.stack([r.active_T().float() for r in routings])
    return {"mean": float(load_LT.mean()), "std": float(load_LT.mean(0).std())}


def one_seed(seed: int, sizes: Sizes) -> dict[str, Any]:
    """Upcycle, then train on with and without null experts."""
    train, held = text_bytes()
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return batch(train, 16, LENGTH, generator)

    dense = tiny_llama(seed, dim=DIM, width=WIDTH)
    optimise(dense, draw, sizes["pretrain_steps"], 2e-3)
    start = upcycle(dense)
    optimise(start, draw, sizes["warm_steps"], 1e-3)
    out: dict[str, Any] = {}
    null = add_null_experts(start)
    for name, model in (("top-2", start), ("null", null)):
        generator.manual_seed(1000 + seed)
        optimise(model, draw, sizes["steps"], 1e-3)
        loss, _ = validate(model, held, LENGTH, sizes["windows"])
        out[name] = {"loss": loss, "load": token_load(model, held)}
    return out


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the means over seeds."""
    seeds = Seeds(results)
    load = float(np.mean([seed["null"]["load"]["mean"] for seed in seeds.all]))
    spread = float(np.mean([seed["null"]["load"]["std"] for seed in seeds.all]))
    base, ours = seeds.mean("top-2", "loss"), seeds.mean("null", "loss")
    holds = {
        "the load is below 2": load < 2.0,
        "tokens differ in their load": spread > 0.0,
        "the loss is within 0.03 nats of top-2": ours < base + 0.03,
    }
    return holds, (
        f"{verdict(holds)}; null experts use {load:.2f} of 8 experts a token "
        f"(spread {spread:.2f}) at a loss of {ours:.3f} nats per byte, top-2 has {base:.3f}."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "adamoe",
        argv,
        one_seed,
        judge,
        config={"experts": EXPERTS, "null": NULL, "slots": SLOTS, "length": LENGTH},
        sizes={"pretrain_steps": 300, "warm_steps": 50, "steps": 200, "windows": 96},
        num_seeds=2,
    )


if __name__ == "__main__":
    main()
