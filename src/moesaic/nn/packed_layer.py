"""A layer once more, in the order in which native code reads it: one call routes and computes.

It serves calls without gradients for as long as the layer is what was packed. Whatever else is
asked of the layer, such as the record of its routing, runs as if it were not there.

Shapes: T tokens, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from moesaic.nn.experts._base import Experts
from moesaic.nn.layer import MoELayer
from moesaic.ops.cpu.ffn import PackedFfn, PackedRouter
from moesaic.ops.cpu.operators import Sources, traced
from moesaic.ops.cpu.packed import Format, PackedExperts, PackedLinear, input_threshold
from moesaic.ops.select import say_once


def why_not_packed(layer: MoELayer) -> str:
    """What native code cannot do of a layer, as a verb and what follows; empty where it can.

    A router that it does not know is no reason: it can be asked in torch between two calls.
    """
    config = layer.config
    if layer.free is not None:
        return f"has free experts ({', '.join(layer.free.kinds)}), which have no native code"
    if config.iterations > 1 or config.iteration_residual != "none":
        return (
            f"runs {config.iterations} times in a row with residual "
            f"{config.iteration_residual!r}, which has no native code"
        )
    if config.reuse > 1:
        return f"uses the experts of {config.reuse} layers, which has no native code"
    for part in (layer.experts, layer.shared):
        if part is not None and not computes_weights(part):
            return f"has experts of the kind {config.experts!r}, which have no native code"
        if part is not None and input_threshold(part.weights()) > 0:
            return "leaves out inputs of its experts, which has no native code"
    return ""


def computes_weights(experts: Experts) -> bool:
    """Whether experts compute what their weights say and no more."""
    kind = type(experts)
    return kind.forward is Experts.forward and kind.dense is Experts.dense


def pack_ffn(layer: MoELayer, weight_format: Format) -> PackedFfn:
    """Pack what native code can run of a layer; without a router where that has to be asked.

    Args:
        layer: One that `why_not_packed` finds nothing against.
        weight_format: Of all but the router, which is not rounded.
    """

    def packed(experts: Experts | None) -> PackedExperts | None:
        return None if experts is None else PackedExperts(experts.weights(), weight_format)

    return _assembled(layer, weight_format, packed(layer.experts), packed(layer.shared))


def _assembled(
    layer: MoELayer,
    weight_format: Format,
    experts: PackedExperts | None,
    shared: PackedExperts | None,
) -> PackedFfn:
    choice = None if layer.router is None else layer.router.choice()
    router = None
    if choice is not None and layer.router is not None:
        router = PackedRouter(layer.router.score_map(), choice)
    bypass = None
    if layer.bypass is not None:
        down, up = layer.bypass.down_proj, layer.bypass.up_proj
        bypass = (
            PackedLinear(down.weight, None, weight_format),
            PackedLinear(up.weight, up.bias, weight_format),
        )
    return PackedFfn(
        router=router,
        experts=experts,
        shared=shared,
        output_bias_D=layer.output_bias,
        bypass=bypass,
    )


class PackedLayer:
    """The copy of a layer, and whether it still is one.

    Args:
        layer: One whose experts are packed, with a router that native code knows, if any.
        weight_format: Of the bypass.
    """

    def __init__(self, layer: MoELayer, weight_format: Format) -> None:
        parts = [None if part is None else part.packed for part in (layer.experts, layer.shared)]
        self._ffn = _assembled(layer, weight_format, *parts)  # type: ignore[arg-type]
        self._router = layer.router
        self._settings = {} if layer.router is None else vars(layer.router)
        names = () if layer.router is None else layer.router.moving
        self._moving = {name: self._settings[name] for name in names}
        self._experts = [vars(part) for part in (layer.experts, layer.shared) if part is not None]
        modules = list(layer.modules())
        # Dictionaries of the modules, and not the modules: every object that is looked at costs
        # more than the comparison (see `run_layer`).
        self._children = [
            (module._modules, name, child)
            for module in modules
            for name, child in module._modules.items()
        ]
        self._hooks = [
            hooks
            for module in modules[1:]
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        # Tensors of inference mode have no version.
        self._tensors: list[tuple[dict[str, Any], str, Tensor, int, int | None]] = [
            (
                *(store, name, tensor, tensor.data_ptr()),
                None if tensor.is_inference() else tensor._version,
            )
            for module in modules
            for store in (module._parameters, module._buffers)
            for name, tensor in store.items()
            if tensor is not None
        ]
        self._sources = Sources([x[2] for x in self._tensors], [x[4] or 0 for x in self._tensors])

    def __call__(self, layer: MoELayer, h: Tensor) -> Tensor | None:
        """Apply the layer to tokens.

        Args:
            layer: What was packed.
            h: Inputs, [..., D].

        Returns:
            Outputs, in the shape and dtype of h; none if the call wants what native code does not
            give, or the layer is no longer what was packed.
        """
        if torch.is_grad_enabled() or layer.training or layer.all_on or not h.is_cpu:
            return None
        for hooks in self._hooks:
            if hooks:
                return None
        for settings in self._experts:
            if settings.get("backend", "auto") not in ("auto", "native"):
                return None
        if not self._is_copy(traced(h)):
            say_once(
                "a layer changed since it was packed, so its one native call stays unused; pack "
                "again"
            )
            return None
        for name, value in self._moving.items():
            if self._settings[name] != value:
                if traced(h):
                    # A graph being made cannot tell native code.
                    return None
                self._follow()
        return self._ffn(h, self._sources)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied module has weights of its own, which are not packed."""

    def _follow(self) -> None:
        """Let native code decide as the router does now."""
        choice = None if self._router is None else self._router.choice()
        assert choice is not None, "what moves is a number in the choice"
        self._ffn.decide_by(choice)
        self._moving = {name: self._settings[name] for name in self._moving}

    def _is_copy(self, graph: bool) -> bool:
        """Whether modules and tensors are those that were packed.

        Args:
            graph: Whether a graph is being made, where what can be asked is less.
        """
        for modules, name, child in self._children:
            if modules.get(name) is not child:
                return False
        # What compiles has no addresses and no versions: its graph checks these whenever it runs.
        addresses = not graph or not is_dynamo_compiling()
        # What exports has put others in the place of all tensors.
        exporting = graph and torch.compiler.is_exporting()
        for store, name, tensor, address, version in self._tensors:
            if not exporting and store.get(name) is not tensor:
                return False
            if addresses and (
                tensor.data_ptr() != address or (version is not None and tensor._version != version)
            ):
                return False
        return True


def pack_layer(layer: MoELayer, weight_format: Format) -> PackedLayer | None:
    """Make the one call of a layer whose experts are packed; says so where there is none."""
    reason = why_not_packed(layer)
    if not reason and layer.router is not None and layer.router.choice() is None:
        reason = f"has the router {layer.config.router!r}, which as it is set has no native code"
    if reason:
        say_once(f"experts run natively, but each layer in several calls: it {reason}")
        return None
    return PackedLayer(layer, weight_format)
