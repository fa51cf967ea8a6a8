"""Weights in the order in which the native code reads them, and what it computes with them.

A panel holds two registers' worth of outputs for all inputs (see panels.h). The gate and the up
row of a neuron stand side by side in one, so that its activation needs no second pass; the down
matrix is stored input by input, so the rows of a block are contiguous however small it is.

Shapes: T tokens, K slots per token, E experts, F width of one expert, D model width, I inputs,
O outputs, L floats of a register, P panels.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor

from moesaic._errors import InputError
from moesaic.ops.cpu import library, operators, structs
from moesaic.ops.cpu.run import on_cpu, run_experts, run_linear
from moesaic.ops.huge_pages import in_huge_pages
from moesaic.ops.weights import ExpertWeights

# What the weights are. They multiply float32, but `bfloat16-dot` rounds what it multiplies too, as
# torch does in bfloat16.
Format = Literal["float32", "bfloat16", "int8", "bfloat16-dot"]

# In the order of the enum in experts.h.
_FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "int8", "bfloat16-dot")
# In the order of the enum in activations.h.
_ACTIVATIONS = {
    "silu": 0,
    "swish": 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_fast": 2,
    "gelu_pytorch_tanh": 2,
    "relu": 3,
    "relu2": 4,
    "quick_gelu": 5,
}


def input_threshold(weights: ExpertWeights) -> float:
    """What inputs of experts must exceed; native code leaves none out, so it has to be zero."""
    return 0.0 if weights.thresholds is None else float(weights.thresholds.input)


def format_of(dtype: torch.dtype) -> Format:
    """The fastest format that is as exact as a model of a dtype is in torch."""
    exact = exact_format_of(dtype)
    return "bfloat16-dot" if exact == "bfloat16" and has_dot() else exact


def exact_format_of(dtype: torch.dtype) -> Format:
    """The format that rounds nothing but float64; float16 goes to float32."""
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


class PackedLinear:
    """A linear map, packed.

    Args:
        weight_OI: [O, I].
        bias_O: Or none.
        weight_format: `int8` rounds every row to 255 levels of its largest weight.
    """

    def __init__(
        self, weight_OI: Tensor, bias_O: Tensor | None, weight_format: Format = "float32"
    ) -> None:
        self.num_outputs, self.num_inputs = on_cpu(weight_OI).shape
        rows_PRI = _pad(weight_OI, 0, 2 * lanes()).unflatten(0, (-1, 2 * lanes()))
        self._panels, self._scale = _pack(rows_PRI, weight_format)
        self._bias = None if bias_O is None else _own(_pad(bias_O.float(), 0, 2 * lanes()))
        self.padded = rows_PRI.shape[0] * rows_PRI.shape[1]
        # In the order of the struct's pointers.
        self.parts = [self._panels, self._scale, self._bias]
        self.struct = structs.Linear(
            panels=self._panels.data_ptr(),
            scale=pointer(self._scale),
            bias=pointer(self._bias),
            inputs=self.num_inputs,
            outputs=self.padded,
            format=_FORMATS.index(weight_format),
        )

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Map [T, I] to [T, O] in float32."""
        return run_linear(self.struct, x_TI)[:, : self.num_outputs]


class PackedExperts:
    """Experts, packed.

    Args:
        weights: The experts; they are not kept.
        weight_format: `int8` rounds every neuron's rows, and every output of a block's down
            matrix, to 255 levels of their largest weight.

    Raises:
        InputError: If the native code does not know the experts' activation.
    """

    def __init__(self, weights: ExpertWeights, weight_format: Format = "float32") -> None:
        if weights.glu is not None or weights.activation not in _ACTIVATIONS:
            raise InputError(
                f"activation {weights.activation or 'of its own'!r} has no native code; "
                f"{', '.join(sorted(_ACTIVATIONS))} have"
            )
        if input_threshold(weights) > 0:
            raise InputError(
                f"an input threshold of {input_threshold(weights):.3g} has no native code; "
                "convert with inputs 1, or use torch"
            )
        per_register = lanes()
        num_experts, dim, _ = on_cpu(weights.down).shape
        per_panel = per_register if weights.gated else 2 * per_register
        up_PRI = _rows(weights.up, weights.gated, per_panel)
        down_EOF = _pad(_pad(weights.down, 1, 2 * per_register), 2, per_panel)
        self.num_experts, self.dim = num_experts, dim
        self._packed_from = _versions(weights)
        self._up, self._up_scale = _pack(up_PRI, weight_format)
        down_PRF = down_EOF.reshape(-1, 2 * per_register, down_EOF.shape[2])
        self._down, self._down_scale = _pack(down_PRF, weight_format)
        self._up_bias, self._down_bias = None, None
        if weights.up_bias is not None:
            self._up_bias = _own(_rows(weights.up_bias.float(), weights.gated, per_panel))
        if weights.down_bias is not None:
            self._down_bias = _own(_pad(weights.down_bias.float(), 1, 2 * per_register))
        self._neuron_limits, self._gate_limits = None, None
        if weights.thresholds is not None:
            _, neuron_EF, gate_EF = weights.thresholds
            self._neuron_limits = _own(_pad(neuron_EF.float(), 1, per_panel))
            if gate_EF is not None:
                self._gate_limits = _own(_pad(gate_EF.float(), 1, per_panel))
        # In the order of the struct's pointers.
        self.parts = [
            *(self._up, self._down),
            *(self._up_scale, self._down_scale, self._up_bias, self._down_bias),
            *(self._neuron_limits, self._gate_limits),
        ]
        self.struct = structs.Experts(
            up=self._up.data_ptr(),
            down=self._down.data_ptr(),
            up_scale=pointer(self._up_scale),
            down_scale=pointer(self._down_scale),
            up_bias=pointer(self._up_bias),
            down_bias=pointer(self._down_bias),
            neuron_limits=pointer(self._neuron_limits),
            gate_limits=pointer(self._gate_limits),
            experts=num_experts,
            width=down_EOF.shape[2],
            inputs=dim,
            outputs=down_EOF.shape[1],
            format=_FORMATS.index(weight_format),
            activation=_ACTIVATIONS[weights.activation],
            gated=weights.gated,
        )
        self._taken = operators.take_apart(self.struct, self.parts)

    def __call__(
        self,
        h_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        weights: ExpertWeights | None = None,
    ) -> Tensor:
        """Sum the weighted outputs of each token's experts; same contract as the reference.

        Inference only. Sums are in float32. What a token gets does not depend, to the last bit,
        on the tokens beside it.

        Args:
            h_TD: Inputs, [T, D].
            ids_TK: Expert of each slot; see `experts_reference`.
            weights_TK: Weight of each slot.
            weights: What was packed; a compiled graph then checks that it is unchanged.
        """
        if operators.traced(h_TD):
            sources = operators.NO_SOURCES
            if weights is not None:
                versions = [version for _, version in self._packed_from]
                sources = operators.Sources(_tensors(weights), versions)
            return operators.experts(self._taken, h_TD, ids_TK, weights_TK, sources)
        return run_experts(self.struct, h_TD, ids_TK, weights_TK)

    def is_copy_of(self, weights: ExpertWeights) -> bool:
        """Whether these are still the weights that were packed, unchanged."""
        # A graph being made has no addresses; it checks versions whenever it runs.
        return operators.traced(weights.up) or self._packed_from == _versions(weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied module has weights of its own, which are not packed."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed matrices, scales included."""
        tensors = (self._up, self._down, self._up_scale, self._down_scale)
        return sum(x.nbytes for x in tensors if x is not None)


def lanes() -> int:
    """L, floats of a register of this machine."""
    return int(library.library().moesaic_lanes())


def has_dot() -> bool:
    """Whether this machine multiplies bfloat16 with bfloat16, so that `bfloat16-dot` exists."""
    return bool(library.library().moesaic_has_dot())


def _tensors(weights: ExpertWeights) -> list[Tensor]:
    tensors = (weights.up, weights.down, weights.up_bias, weights.down_bias)
    return [x for x in (*tensors, *(weights.thresholds or ())) if x is not None]


def _versions(weights: ExpertWeights) -> list[tuple[int, int]]:
    return [(x.data_ptr(), operators.version_of(x)) for x in _tensors(weights)]


def pointer(x: Tensor | None) -> int | None:
    """Where a tensor is; none for none."""
    return None if x is None else x.data_ptr()


def _own(x: Tensor) -> Tensor:
    """Copy what may be a parameter still, whose memory its owner may give up or change."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def _pad(x: Tensor, dim: int, multiple: int) -> Tensor:
    """Append zeros along a dimension until it is a multiple."""
    missing = -x.shape[dim] % multiple
    if not missing:
        return x
    return nnf.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing])


def _rows(up: Tensor, gated: bool, per_panel: int) -> Tensor:
    """Order the rows (or biases) of an up matrix [E, (2)F, ...] by panel: [P, 2L, ...]."""
    if gated:
        # Of a panel, the gate rows of L neurons are the lower half, their up rows the upper.
        parts: Tensor = up.unflatten(1, (2, -1))
        parts = _pad(parts, 2, per_panel).unflatten(2, (-1, per_panel))
        return parts.transpose(1, 2).flatten(0, 1).flatten(1, 2)
    rows: Tensor = _pad(up, 1, per_panel).unflatten(1, (-1, per_panel))
    return rows.flatten(0, 1)


def _pack(rows_PRI: Tensor, weight_format: Format) -> tuple[Tensor, Tensor | None]:
    """Store panels input by input; gives them and, for int8, the scale of every row."""
    rows_PRI = rows_PRI.detach()
    if weight_format == "float32":
        return in_huge_pages(rows_PRI.float().transpose(1, 2)), None
    if weight_format == "bfloat16":
        # Words of 32 bits: the lower half belongs to the first L rows, the upper to the others.
        halves = rows_PRI.bfloat16().unflatten(1, (2, -1))
        return in_huge_pages(halves.permute(0, 3, 2, 1)), None
    if weight_format == "bfloat16-dot":
        if not has_dot():
            raise InputError(
                "weight_format bfloat16-dot needs a processor with AVX512-BF16, which this one "
                "lacks; use bfloat16"
            )
        # Words of 32 bits hold two neighbouring inputs.
        pairs = _pad(rows_PRI.bfloat16(), 2, 2).unflatten(2, (-1, 2))
        return in_huge_pages(pairs.permute(0, 2, 1, 3)), None
    wide_PRI = rows_PRI.float()
    scale_PR = wide_PRI.abs().amax(2).clamp(min=1e-30) / 127
    whole_PRI = (wide_PRI / scale_PR.unsqueeze(2)).round().to(torch.int8)
    return in_huge_pages(whole_PRI.transpose(1, 2)), scale_PR.contiguous()
