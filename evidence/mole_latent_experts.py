"""Latent experts: can trained experts share a projection, and what does it cost (arXiv 2503.23100)?

A small dense Llama is trained, its networks are cut into 8 experts of neighbouring neurons each, of
which a token uses 4, and trained on. Groups of 2, 4 and 8 experts are then brought into latent form
at the width of an expert, without calibration, and trained on for a third as long; so is the
mixture itself. Leaving the down matrices whole should err less than factorising them at the same
width, larger groups should err more, and the short training should win back most of the loss.
Besides, latent experts are trained from scratch beside ordinary ones.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evidence._common import Frame, Seeds, Sizes, run, text_bytes, tiny_llama, verdict
from moesaic.compression.factorization.latent_experts import (
    LatentExperts,
    factorise,
    factorise_experts,
)
from moesaic.models.architectures import ARCHITECTURES
from moesaic.models.ffn import decoder_layers, fill_experts, read_ffn
from moesaic.nn.experts._base import Experts
from moesaic.nn.layer import LayerConfig, moe_layers
from moesaic.nn.routing import Routing

FRAME = Frame(dim=48)
# A third of the model's width, as a network of SmolLM2-135M cut into eight.
WIDTH, EXPERTS, TOP_K, BALANCE = 16, 8, 4, 1e-2
GROUPS = (2, 4, 8)
TUNE = replace(FRAME, rate=1e-3)
LOSSES = {"load-balance": {"coef": BALANCE}}


def layer(**options: Any) -> LayerConfig:
    """Eight experts of which a token uses four."""
    return LayerConfig(
        num_experts=EXPERTS,
        width=WIDTH,
        router="topk-softmax",
        router_options={"top_k": TOP_K},
        **options,
    )


def cut(dense: Any, seed: int) -> Any:
    """Cut every network of a dense model into experts; routers start at random."""
    model = FRAME.mixture(seed, layer(), LOSSES)
    rest = {k: v for k, v in dense.state_dict().items() if ".mlp." not in k}
    model.load_state_dict(rest, strict=False)
    for old, moe in zip(decoder_layers(dense), moe_layers(model), strict=True):
        fill_experts(moe, read_ffn(old, ARCHITECTURES["llama"], "silu"))
    return model


def factorise_down(model: Any, group_size: int) -> Any:
    """Factorise the down matrices instead, their outputs in common, at the width of an expert."""
    for moe in moe_layers(model):
        assert moe.experts is not None
        down = moe.experts.weights().down
        found = factorise(down.detach().transpose(1, 2), group_size, WIDTH)
        product = found.private @ found.common.repeat_interleave(group_size, 0)
        with torch.no_grad():
            down.copy_(product.transpose(1, 2))
    return model


@torch.no_grad()
def output_error(model: Any, changed: Any) -> float:
    """Error of the experts' outputs over their size, at the inputs of the first, mean of layers."""
    _, held = text_bytes()
    seen: list[tuple[Tensor, Routing, Tensor]] = []

    def keep(module: Experts, args: tuple[Any, ...], out: Tensor) -> None:
        h_TD, routing, _ = args
        seen.append((h_TD, routing, out))

    handles = [moe.experts.register_forward_hook(keep) for moe in moe_layers(model) if moe.experts]
    model(input_ids=held[: 32 * FRAME.length].reshape(32, FRAME.length), use_cache=False)
    for handle in handles:
        handle.remove()
    errors = []
    for moe, (h_TD, routing, out_TD) in zip(moe_layers(changed), seen, strict=True):
        assert moe.experts is not None
        errors.append(float((moe.experts(h_TD, routing) - out_TD).norm() / out_TD.norm()))
    return float(np.mean(errors))


def expert_weights(model: Any) -> int:
    """Parameters of the experts."""
    parts = [moe.experts for moe in moe_layers(model) if moe.experts is not None]
    return sum(p.numel() for part in parts for p in part.parameters())


def one_seed(seed: int, sizes: Sizes) -> dict[str, Any]:
    """Convert a trained mixture in groups of every size, and train it and the others on."""
    steps, windows = sizes["steps"], sizes["windows"]
    dense = tiny_llama(seed, layers=FRAME.layers, dim=FRAME.dim, width=EXPERTS * WIDTH)
    FRAME.train(dense, seed, steps)
    model = cut(dense, seed)
    FRAME.train(model, seed + 100, steps)
    out: dict[str, Any] = {}
    for group_size in (1, *GROUPS):
        changed = copy.deepcopy(model)
        found = {}
        if group_size > 1:
            changed, errors = factorise_experts(changed, None, LatentExperts(group_size=group_size))
            down = factorise_down(copy.deepcopy(model), group_size)
            found = {
                "matrix_error": errors["error"],
                "output_error": output_error(model, changed),
                "output_error_down": output_error(model, down),
            }
        loss, _ = FRAME.validate(changed, windows)
        TUNE.train(changed, seed + 200, sizes["tune_steps"])
        tuned, _ = FRAME.validate(changed, windows)
        way = f"groups of {group_size}" if group_size > 1 else "whole"
        out[way] = {"loss": loss, "tuned": tuned, "weights": expert_weights(changed), **found}
    options = {"experts": "latent-gated", "experts_options": {"group_size": EXPERTS}}
    for way, fresh in (
        ("ordinary from scratch", layer()),
        ("latent from scratch", layer(**options)),
    ):
        model = FRAME.mixture(seed, fresh, LOSSES)
        FRAME.train(model, seed, steps)
        loss, _ = FRAME.validate(model, windows)
        out[way] = {"loss": loss, "weights": expert_weights(model)}
    return out


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the means over seeds."""
    seeds = Seeds(results)
    ways = [f"groups of {group_size}" for group_size in GROUPS]
    errors = [seeds.mean(way, "output_error") for way in ways]
    downs = [seeds.mean(way, "output_error_down") for way in ways]
    lost = [seeds.mean(way, "loss") - seeds.mean("whole", "tuned") for way in ways]
    left = [seeds.mean(way, "tuned") - seeds.mean("whole", "tuned") for way in ways]
    more = seeds.mean("latent from scratch", "loss") - seeds.mean("ordinary from scratch", "loss")
    saved = 1 - seeds.mean("latent from scratch", "weights") / seeds.mean(
        "ordinary from scratch", "weights"
    )
    holds = {
        "outputs err less with gate and up in common than with down": all(
            up < down for up, down in zip(errors, downs, strict=True)
        ),
        "outputs err more in larger groups": errors == sorted(errors),
        "short training wins back over half of the loss, in groups of every size": all(
            after < before / 2 for before, after in zip(lost, left, strict=True)
        ),
        "latent experts from scratch are within 0.03 nats of ordinary ones": more < 0.03,
    }
    found = "; ".join(
        f"{way}: outputs err by {error:.2f} of their size ({down:.2f} with down in common), "
        f"the loss is {before:+.3f} and after training on {after:+.3f}"
        for way, error, down, before, after in zip(ways, errors, downs, lost, left, strict=True)
    )
    return holds, (
        f"{verdict(holds)}. Against the mixture trained on as long, {found} nats per byte. From "
        f"scratch a single group of latent experts has {saved:.0%} fewer weights in its experts at "
        f"{more:+.3f} nats."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "mole-latent-experts",
        argv,
        one_seed,
        judge,
        config={
            **FRAME.config(),
            "width": WIDTH,
            "experts": EXPERTS,
            "top_k": TOP_K,
            "balance": BALANCE,
            "groups": list(GROUPS),
            "tune_rate": TUNE.rate,
        },
        sizes={"steps": 300, "tune_steps": 100, "windows": 64},
    )


if __name__ == "__main__":
    main()
