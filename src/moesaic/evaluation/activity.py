"""How much of its feed-forward networks a model uses: per layer, per expert, per domain, per token.

The active fraction is the weights of the feed-forward networks that a token uses over those of
the dense parent's, so that cut models, pruned ones, thresholded ones and their parent compare. A
neuron's weights are alike, so of a model that switches whole experts it is the active neurons over
the dense ones. How much of an expert that is on, or of the part that always is, a token uses they
say themselves (`Experts.used_TE`): all of ordinary ones, the weights that are not zero of
statically pruned ones, those whose input is large of thresholded ones. The parameters of routers
are no weights of the networks: they count in active parameters and FLOPs
(`moesaic.evaluation.cost`), not here.

Shapes: T tokens, E experts of one layer, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moesaic._hooks import hooked
from moesaic.nn.experts._base import Experts, constant_share
from moesaic.nn.layer import moe_layers
from moesaic.nn.routing import Routing
from moesaic.nn.shape import LayerShape, layer_shapes


@dataclass(slots=True)
class LayerUse:
    """What the tokens of one forward used of a layer.

    Attributes:
        routings: Of every iteration of its router; none in a layer without.
        experts_T: Experts' worth of routed weights that each token used, summed over iterations,
            [T] float64; none in a layer without a router.
        shared_T: Share of the always-on part's weights that each token used, likewise; none in a
            layer without such a part.
    """

    routings: list[Routing] = field(default_factory=list)
    experts_T: Tensor | None = None
    shared_T: Tensor | None = None


class LayerShares(NamedTuple):
    """Share of the weights that every token uses, of a layer's experts and its always-on part.

    None where it depends on the token, or where there is no such part.
    """

    experts: float | None
    shared: float | None


def fixed_shares(model: nn.Module) -> list[LayerShares]:
    """Find the shares of every MoE layer; this reads all weights, to count what is zero."""
    return [
        LayerShares(
            None if layer.experts is None else layer.experts.used_share(),
            None if layer.shared is None else layer.shared.used_share(),
        )
        for layer in moe_layers(model)
    ]


@contextmanager
def record_use(
    model: nn.Module, shares: Sequence[LayerShares] | None = None
) -> Iterator[list[LayerUse]]:
    """Collect what one forward uses of every MoE layer, first to last, while the block lasts.

    Experts whose use depends on the token are asked with their own input, and compute their
    neurons a second time.

    Args:
        model: Dense or converted.
        shares: Its `fixed_shares`, for those who read more than once; counted here if none.

    Yields:
        What is filled in by the forward.
    """
    layers = moe_layers(model)
    uses = [LayerUse() for _ in layers]
    handles: list[RemovableHandle] = []
    if shares is None:
        shares = fixed_shares(model)
    for layer, use, share in zip(layers, uses, shares, strict=True):
        keep = partial(_keep_routing, use, share.experts)
        handles.extend(router.register_forward_hook(keep) for router in layer.routers())
        if layer.experts is not None and share.experts is None:
            handles.append(layer.experts.register_forward_hook(partial(_keep_experts, use)))
        if layer.shared is not None:
            keep = partial(_keep_shared, use, share.shared)
            handles.append(layer.shared.register_forward_hook(keep))
    with hooked(handles):
        yield uses


def _keep_routing(
    use: LayerUse, share: float | None, module: nn.Module, args: object, routing: Routing
) -> None:
    use.routings.append(routing)
    if share is not None:
        use.experts_T = _add(use.experts_T, routing.active_T().double() * share)


def _keep_experts(use: LayerUse, module: Experts, args: tuple[Any, ...], out: Tensor) -> None:
    h_TD, routing = args[0], args[1]
    if routing is not None:
        used_TE = module.used_TE(h_TD) * routing.active_TE()
        use.experts_T = _add(use.experts_T, used_TE.sum(1))


def _keep_shared(
    use: LayerUse, share: float | None, module: Experts, args: tuple[Tensor, ...], out: Tensor
) -> None:
    h_TD = args[0]
    used_T = module.used_TE(h_TD).mean(1) if share is None else constant_share(h_TD, share)
    use.shared_T = _add(use.shared_T, used_T)


def _add(total_T: Tensor | None, more_T: Tensor) -> Tensor:
    return more_T if total_T is None else total_T + more_T


def token_fractions(model: nn.Module, uses: Sequence[LayerUse], dense_width: int) -> Tensor:
    """Active fraction of each token, the mean over layers, [T] float64.

    Args:
        model: A model with MoE layers.
        uses: What `record_use` collected in one forward of it.
        dense_width: Neurons of the dense parent's network.
    """
    shapes = layer_shapes(model, dense_width)
    total_T: Tensor | float = 0.0
    for shape, use in zip(shapes, uses, strict=True):
        neurons_T: Tensor | float = shape.iterations * shape.beside_width
        if use.shared_T is not None:
            neurons_T = neurons_T + use.shared_T * shape.shared_width
        if use.experts_T is not None:
            neurons_T = neurons_T + use.experts_T * shape.width
        total_T = total_T + neurons_T / shape.dense_width
    assert isinstance(total_T, Tensor)
    return total_T / len(shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """How often each expert was on, and how much of what is always on, while text was read.

    Attributes:
        shapes: One per MoE layer.
        tokens: Tokens read, by domain.
        counts: Tokens for which each expert was on, by domain: per layer an [E] int64, in which
            every iteration counts.
        experts: Sum over tokens of the experts' worth of weights that they used, by domain: one
            per layer, over all iterations. Where experts are used whole it is the sum of `counts`.
        shared: Sum over tokens of the share of the always-on part's weights that they used, by
            domain, the mean over iterations: one per layer, 0 without such a part.
    """

    shapes: tuple[LayerShape, ...]
    tokens: Mapping[str, int]
    counts: Mapping[str, tuple[NDArray[np.int64], ...]]
    experts: Mapping[str, tuple[float, ...]]
    shared: Mapping[str, tuple[float, ...]]

    def experts_per_layer(self) -> list[list[float]]:
        """Share of all tokens for which each expert was on, by layer."""
        total = sum(self.tokens.values())
        return [
            (np.sum([layers[i] for layers in self.counts.values()], axis=0) / total).tolist()
            for i in range(len(self.shapes))
        ]

    def mean_per_layer(self, domain: str | None = None) -> list[float]:
        """Mean active fraction of each layer, over one domain or over all tokens."""
        domains = list(self.tokens) if domain is None else [domain]
        total = sum(self.tokens[name] for name in domains)
        return [
            shape.fraction(
                sum(self.experts[name][i] for name in domains) / total,
                sum(self.shared[name][i] for name in domains) / total,
            )
            for i, shape in enumerate(self.shapes)
        ]

    def mean(self) -> float:
        """Mean active fraction over layers and tokens."""
        return float(np.mean(self.mean_per_layer()))

    def to_plain(self) -> dict[str, Any]:
        """The `activation` section of the evaluation record."""
        return {
            "experts_per_layer": self.experts_per_layer(),
            "mean_per_layer": self.mean_per_layer(),
            "per_domain": {name: self.mean_per_layer(name) for name in self.tokens},
        }


class ActivityMeter:
    """Measures use batch by batch, so that text is read once for quality and activity.

    The weights must stay as they are while it is used.

    Args:
        model: Dense or converted; a dense one has nothing to measure.
        dense_width: Neurons of the dense parent's network.
    """

    def __init__(self, model: nn.Module, dense_width: int) -> None:
        self._model = model
        self._shapes = tuple(layer_shapes(model, dense_width))
        # Once and not with every batch: it reads the weights.
        self._fixed = fixed_shares(model)
        self._tokens: dict[str, int] = {}
        self._counts: dict[str, list[NDArray[np.int64]]] = {}
        self._experts: dict[str, list[float]] = {}
        self._shared: dict[str, list[float]] = {}

    @contextmanager
    def reading(self, domain: str, num_tokens: int) -> Iterator[None]:
        """Count the one forward of `num_tokens` tokens of a domain that the block makes."""
        with record_use(self._model, self._fixed) as uses:
            yield
        if domain not in self._counts:
            self._tokens[domain] = 0
            self._counts[domain] = [np.zeros(s.num_candidates, np.int64) for s in self._shapes]
            self._experts[domain] = [0.0 for _ in self._shapes]
            self._shared[domain] = [0.0 for _ in self._shapes]
        self._tokens[domain] += num_tokens
        for i, use in enumerate(uses):
            for routing in use.routings:
                self._counts[domain][i] += routing.counts_E().to("cpu", torch.int64).numpy()
            if use.experts_T is not None:
                self._experts[domain][i] += float(use.experts_T.sum())
            if use.shared_T is not None:
                self._shared[domain][i] += float(use.shared_T.sum()) / self._shapes[i].iterations

    def result(self) -> Activation | None:
        """What was measured; nothing for a dense model."""
        if not self._shapes:
            return None
        return Activation(
            shapes=self._shapes,
            tokens=dict(self._tokens),
            counts={name: tuple(layers) for name, layers in self._counts.items()},
            experts={name: tuple(layers) for name, layers in self._experts.items()},
            shared={name: tuple(layers) for name, layers in self._shared.items()},
        )
