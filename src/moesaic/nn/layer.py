"""A mixture-of-experts layer: router, experts, combine, and what is always on.

Shapes: T tokens, D model width, E experts, F width of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from moesaic._config import build_config
from moesaic._errors import InputError
from moesaic._hooks import hooked
from moesaic.nn.bypass import Bypass
from moesaic.nn.experts._base import Experts, ExpertsConfig
from moesaic.nn.experts._mixed import MixedExperts
from moesaic.nn.experts._table import EXPERTS
from moesaic.nn.free import FreeExperts
from moesaic.nn.part import Part
from moesaic.nn.routers._base import Router, RouterState
from moesaic.nn.routers._table import ROUTERS
from moesaic.nn.routing import Routing


class PackedLayer(Protocol):
    """A copy of a layer in the order in which native code reads it."""

    def __call__(self, layer: MoELayer, h: Tensor) -> Tensor | None:
        """Apply the layer to tokens [..., D]; none if the call has to run in torch."""
        ...


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
        experts_options: Settings of that kind, if it is one, beyond the activation and the biases.
        activation: Name of the activation.
        bias: Whether the up products have a bias.
        expert_bias: Whether each expert's output has a bias, which its weight scales; the shared
            part has none of its own, that is `output_bias`.
        bypass_rank: Rank of the linear map that stands in for experts that are off; 0 for none.
        iterations: Times that the layer runs in a row, routing anew each time (Chain-of-Experts,
            arXiv 2506.18945). What is shared runs each time, too; no weights are added but routers.
        iteration_residual: What an iteration gives: its experts alone (`none`), or these and its
            input (`inner`, the paper). `change` (ours) is `inner` less the input of the layer,
            where a decoder adds that itself.
        one_router: Whether all iterations ask the same router; the paper found it worse.
        reuse: Layers of a group, in a row, that choose among the experts of all of them (ReXMoE,
            arXiv 2510.17483). Set it alike in all layers, whose number it divides.
    """

    num_experts: int
    width: int = 0
    shared_width: int = 0
    output_bias: bool = False
    router: str = ""
    router_options: Mapping[str, Any] = field(default_factory=dict)
    experts: str | tuple[str, ...] = "gated"
    experts_options: Mapping[str, Any] = field(default_factory=dict)
    activation: str = "silu"
    bias: bool = False
    expert_bias: bool = False
    bypass_rank: int = 0
    iterations: int = 1
    iteration_residual: Literal["none", "inner", "change"] = "none"
    one_router: bool = False
    reuse: int = 1

    def __post_init__(self) -> None:
        sizes = (self.num_experts, self.width, self.shared_width, self.bypass_rank)
        if min(sizes) < 0:
            raise InputError(
                "num_experts, width, shared_width and bypass_rank must be at least 0, got "
                f"{', '.join(map(str, sizes))}; the checkpoint's config is damaged"
            )
        if self.num_experts and not self.router:
            raise InputError(f"a layer of {self.num_experts} experts needs a router; name one")
        if self.iterations < 1:
            raise InputError(f"iterations must be at least 1, got {self.iterations}; 2 is usual")
        if self.reuse < 1:
            raise InputError(f"reuse must be at least 1, got {self.reuse}; 2 to 4 are usual")
        if max(self.iterations, self.reuse) > 1 and not self.num_experts:
            raise InputError(
                f"iterations={self.iterations} and reuse={self.reuse} need routed experts, got "
                "num_experts=0; set both to 1"
            )
        if not isinstance(self.experts, str) and len(self.experts) != self.num_experts:
            raise InputError(
                f"experts must be one kind or one for each of the num_experts={self.num_experts}, "
                f"got {len(self.experts)}; name as many"
            )
        if not isinstance(self.experts, str) and self.experts_options:
            raise InputError(
                "experts_options must be empty where experts differ in kind, got "
                f"{sorted(self.experts_options)}; name one kind"
            )
        if not isinstance(self.experts, str) and self.shared_width:
            raise InputError(
                f"shared_width must be 0 where experts differ in kind, got {self.shared_width}; "
                "name one kind"
            )

    @property
    def num_candidates(self) -> int:
        """Experts that the router chooses among."""
        return self.num_experts * self.reuse


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
        self.router: Router | None = None
        self.experts: Experts | None = None
        self.shared: Experts | None = None
        if config.num_experts:
            self.router = self._make_router()
            self.experts = _make_experts(dim, config)
        if config.shared_width:
            self.shared = _make_shared(dim, config)
        self.free: FreeExperts | None = None
        if self.router is not None and self.router.free_experts:
            self.free = FreeExperts(dim, self.router.free_experts)
        # Of the second iteration and those after it.
        self.later_routers: nn.ModuleList | None = None
        if config.iterations > 1 and not config.one_router:
            self.later_routers = nn.ModuleList(
                self._make_router() for _ in range(config.iterations - 1)
            )
        self.output_bias = nn.Parameter(torch.zeros(dim)) if config.output_bias else None
        self.bypass = Bypass(dim, config.bypass_rank) if config.bypass_rank else None
        # Of the group, in order; in a tuple, so that other layers' weights are not this one's, too.
        self._group: tuple[Experts, ...] = ()
        # Set by `all_experts_on`: the layer then is its dense parent.
        self.all_on = False
        # Set by `moesaic.inference.pack_experts`: all of the layer in one native call.
        self.packed: PackedLayer | None = None

    def forward(self, h: Tensor, state: RouterState | None = None) -> Tensor:
        """Route the tokens, apply their experts and add what is always on.

        Args:
            h: Inputs, [..., D].
            state: What some routers and experts need beyond the token.

        Returns:
            Outputs, in the shape and dtype of h.
        """
        if self.packed is not None:
            out = self.packed(self, h)
            if out is not None:
                return out
        h_TD = h.reshape(-1, self.dim)
        state = replace(state or RouterState(), num_sequences=math.prod(h.shape[:-2]))
        if self.all_on or self.router is None:
            return self._run(h_TD, None, state)[0].reshape(h.shape)
        residual = self.config.iteration_residual
        x_TD = h_TD
        for router in self.turns():
            out_TD, routing = self._run(x_TD, router, state)
            state = replace(state, previous=routing)
            x_TD = out_TD if residual == "none" else x_TD + out_TD
        if residual == "change":
            x_TD = x_TD - h_TD
        return x_TD.reshape(h.shape)

    def routers(self) -> list[Router]:
        """Every router of the layer, once; none where nothing is routed."""
        later: Any = [] if self.later_routers is None else self.later_routers
        # Adapters may have put themselves around one.
        return [router for router in (self.router, *later) if router is not None]

    def parts(self) -> list[Part]:
        """Its routers and experts, those of a shared part among them."""
        experts: list[Any] = [self.experts, self.shared]
        return [part for part in (*self.routers(), *experts) if part is not None]

    def turns(self) -> list[Router]:
        """The router of every iteration, in their order."""
        routers = self.routers()
        return routers * self.config.iterations if len(routers) == 1 else routers

    def _make_router(self) -> Router:
        name = self.config.router
        options = build_config(
            ROUTERS.load_config(name), self.config.router_options, where=f"router {name}"
        )
        router: Router = ROUTERS.load(name)(self.dim, self.config.num_candidates, options)
        return router

    def link(self, layers: Sequence[MoELayer]) -> None:
        """Take hold of the experts of its group.

        Args:
            layers: All that have a router, first to last, this one among them.

        Raises:
            InputError: If the layers cannot be grouped.
        """
        size = self.config.reuse
        if size == 1:
            return
        place = [layer is self for layer in layers].index(True)
        first = place - place % size
        group = layers[first : first + size]
        kinds = {
            (layer.config.reuse, layer.config.num_experts, layer.config.width, layer.dim)
            for layer in group
        }
        if len(group) < size or len(kinds) > 1:
            raise InputError(
                f"reuse={size} needs groups of {size} layers in a row with the same reuse and the "
                f"same experts, got {len(group)} of {len(kinds)} kinds from layer {first} on; "
                "choose a divisor of the number of layers"
            )
        self._group = tuple(layer.experts for layer in group if layer.experts is not None)

    def _use_experts(
        self, h_TD: Tensor, routing: Routing | None, state: RouterState | None
    ) -> Tensor:
        """The experts of one iteration, of all layers of the group; without a routing its own."""
        assert self.experts is not None
        if routing is None or self.config.reuse == 1:
            return self.experts(h_TD, routing, state)  # type: ignore[no-any-return]
        if not self._group:
            raise InputError(
                f"reuse={self.config.reuse} needs the experts of other layers, got none; run "
                "moesaic.nn.layer.link_layers(model) after the layers are made"
            )
        parts = routing.split(len(self._group))
        outs = [
            experts(h_TD, part, state) for experts, part in zip(self._group, parts, strict=True)
        ]
        return torch.stack(outs).sum(0)

    def _run(
        self, h_TD: Tensor, router: Router | None, state: RouterState | None = None
    ) -> tuple[Tensor, Routing | None]:
        """One iteration; without a router all experts count as one."""
        routing: Routing | None = None
        out_TD: Tensor | None = None
        if self.experts is not None:
            if router is not None:
                routing = router(h_TD, state)
            out_TD = self._use_experts(h_TD, routing, state)
        if self.free is not None and routing is not None:
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
        return out_TD, routing


def _make_experts(dim: int, config: LayerConfig) -> Experts:
    """The routed experts of a layer."""
    if not isinstance(config.experts, str):
        options = ExpertsConfig(
            activation=config.activation, bias=config.bias, down_bias=config.expert_bias
        )
        return MixedExperts(dim, config.experts, config.width, options)
    settings = _settings(
        config, config.experts, config.experts_options, down_bias=config.expert_bias
    )
    experts: Experts = EXPERTS.load(config.experts)(dim, config.num_experts, config.width, settings)
    return experts


def _make_shared(dim: int, config: LayerConfig) -> Experts:
    """The part of a layer that is always on."""
    assert isinstance(config.experts, str), "the config refuses a shared part of several kinds"
    kind = EXPERTS.load(config.experts).shared_kind or config.experts
    shared: Experts = EXPERTS.load(kind)(
        dim, 1, config.shared_width, _settings(config, kind, {}, down_bias=False)
    )
    return shared


def _settings(
    config: LayerConfig, kind: str, options: Mapping[str, Any], *, down_bias: bool
) -> ExpertsConfig:
    """Settings of a kind of experts: those that all have, and its own."""
    common = {"activation": config.activation, "bias": config.bias, "down_bias": down_bias}
    made: ExpertsConfig = build_config(
        EXPERTS.load_config(kind), {**common, **options}, where=f"experts {kind}"
    )
    return made


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def link_layers(model: nn.Module) -> None:
    """Let the layers take hold of what they share, such as one recurrent cell for all routers.

    A model of `moesaic.models` does this itself; for layers of one's own it is called once, when
    all are made. What is shared stays with the layer that owns it: it is saved once.
    """
    layers = [layer for layer in moe_layers(model) if layer.router is not None]
    for layer in layers:
        layer.link(layers)
    routers = [router for layer in layers for router in layer.routers()]
    for router in routers:
        router.link(routers)


def end_step(model: nn.Module) -> None:
    """Tell routers and experts that an optimiser step has ended.

    Some move a bias by its loads, some follow a schedule, some hand on what its gradients said.

    `moesaic.train` and `moesaic.training.EndStep`, a callback for the Trainer of transformers, do
    this; a training loop of one's own calls it after `optimizer.step()`.
    """
    for layer in moe_layers(model):
        for part in layer.parts():
            part.end_step()


def forget_step(model: nn.Module) -> None:
    """Make routers and experts forget what passes left behind that no checkpoint holds.

    A training loop of one's own calls it, in the place of `end_step`, where the optimiser skipped a
    step, and after it where a checkpoint is saved: a run that is resumed from there then equals one
    that was not interrupted. `moesaic.train` and `moesaic.training.EndStep` do this.
    """
    for layer in moe_layers(model):
        for part in layer.parts():
            part.forget_step()


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
def pass_state(
    model: nn.Module, tokens: Tensor | None = None, tasks: Tensor | None = None
) -> Iterator[None]:
    """Give routers that need it the token ids, the tasks and the routing of the layer before.

    It holds for one pass over the model, whose own `forward` does this, but for the tasks, which
    only its caller knows: who has them calls the model inside. Without such routers nothing
    happens.

    Args:
        model: Whose layers run while it lasts.
        tokens: Ids of the tokens of the pass, in any shape; none if they are not known.
        tasks: Task of each sequence, or of each token, [B] or [T] int64, -1 where it is not known.

    Raises:
        InputError: If tasks are given while gradient checkpointing is on.
    """
    if tasks is not None and model.training and getattr(model, "is_gradient_checkpointing", False):
        raise InputError(
            "tasks need a model without gradient checkpointing, which computes a layer anew "
            "without them; call model.gradient_checkpointing_disable()"
        )
    layers = [layer for layer in moe_layers(model) if layer.router is not None]
    last: list[Routing] = []
    tokens_T = None if tokens is None else tokens.flatten()

    def give(layer: MoELayer, args: Any, options: dict[str, Any]) -> Any:
        # What the caller gives beside it stays.
        given = [*args[1:], options.get("state"), RouterState()]
        state = next(state for state in given if state is not None)
        state = replace(state, previous=last[0] if last else None, tokens_T=tokens_T)
        if tasks is not None:
            state = replace(state, tasks_B=tasks)
        return args[:1], {"state": state}

    def keep(router: nn.Module, args: object, routing: Routing) -> None:
        last[:] = [routing]

    handles = []
    routers = [router for layer in layers for router in layer.routers()]
    needed = any(router.needs_previous or router.needs_tokens for router in routers)
    if needed or (tasks is not None and any(router.reads_tasks for router in routers)):
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(give, with_kwargs=True))
            handles.extend(router.register_forward_hook(keep) for router in layer.routers())
    with hooked(handles):
        yield


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Collect the routing of every layer that has a router, in the order they run.

    A layer of several iterations gives one for each. When the block ends, each is charged with the
    losses of the experts that it drove, and the hooks are gone, so a backward pass that recomputes
    a layer is not recorded twice.
    """
    routings: list[Routing] = []
    driven: list[tuple[int, Experts, Routing]] = []

    def keep(module: nn.Module, args: object, routing: Routing) -> None:
        routings.append(routing)

    def drive(experts: Experts, args: tuple[Any, ...], out_TD: Tensor) -> None:
        # Without a routing all of them ran, as one network.
        if len(args) > 1 and args[1] is not None:
            driven.append((len(routings) - 1, experts, args[1]))

    handles = []
    for layer in moe_layers(model):
        handles += [router.register_forward_hook(keep) for router in layer.routers()]
        # Also those inside of others, where experts differ in kind.
        found = [module for module in layer.modules() if isinstance(module, Experts)]
        handles += [experts.register_forward_hook(drive) for experts in found]
    with hooked(handles):
        yield routings
        # Not in the pass: a layer that is recomputed runs without hooks, and has to do the same.
        for index, experts, routing in driven:
            routings[index] = routings[index].charge(experts.aux_losses(routing))
