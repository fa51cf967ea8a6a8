"""The tables of the DSMoE paper at a small scale (arXiv 2502.12455).

A byte-level Llama is trained once on prose and code. Its networks are cut into 8 blocks, and each
way of gating them is trained on with the same text: the straight-through estimator, gates without
it (Table 3), soft gates that are thresholded at the end (Figure 2) and softmax top-3 with a balance
loss (Table 1). The dense model is trained on too. One model of each seed gives the threshold sweep
(Table 4), the loss against tokens (Tables 5-6) and the blocks of layers and domains (Figure 3).

The sparsity coefficient is the paper's constant of one, so the count of active blocks is emergent.
What differs is the rate of the routers, chosen so that a sweep over thresholds is graded as in the
paper. `one rate` trains all weights at one, as the paper does for hundreds of times as many steps.
In our few, gates stay at the threshold: there they start, and there the sparsity loss lets go of
those that sink, so that no other threshold tells them apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evidence._common import arguments, batch, optimise, tiny_llama, validate, write_result
from evidence._dsmoe_claims import judge
from moesaic.conversion.dsmoe import DSMoE, convert_dsmoe
from moesaic.data import DataConfig, load_documents
from moesaic.models.ffn import decoder_layers
from moesaic.nn.layer import LayerConfig, MoELayer, moe_layers
from moesaic.nn.routers.sigmoid_threshold import SigmoidThresholdConfig

EXPERTS, TARGET, LAYERS, DIM, WIDTH = 8, 3, 6, 64, 256
BATCH, LENGTH, POINTS = 4, 128, 6
SPARSE_COEF, RATE = 1.0, 3e-4
# In trials of 400 steps of 1024 bytes, blocks by thresholds from 0.2 to 0.8 went from 7.0 to 0.8 at
# a rate of 0.1 and from 2.9 to 2.8 at 0.3, where gates saturate. A rate of 0.01 suits top-3 as well
# as 0.001 does and better than 0.1.
ROUTER_RATE = {
    "straight-through": 0.13,
    "one rate": RATE,
    "hard": 0.13,
    "soft": 0.13,
    "top-3": 0.01,
}
DOMAINS = ("prose", "code")
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
COUNTS = (2, 3, 4)
# Held-out text by domain.
Held = Mapping[str, Tensor]


def domain_text(domain: str, num_train: int, num_held: int) -> tuple[Tensor, Tensor]:
    """Bytes of a built-in source, split between documents in an order that does not change."""
    documents = load_documents(DataConfig(sources=(f"builtin:{domain}",)))
    order = np.random.default_rng(0).permutation(len(documents)).tolist()
    sides = []
    for size in (num_held, num_train):
        side = bytearray()
        while len(side) < size:
            side += documents[order.pop()].text.encode() + b"\n\n"
        sides.append(torch.frombuffer(side[:size], dtype=torch.uint8).long())
    held, train = sides
    return train, held


def convert(dense: Any, route: str, seed: int) -> Any:
    """Cut a copy of a dense model for one of the ways of gating."""
    router = SigmoidThresholdConfig(
        estimator=route if route in ("hard", "soft") else "straight-through"
    )
    paper = DSMoE(
        experts=EXPERTS,
        partition="contiguous",
        init="random",
        router=router,
        sparse_coef=SPARSE_COEF,
        seed=seed,
    )
    model, _ = convert_dsmoe(copy.deepcopy(dense), None, paper)
    if route == "top-3":
        _use_top_3(model, seed)
    return model


def _use_top_3(model: Any, seed: int) -> None:
    """Swap the routers for softmax top-3; the output is scaled by E / k, as LLaMA-MoE does."""
    torch.manual_seed(seed)
    for layer in decoder_layers(model):
        old = layer.mlp
        config = LayerConfig(
            num_experts=EXPERTS,
            width=old.config.width,
            router="topk-softmax",
            router_options={"top_k": TARGET},
        )
        layer.mlp = MoELayer(old.dim, config)
        layer.mlp.experts = old.experts
        with torch.no_grad():
            layer.mlp.experts.down_proj.mul_(EXPERTS / TARGET)
    model.config.moesaic["losses"] = {"load-balance": {"coef": 0.01}}
    model.attach_losses()


def measure(model: Any, held: Held, windows: int) -> dict[str, Any]:
    """Loss in nats per byte, and active blocks of a token and layer, over all domains."""
    found = {name: validate(model, text, LENGTH, windows) for name, text in held.items()}
    # A dense model runs all blocks.
    layers = {name: counts or [float(EXPERTS)] for name, (_, counts) in found.items()}
    return {
        "loss": float(np.mean([loss for loss, _ in found.values()])),
        "active": float(np.mean(list(layers.values()))),
        "layers": layers,
    }


def at_threshold(model: Any, threshold: float, held: Held, windows: int) -> dict[str, float]:
    """Move the threshold of all layers and measure."""
    for layer in moe_layers(model):
        layer.router.threshold = threshold
    found = measure(model, held, windows)
    return {"threshold": threshold, "loss": found["loss"], "active": found["active"]}


def at_count(model: Any, count: float, held: Held, windows: int) -> dict[str, float]:
    """Move the threshold to where the mean count on the same windows is the one asked for."""
    low, high = 0.0, 1.0
    for _ in range(30):
        found = at_threshold(model, (low + high) / 2, held, windows)
        if abs(found["active"] - count) < 0.01:
            break
        if found["active"] > count:
            low = found["threshold"]
        else:
            high = found["threshold"]
    return found


def train_on(
    model: Any,
    draw: Callable[[], Tensor],
    steps: int,
    router_rate: float | None,
    held: Held,
    windows: int,
) -> list[dict[str, float]]:
    """Train, and measure at equal distances on the way: the paper's Tables 5-6."""
    curve = []

    def follow(step: int, routings: list[Any]) -> None:
        if (step + 1) % max(1, steps // POINTS) == 0:
            found = measure(model, held, windows)
            tokens = (step + 1) * BATCH * LENGTH
            curve.append({"tokens": tokens, "loss": found["loss"], "active": found["active"]})
            model.train()

    optimise(model, draw, steps, RATE, follow, router_rate)
    return curve


def one_seed(
    seed: int, dense: Any, train: Held, held: Held, sizes: dict[str, int]
) -> dict[str, Any]:
    """Train on in all ways, with the same text and one seed of the routers."""
    windows = sizes["windows"]
    out: dict[str, Any] = {"seed": seed}
    for route in ("dense", *ROUTER_RATE):
        draw = drawing(train, 1000 + seed)
        model = copy.deepcopy(dense) if route == "dense" else convert(dense, route, seed)
        rate = ROUTER_RATE.get(route)
        curve = train_on(model, draw, sizes["steps"], rate, held, windows)
        trained = measure(model, held, windows)
        found: dict[str, Any] = {"curve": curve, **trained}
        if route not in ("dense", "top-3"):
            found["counts"] = [
                {"count": count, **at_count(model, count, held, windows)} for count in COUNTS
            ]
        if route in ("straight-through", "one rate"):
            found["sweep"] = [at_threshold(model, t, held, windows) for t in THRESHOLDS]
        out[route] = found
        print(f"seed {seed}, {route}: {found['loss']:.3f} with {found['active']:.2f}", flush=True)
        if "sweep" in found:
            print(f"  blocks by threshold: {[round(p['active'], 2) for p in found['sweep']]}")
    return out


def drawing(train: Held, seed: int) -> Callable[[], Tensor]:
    """Make a function that draws windows of text, as many of each domain."""
    generator = torch.Generator().manual_seed(seed)
    share = BATCH // len(DOMAINS)
    return lambda: torch.cat([batch(train[d], share, LENGTH, generator) for d in DOMAINS])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    options = arguments("DSMoE", argv)
    sizes = {
        "train_bytes": 100_000 if options.quick else 1_500_000,
        "held_bytes": 20_000 if options.quick else 200_000,
        "pretrain_steps": 4 if options.quick else 1000,
        "steps": 6 if options.quick else 480,
        "windows": 4 if options.quick else 24,
    }
    texts = {d: domain_text(d, sizes["train_bytes"], sizes["held_bytes"]) for d in DOMAINS}
    train, held = ({d: text[side] for d, text in texts.items()} for side in (0, 1))
    dense = tiny_llama(0, layers=LAYERS, dim=DIM, width=WIDTH)
    optimise(dense, drawing(train, 0), sizes["pretrain_steps"], 3e-3)
    config = {
        "experts": EXPERTS,
        "layers": LAYERS,
        "dim": DIM,
        "width": WIDTH,
        "batch": BATCH,
        "length": LENGTH,
        "domains": list(DOMAINS),
        "sparse_coef": SPARSE_COEF,
        "rate": RATE,
        "router_rate": ROUTER_RATE,
        **sizes,
    }
    seeds: list[dict[str, Any]] = []
    results = {"start": measure(dense, held, sizes["windows"])["loss"], "seeds": seeds}
    for seed in (0,) if options.quick else (0, 1, 2):
        seeds.append(one_seed(seed, dense, train, held, sizes))
        # Written after every seed: a run that is interrupted keeps what it has.
        record = write_result("dsmoe", options.out, config, results, *judge(results))
    return record


if __name__ == "__main__":
    main()
