"""What the tests of layers share: methods by name at any number of experts, routings by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moesaic._config import build_config
from moesaic.nn.layer import LayerConfig, MoELayer
from moesaic.nn.losses._table import LOSSES
from moesaic.nn.routers._base import Router, RouterState
from moesaic.nn.routers._table import ROUTERS
from moesaic.nn.routing import Routing


def router_options(name: str, num_experts: int, **options: Any) -> dict[str, Any]:
    """The defaults of a router, with no more slots than experts, small tiles and no chance."""
    fields = {field.name: field for field in dataclasses.fields(ROUTERS.load_config(name))}
    if "top_k" in fields:
        options.setdefault("top_k", min(fields["top_k"].default, num_experts))
    if "early_top_k" in fields:
        options.setdefault("early_top_k", min(fields["early_top_k"].default, num_experts))
    if "router" in fields:
        inner = options.get("router", fields["router"].default)
        options["options"] = router_options(inner, num_experts, **options.get("options", {}))
    if "initial" in fields:
        options.setdefault("initial", min(fields["initial"].default, num_experts))
    if "capacity" in fields:
        options.setdefault("capacity", min(fields["capacity"].default, num_experts))
    if "probability" in fields:
        # Else hardly any test would see what is done now and then; hiding tasks is not seen.
        options.setdefault("probability", 0.0 if "num_tasks" in fields else 1.0)
    if "num_groups" in fields and num_experts % 2:
        options.setdefault("num_groups", 1)
    if "tile_rows" in fields:
        # Test batches are far smaller than the tiles of a GPU.
        options.setdefault("tile_rows", 4)
    return options


def make_router(
    name: str, num_experts: int, dim: int = 17, *, seed: int = 0, spread_out: float = 1.0, **options
) -> Router:
    """Build a router whose scores have a spread of about one, in evaluation mode."""
    settings = build_config(
        ROUTERS.load_config(name), router_options(name, num_experts, **options), where=name
    )
    router = ROUTERS.load(name)(dim, num_experts, settings)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name_of, parameter in router.named_parameters():
            normal = torch.randn(parameter.shape, generator=draw)
            # Factors of a normalisation stay about one, or scores had no spread.
            about = 1.0 if name_of == "norm_weight" else 0.0
            parameter.copy_(about + normal * spread_out * dim**-0.5)
    return router.eval()


def end_schedules(router: Router) -> None:
    """Take a router to where training changes nothing more but its weights."""
    router.clock.steps_done.fill_(10**9)


def make_layer(
    router: str = "sigmoid-threshold",
    *,
    dim: int = 17,
    num_experts: int = 6,
    width: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    router_config: dict[str, Any] | None = None,
    **layer: Any,
) -> MoELayer:
    """Build a layer whose weights are of order one."""
    config = LayerConfig(
        num_experts=num_experts,
        width=width,
        router=router if num_experts else "",
        router_options=router_options(router, num_experts, **(router_config or {}))
        if num_experts
        else {},
        **layer,
    )
    moe = MoELayer(dim, config).to(dtype)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moe.parameters():
            normal = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.copy_(normal * parameter.shape[-1] ** -0.5)
    return moe


def tokens(num_tokens: int, dim: int = 17, *, seed: int = 1, dtype=torch.float32) -> Tensor:
    """Draw inputs."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, dim, generator=draw, dtype=torch.float64).to(dtype)


def route(router: Router, h_TD: Tensor, **state: Any) -> Routing:
    """Route as a model does, with ids that follow from the tokens for a router that reads them."""
    return router(h_TD, RouterState(**state, **given_ids(router, h_TD)))


def given_ids(router: Router, h: Tensor) -> dict[str, Tensor]:
    """What a model or its caller adds to the state of a router that reads ids, [..., D] to [T]."""
    ids_T = (1000 * h[..., 0].flatten().double()).long()
    given = {}
    if router.needs_tokens:
        given["tokens_T"] = ids_T % router.config.vocab_size
    if router.reads_tasks:
        # That of some is unknown.
        given["tasks_B"] = ids_T % (router.config.num_tasks + 1) - 1
    return given


def set_scores(router: Router, scores_TE: Tensor) -> Tensor:
    """Make a router score what is given, exactly; returns the inputs to route.

    Token t is the t-th unit vector and column t of the weight holds its scores.
    """
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, : scores_TE.shape[0]] = scores_TE.T
    return torch.eye(scores_TE.shape[0], router.weight.shape[1], dtype=router.weight.dtype)


def hand_routing(
    scores: list[list[float]] | Tensor, ids: list[list[int]], num_experts: int | None = None
) -> Routing:
    """A routing by hand; held slots weigh one."""
    scores_TE = torch.as_tensor(scores, dtype=torch.float32)
    num_experts = scores_TE.shape[1] if num_experts is None else num_experts
    ids_TK = torch.tensor(ids)
    return Routing(ids_TK, (ids_TK < num_experts).float(), scores_TE, num_experts)


def make_loss(name: str, **options: Any):
    """A loss as a function of routing and mask."""
    config = build_config(LOSSES.load_config(name), options, where=name)
    function = LOSSES.load(name)
    return lambda routing, mask_BS: function(routing, mask_BS, config)


def expert_outputs(moe: MoELayer, h_TD: Tensor) -> Tensor:
    """Output of every expert alone, written out, [T, E, D]; gated silu experts without bias."""
    gate_up, down = moe.experts.gate_up_proj, moe.experts.down_proj
    width = moe.config.width
    outs = []
    for e in range(moe.config.num_experts):
        gate = h_TD @ gate_up[e, :width].T
        up = h_TD @ gate_up[e, width:].T
        outs.append((gate * gate.sigmoid() * up) @ down[e].T)
    return torch.stack(outs, 1)


def dense_weights(routing: Routing) -> Tensor:
    """Weights [T, E] by a loop over slots, independent of `Routing.weights_TE`."""
    out_TE = torch.zeros(routing.ids_TK.shape[0], routing.num_experts, dtype=torch.float64)
    for t, (ids, values) in enumerate(
        zip(routing.ids_TK.tolist(), routing.weights_TK.tolist(), strict=True)
    ):
        for expert, value in zip(ids, values, strict=True):
            if 0 <= expert < routing.num_experts:
                out_TE[t, expert] += value
    return out_TE
