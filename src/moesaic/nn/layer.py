"""A mixture-of-experts layer: router, experts, combine, and what is always on.

Shapes: T tokens, D model width, E experts, F width of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moesaic._config import build_config
from moesaic._errors import InputError
from moesaic.nn.bypass import Bypass
from moesaic.nn.experts._base import Experts, ExpertsConfig
from moesaic.nn.experts._mixed import MixedExperts
from moesaic.nn.experts._table import EXPERTS
from moesaic.nn.free import FreeExperts
from moesaic.nn.routers._base import Router, RouterState
from moesaic.nn.routers._table import ROUTERS
from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """One layer as data; it is saved in the checkpoint's config.

    Attributes:
        num_experts: E; 0 for a layer that has only its shared part.
        width: F.
        shared_width: Neurons that are always on.
        output_bias: Whether a bias is added to the output, whatever is on.
        router: Name of the router; empty when there are no routed experts.
        router_options: Its settings.
        experts: Name of the kind of experts, or one name for each expert.
        activation: Name of the activation.
        bias: Whether the up products have a bias.
        expert_bias: Whether each expert's output has a bias, which its weight scales; the shared
            part has none of its own, that is `output_bias`.
        bypass_rank: Rank of the linear map that stands in for experts that are off; 0 for none.
    """

    num_experts: int
    width: int = 0
    shared_width: int = 0
    output_bias: bool = False
    router: str = ""
    router_options: Mapping[str, Any] = field(default_factory=dict)
    experts: str | tuple[str, ...] = "gated"
    activation: str = "silu"
    bias: bool = False
    expert_bias: bool = False
    bypass_rank: int = 0

    def __post_init__(self) -> None:
        sizes = (self.num_experts, self.width, self.shared_width, self.bypass_rank)
        if min(sizes) < 0:
            raise InputError(
                "num_experts, width, shared_width and bypass_rank must be at least 0, got "
                f"{', '.join(map(str, sizes))}; the checkpoint's config is damaged"
            )
        if self.num_experts and not self.router:
            raise InputError(f"a layer of {self.num_experts} experts needs a router; name one")
        if not isinstance(self.experts, str) and len(self.experts) != self.num_experts:
            raise InputError(
                f"experts must be one kind or one for each of the num_experts={self.num_experts}, "
                f"got {len(self.experts)}; name as many"
            )
        if not isinstance(self.experts, str) and self.shared_width:
            raise InputError(
                f"shared_width must be 0 where experts differ in kind, got {self.shared_width}; "
                "name one kind"
            )


class MoELayer(nn.Module):
    """Router, experts and combine, in the place of a feed-forward network.

    It maps [..., D] to [..., D], so it stands wherever a feed-forward network stood. What was
    routed is read with `record_routing`.

    Args:
        dim: D.
        config: The layer as data.
    """

    def __init__(self, dim: int, config: LayerConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = dim
        options = ExpertsConfig(activation=config.activation, bias=config.bias)
        routed = replace(options, down_bias=config.expert_bias)
        self.router: Router | None = None
        self.experts: Experts | None = None
        self.shared: Experts | None = None
        if config.num_experts:
            settings = build_config(
                ROUTERS.load_config(config.router),
                config.router_options,
                where=f"router {config.router}",
            )
            self.router = ROUTERS.load(config.router)(dim, config.num_experts, settings)
            self.experts = _make_experts(dim, config, routed)
        if config.shared_width:
            assert isinstance(config.experts, str), (
                "experts that differ in kind have no shared part"
            )
            self.shared = EXPERTS.load(config.experts)(dim, 1, config.shared_width, options)
        self.free: FreeExperts | None = None
        if self.router is not None and self.router.free_experts:
            self.free = FreeExperts(dim, self.router.free_experts)
        self.output_bias = nn.Parameter(torch.zeros(dim)) if config.output_bias else None
        self.bypass = Bypass(dim, config.bypass_rank) if config.bypass_rank else None
        # Set by `all_experts_on`: the layer then is its dense parent.
        self.all_on = False

    def forward(self, h: Tensor, state: RouterState | None = None) -> Tensor:
        """Route the tokens, apply their experts and add what is always on.

        Args:
            h: Inputs, [..., D].
            state: What some routers and experts need beyond the token.

        Returns:
            Outputs, in the shape and dtype of h.
        """
        h_TD = h.reshape(-1, self.dim)
        out_TD: Tensor | None = None
        if self.router is not None and self.experts is not None:
            if self.all_on:
                out_TD = self.experts(h_TD, None, state)
            else:
                routing = self.router(h_TD, state)
                out_TD = self.experts(h_TD, routing, state)
                if self.free is not None:
                    assert routing.free_weights_TZ is not None, "its router has free experts"
                    out_TD = out_TD + self.free(h_TD, routing.free_weights_TZ)
        if self.shared is not None:
            shared_TD = self.shared(h_TD, None, state)
            out_TD = shared_TD if out_TD is None else out_TD + shared_TD
        if out_TD is None:
            out_TD = torch.zeros_like(h_TD)
        if self.output_bias is not None:
            out_TD = out_TD + self.output_bias.to(out_TD.dtype)
        # With all experts on it has nothing to stand in for.
        if self.bypass is not None and not self.all_on:
            out_TD = out_TD + self.bypass(h_TD)
        return out_TD.reshape(h.shape)


def _make_experts(dim: int, config: LayerConfig, options: ExpertsConfig) -> Experts:
    """The routed experts of a layer."""
    if not isinstance(config.experts, str):
        return MixedExperts(dim, config.experts, config.width, options)
    experts: Experts = EXPERTS.load(config.experts)(dim, config.num_experts, config.width, options)
    return experts


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def end_step(model: nn.Module) -> None:
    """Tell every router that an optimiser step has ended.

    Some move a bias by its loads, some follow a schedule.

    `moesaic.train` and `moesaic.training.EndStep`, a callback for the Trainer of transformers, do
    this; a training loop of one's own calls it after `optimizer.step()`.
    """
    for layer in moe_layers(model):
        if layer.router is not None:
            layer.router.end_step()


@contextmanager
def all_experts_on(model: nn.Module) -> Iterator[None]:
    """Make every layer compute all experts at weight one, routers unasked, while it lasts.

    A model cut out of a dense one is then that dense model: the teacher of its own distillation.
    """
    layers = moe_layers(model)
    before = [layer.all_on for layer in layers]
    for layer in layers:
        layer.all_on = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.all_on = value


@contextmanager
def pass_state(model: nn.Module) -> Iterator[None]:
    """Give routers that need it the routing of the layer before, in the order the layers run.

    It holds for one pass over the model, whose own `forward` does this. Without such routers
    nothing happens.
    """
    layers = [layer for layer in moe_layers(model) if layer.router is not None]
    last: list[Routing] = []

    def give(layer: MoELayer, args: Any, options: dict[str, Any]) -> Any:
        # What the caller gives beside it stays.
        given = [*args[1:], options.get("state"), RouterState()]
        state = next(state for state in given if state is not None)
        return args[:1], {"state": replace(state, previous=last[0] if last else None)}

    def keep(router: nn.Module, args: object, routing: Routing) -> None:
        last[:] = [routing]

    handles = []
    if any(layer.router.needs_previous for layer in layers if layer.router is not None):
        for layer in layers:
            assert layer.router is not None
            handles.append(layer.register_forward_pre_hook(give, with_kwargs=True))
            handles.append(layer.router.register_forward_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Collect the routing of every layer that has a router, in the order they run.

    The hooks are gone when the block ends, so a backward pass that recomputes a layer is not
    recorded twice.
    """
    routings: list[Routing] = []

    def keep(module: nn.Module, args: object, routing: Routing) -> None:
        routings.append(routing)

    handles = [
        layer.router.register_forward_hook(keep)
        for layer in moe_layers(model)
        if layer.router is not None
    ]
    try:
        yield routings
    finally:
        for handle in handles:
            handle.remove()
