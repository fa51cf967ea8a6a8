"""The feed-forward networks of a model: find them, read their matrices, put a layer in their place.

Shapes: F neurons of the network, D model width.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.models.architectures import Architecture, architecture_of
from moesaic.nn.layer import MoELayer
from moesaic.ops.weights import ExpertWeights, activation


class FFN(NamedTuple):
    """The matrices of one dense feed-forward network, out x in; neuron j is row j of up and gate.

    Attributes:
        gate_FD: Gate rows, or none for a plain network.
        up_FD: Up rows.
        down_DF: Down columns.
        gate_bias_F: Or none.
        up_bias_F: Or none.
        down_bias_D: Or none.
        activation: Name of the activation.
    """

    gate_FD: Tensor | None
    up_FD: Tensor
    down_DF: Tensor
    gate_bias_F: Tensor | None
    up_bias_F: Tensor | None
    down_bias_D: Tensor | None
    activation: str

    @property
    def width(self) -> int:
        """F."""
        return self.up_FD.shape[0]

    def neurons(self, h_TD: Tensor) -> Tensor:
        """Value of every neuron for every token, [T, F]."""
        act = activation(self.activation)
        up_TF = nnf.linear(h_TD, self.up_FD, self.up_bias_F)
        if self.gate_FD is None:
            return act(up_TF)
        return act(nnf.linear(h_TD, self.gate_FD, self.gate_bias_F)) * up_TF

    def as_expert(self) -> ExpertWeights:
        """The network as one expert."""

        def stack(gate: Tensor | None, up: Tensor | None) -> Tensor | None:
            rows = up if gate is None or up is None else torch.cat([gate, up])
            return None if rows is None else rows.unsqueeze(0)

        up = stack(self.gate_FD, self.up_FD)
        assert up is not None
        return ExpertWeights(
            up=up,
            down=self.down_DF.unsqueeze(0),
            activation=self.activation,
            gated=self.gate_FD is not None,
            up_bias=stack(self.gate_bias_F, self.up_bias_F),
            down_bias=None if self.down_bias_D is None else self.down_bias_D.unsqueeze(0),
        )

    def keep(self, neurons_K: Tensor) -> FFN:
        """The same network with only some neurons, in the order given."""

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[neurons_K]

        return self._replace(
            gate_FD=rows(self.gate_FD),
            up_FD=self.up_FD[neurons_K],
            down_DF=self.down_DF[:, neurons_K],
            gate_bias_F=rows(self.gate_bias_F),
            up_bias_F=rows(self.up_bias_F),
        )


def dense_ffn_width(config: Any) -> int:
    """Neurons of one network of the dense model that a config describes or stems from.

    Args:
        config: A transformers config; a converted model keeps the fields of its parent.
    """
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        width = getattr(config, name, None)
        if width is not None:
            return int(width)
    # GPT-2 leaves its width out where it is the usual one.
    return 4 * int(config.hidden_size)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of a dense or converted model, first to last."""
    row = architecture_of(model.config.model_type)
    return list(attrgetter(row.layers)(model))


def ffn_module(layer: nn.Module, row: Architecture) -> nn.Module:
    """The module of a decoder layer whose input is the network's input."""
    module: nn.Module = attrgetter(row.ffn)(layer)
    return module


def ffn_output(layer: nn.Module, row: Architecture) -> nn.Module:
    """The module of a decoder layer whose output is the network's output, dense or converted."""
    module = ffn_module(layer, row)
    if isinstance(module, MoELayer):
        return module
    down: nn.Module = attrgetter(row.down)(layer)
    return down


def read_ffn(layer: nn.Module, row: Architecture, act: str) -> FFN:
    """Read the dense network of a decoder layer; the tensors share its memory where they can."""

    def matrix(path: str) -> tuple[Tensor, Tensor | None]:
        module = attrgetter(path)(layer)
        weight = module.weight.detach()
        bias = None if module.bias is None else module.bias.detach()
        return (weight.T if row.transposed else weight), bias

    up_FD, up_bias_F = matrix(row.up)
    down_DF, down_bias_D = matrix(row.down)
    gate_FD: Tensor | None = None
    gate_bias_F: Tensor | None = None
    if row.fused:
        gate_FD, up_FD = up_FD.chunk(2)
        if up_bias_F is not None:
            gate_bias_F, up_bias_F = up_bias_F.chunk(2)
    elif row.gate:
        gate_FD, gate_bias_F = matrix(row.gate)
    return FFN(gate_FD, up_FD, down_DF, gate_bias_F, up_bias_F, down_bias_D, act)


def put_layer(layer: nn.Module, row: Architecture, moe: MoELayer) -> None:
    """Put an MoE layer in the place of a decoder layer's network."""
    _set(layer, row.ffn, moe)
    for path in row.identities:
        _set(layer, path, nn.Identity())


def _set(root: nn.Module, path: str, value: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(attrgetter(parent)(root) if parent else root, name, value)


def fill_experts(moe: MoELayer, ffn: FFN) -> None:
    """Write a network's neurons, in their order, into the shared and routed experts of a layer.

    The first `shared_width` neurons become the shared part, then each expert takes `width`.

    Args:
        moe: A layer whose total width is that of the network.
        ffn: The network.
    """
    config = moe.config
    split = [config.shared_width, config.num_experts * config.width]
    order = torch.arange(ffn.width).split(split)
    for part, neurons in zip((moe.shared, moe.experts), order, strict=True):
        if part is None:
            continue
        piece = ffn.keep(neurons)
        weights = part.weights()
        num_experts, width = weights.num_experts, weights.width
        with torch.no_grad():
            up = piece.up_FD.unflatten(0, (num_experts, width))
            if piece.gate_FD is not None:
                up = torch.cat([piece.gate_FD.unflatten(0, (num_experts, width)), up], dim=1)
            weights.up.copy_(up)
            weights.down.copy_(piece.down_DF.unflatten(1, (num_experts, width)).transpose(0, 1))
            if weights.up_bias is not None and piece.up_bias_F is not None:
                bias = piece.up_bias_F.unflatten(0, (num_experts, width))
                if piece.gate_bias_F is not None:
                    gate = piece.gate_bias_F.unflatten(0, (num_experts, width))
                    bias = torch.cat([gate, bias], dim=1)
                weights.up_bias.copy_(bias)
    if moe.output_bias is not None and ffn.down_bias_D is not None:
        with torch.no_grad():
            moe.output_bias.copy_(ffn.down_bias_D)
