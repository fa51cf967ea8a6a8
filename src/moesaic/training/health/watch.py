"""Hooks that count what the routers of a model decide while it trains.

A pass is counted while the model's own forward runs, in training mode and with gradients. So
gradient checkpointing, which runs layers again in the backward pass, counts no token twice, and
evaluation and generation count none.

Shapes: B sequences, S positions, T = B * S tokens, K slots per token, E experts.
"""

from __future__ import annotations

import inspect
import logging
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moesaic._errors import InputError
from moesaic.training.health.reading import (
    Decision,
    Gate,
    entropy_and_saturation,
    gate_of,
    read,
    read_scores,
    used,
)

_LOGGER = logging.getLogger(__name__)
_ROUTER = re.compile(r"(Router|Gate|Gating)$")
# After as many passes whose weights did not tell, the kind of gate stays unknown.
_TRIES = 100
# Beside the counts: tokens, entropy and its tokens, strong gates and all gates.
_NUM_SUMS = 5


@dataclass(frozen=True, slots=True)
class LayerSums:
    """What the tokens of some steps did in one layer.

    Attributes:
        name: The module that holds router and experts.
        tokens: Tokens that are not padding.
        counts: Tokens that used each expert.
        entropy: Mean entropy of the router over its largest, in [0, 1]; none if not known.
        saturation: Part of the gates above 0.99; none if not known.
    """

    name: str
    tokens: int
    counts: tuple[int, ...]
    entropy: float | None
    saturation: float | None


@dataclass(slots=True)
class _Layer:
    name: str
    num_experts: int
    gate: Gate | None = None
    tries: int = 0
    # Between the router and its experts: scores without a choice, and whether it was counted.
    scores_TE: Tensor | None = None
    counted: bool = False
    sums: Tensor | None = field(default=None, repr=False)


class Watch:
    """Watches a model from `start` to `stop`.

    Args:
        model: A model with layers of experts, of transformers or of ours.

    Raises:
        InputError: If it has no layer of experts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._blocks = _blocks(model)
        if not self._blocks:
            raise InputError(
                f"{type(model).__name__} has no layer with a router and experts to watch; give a "
                "mixture of experts"
            )
        self._layers = [
            _Layer(name, _num_experts(name, router, experts), getattr(router, "score_gate", None))
            for name, router, experts in self._blocks
        ]
        self._outer = _outer(model, [router for _, router, _ in self._blocks])
        self._signature = inspect.signature(self._outer.forward)
        self._handles: list[RemovableHandle] = []
        self._counting = False
        self._mask: Tensor | None = None
        self._passes = 0
        self._told: set[str] = set()

    @property
    def layers(self) -> list[tuple[str, int]]:
        """Name and number of experts of every layer."""
        return [(layer.name, layer.num_experts) for layer in self._layers]

    def start(self) -> None:
        """Put the hooks in."""
        self._handles = [
            self._outer.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._outer.register_forward_hook(self._leave, always_call=True),
        ]
        for layer, (_, router, experts) in zip(self._layers, self._blocks, strict=True):
            self._handles += [
                router.register_forward_hook(partial(self._routed, layer)),
                experts.register_forward_pre_hook(
                    partial(self._dispatched, layer), with_kwargs=True
                ),
            ]

    def stop(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self) -> list[LayerSums]:
        """Give the sums since the last call, over all processes, and begin anew; empty if none."""
        sums = [layer.sums for layer in self._layers]
        for layer in self._layers:
            layer.sums = None
        if self._passes and not any(one is not None for one in sums):
            self._tell(
                "training health saw passes of the model and no choice of experts in any layer; "
                "its routers give none and its experts are not called as those of transformers are"
            )
        self._passes = 0
        spread = distributed.is_available() and distributed.is_initialized()
        known = [one for one in sums if one is not None]
        if not known and not spread:
            return []
        device = known[0].device if known else next(self._outer.parameters()).device
        flat = torch.cat(
            [
                torch.zeros(layer.num_experts + _NUM_SUMS, dtype=_dtype(device), device=device)
                if one is None
                else one.to(device)
                for layer, one in zip(self._layers, sums, strict=True)
            ]
        )
        if spread:
            distributed.all_reduce(flat)
        values = iter(flat.tolist())
        found = []
        for layer in self._layers:
            counts = tuple(int(next(values)) for _ in range(layer.num_experts))
            tokens, entropy, with_entropy, strong, gates = (next(values) for _ in range(_NUM_SUMS))
            found.append(
                LayerSums(
                    layer.name,
                    int(tokens),
                    counts,
                    entropy / with_entropy if with_entropy else None,
                    strong / gates if gates else None,
                )
            )
        return found if any(layer.tokens for layer in found) else []

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._counting = module.training and torch.is_grad_enabled()
        if not self._counting:
            return
        for layer in self._layers:
            layer.scores_TE, layer.counted = None, False
        given = self._signature.bind_partial(*args, **options).arguments
        given = {**given, **given.get("kwargs", {})}
        self._mask = _token_mask(given)
        self._passes += 1

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        self._counting = False
        self._mask = None

    @torch.compiler.disable
    def _routed(self, layer: _Layer, module: nn.Module, args: object, output: Any) -> None:
        if not self._counting:
            return
        decision = read(output, layer.num_experts)
        layer.counted = decision is not None
        if decision is not None:
            self._count(layer, decision)
        else:
            layer.scores_TE = read_scores(output, layer.num_experts)

    @torch.compiler.disable
    def _dispatched(
        self, layer: _Layer, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Count the choices that experts are called with, where the router did not give them."""
        if not self._counting or layer.counted:
            return
        decision = read((*args, *options.values()), layer.num_experts)
        if decision is not None:
            self._count(layer, Decision(decision.ids_TK, decision.weights_TK, layer.scores_TE))

    @torch.no_grad()
    def _count(self, layer: _Layer, decision: Decision) -> None:
        ids_TK = decision.ids_TK
        num_experts = layer.num_experts
        mask_T1 = self._mask_for(ids_TK)
        used_TK = used(decision, num_experts) & mask_T1
        slots_TK = ids_TK.clamp(0, num_experts - 1).long()
        dtype = _dtype(ids_TK.device)
        sums = torch.zeros(num_experts + _NUM_SUMS, dtype=dtype, device=ids_TK.device)
        sums.scatter_add_(0, slots_TK.flatten(), used_TK.flatten().to(dtype))
        if layer.gate is None and layer.tries < _TRIES:
            layer.tries += 1
            layer.gate = gate_of(decision, num_experts)
        sums[num_experts] = mask_T1.sum()
        if layer.gate is not None and decision.scores_TE is not None:
            entropy_T, strong = entropy_and_saturation(decision.scores_TE, slots_TK, layer.gate)
            gates = used_TK if layer.gate == "sigmoid" else mask_T1
            found = (entropy_T * mask_T1[:, 0], mask_T1, strong & gates, gates)
            sums[num_experts + 1 :] = torch.stack([one.sum(dtype=dtype) for one in found])
        layer.sums = sums if layer.sums is None else layer.sums + sums

    def _mask_for(self, ids_TK: Tensor) -> Tensor:
        """True where a token is not padding, [T, 1]."""
        if self._mask is not None and self._mask.numel() == ids_TK.shape[0]:
            return self._mask.reshape(-1, 1).to(ids_TK.device)
        if self._mask is not None:
            self._tell(
                f"training health counts padding: a router sees {ids_TK.shape[0]} tokens and the "
                f"attention mask has {self._mask.numel()}"
            )
        return torch.ones(ids_TK.shape[0], 1, dtype=torch.bool, device=ids_TK.device)

    def _tell(self, sentence: str) -> None:
        """Warn once."""
        if sentence not in self._told:
            self._told.add(sentence)
            _LOGGER.warning(sentence)


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """Every module that holds a router and experts: its name and the two."""
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        experts = children.get("experts")
        if experts is None:
            continue
        router = children.get("router") or children.get("gate")
        if router is None:
            named = (m for m in children.values() if _ROUTER.search(type(m).__name__))
            router = next(named, None)
        if router is not None:
            found.append((name or type(module).__name__, router, experts))
    return found


def _num_experts(name: str, router: nn.Module, experts: nn.Module) -> int:
    """E. The router is asked first: under expert parallelism experts know their share alone."""
    for module in (router, experts):
        for field_name in ("num_experts", "n_routed_experts", "num_local_experts"):
            if isinstance(value := getattr(module, field_name, None), int):
                return value
    weight = getattr(router, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[0]
    raise InputError(
        f"{name} does not say how many experts it has; give its router an attribute num_experts"
    )


def _outer(model: nn.Module, routers: list[nn.Module]) -> nn.Module:
    """The module whose forward is one pass over all the layers.

    It is the innermost whole model of transformers that holds them, because some trainers call
    that one and not the model around it.
    """
    wanted = set(map(id, routers))
    outer = model
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and wanted <= set(map(id, module.modules())):
            outer = module
    return outer


def _token_mask(given: dict[str, Any]) -> Tensor | None:
    """True where a token of this pass is not padding, [B, S]; none if it is not known."""
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given.get("inputs_embeds")
    return (mask if tokens is None else mask[:, -tokens.shape[1] :]).bool()


def _dtype(device: torch.device) -> torch.dtype:
    """Exact for any count, where the device can."""
    return torch.float32 if device.type == "mps" else torch.float64
