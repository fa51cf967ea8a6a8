"""The native code as operators of torch, which its compiler and its export keep whole.

`moesaic::experts` and `moesaic::layer` take a packed struct apart: its tensors in the order of its
pointers, then its integers and its other numbers. In plain eager mode the packed objects call
native code themselves, since torch's dispatch to Python costs more than routing a token.

Inference only: a gradient is refused. A graph is of this machine, whose registers decide how
weights are packed; another kind refuses it.

Shapes: T tokens, K slots per token, D model width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from moesaic._errors import InputError, RunError
from moesaic.ops.cpu import library, structs
from moesaic.ops.cpu.run import run_experts, run_layer

_PACKED = "Tensor?[] parts, int[] sizes, float[] numbers, int lanes"
_CHECKED = "Tensor[] sources, int[] versions"
_PLAIN = (Tensor, torch.nn.Parameter)
_LIBRARY = torch.library.Library("moesaic", "DEF")


class Sources(NamedTuple):
    """Weights behind a packed copy, and what their versions were when they were packed."""

    tensors: Sequence[Tensor]
    versions: Sequence[int]


NO_SOURCES = Sources((), ())


def version_of(x: Tensor) -> int:
    """Changes with every change in place; tensors of inference mode do not count theirs."""
    return 0 if x.is_inference() else x._version


def traced(h: Tensor) -> bool:
    """Whether a graph is being made, or the tensor only stands for one."""
    # Both are cheap where no graph is made: see `run_layer`.
    return type(h) not in _PLAIN or is_dynamo_compiling()


class TakenApart(NamedTuple):
    """A packed struct as an operator is given it.

    Attributes:
        parts: Tensors, in the order of the struct's pointers.
        sizes: Its integers, in order.
        numbers: Its other numbers, in order.
        lanes: Floats of a register of the machine that packed it.
    """

    parts: list[Tensor | None]
    sizes: list[int]
    numbers: list[float]
    lanes: int


def take_apart(struct: Any, parts: Sequence[Tensor | None]) -> TakenApart:
    """Take a struct apart."""
    lanes = int(library.library().moesaic_lanes())
    return TakenApart(list(parts), *structs.numbers_of(struct), lanes)


def experts(
    taken: TakenApart, h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, sources: Sources
) -> Tensor:
    """Call `moesaic::experts`; see `run_experts`."""
    out: Tensor = torch.ops.moesaic.experts(h_TD, ids_TK, weights_TK, *taken, *_kept(sources))
    return out


def layer(taken: TakenApart, h: Tensor, sources: Sources) -> Tensor:
    """Call `moesaic::layer`; see `run_layer`."""
    out: Tensor = torch.ops.moesaic.layer(h, *taken, *_kept(sources))
    return out


def _kept(sources: Sources) -> tuple[list[Tensor], list[int]]:
    # What is exported holds its own weights, of which nothing else is a source.
    if torch.compiler.is_exporting():
        return [], []
    return list(sources.tensors), list(sources.versions)


def _together(kind: Any, parts: Any, sizes: Any, numbers: Any, lanes: int) -> Any:
    here = int(library.library().moesaic_lanes())
    if lanes != here:
        raise RunError(
            f"this graph has weights packed for registers of {lanes} floats and this machine's "
            f"have {here}; export it here"
        )
    return structs.rebuilt(
        kind, [None if x is None else x.data_ptr() for x in parts], sizes, numbers
    )


def _check_sources(sources: Sequence[Tensor], versions: Sequence[int]) -> None:
    if [version_of(x) for x in sources] != list(versions):
        raise RunError(
            "the weights changed since they were packed, and this compiled graph has the copy; run "
            "moesaic.inference.pack_experts and compile again"
        )


def _experts_cpu(h: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    *packed, sources, versions = rest
    _check_sources(sources, versions)
    return run_experts(_together(structs.Experts, *packed), h, ids, weights)


def _layer_cpu(h: Tensor, *rest: Any) -> Tensor:
    *packed, sources, versions = rest
    _check_sources(sources, versions)
    struct = _together(structs.Ffn, *packed)
    function = library.library().moesaic_layer
    return run_layer(function, ctypes.byref(struct), structs.width_of(struct), h)


def _like_rows(h: Tensor, *rest: Any) -> Tensor:
    return h.new_empty(h.shape)


def _no_gradient(ctx: Any, *gradients: Any) -> Any:
    raise InputError(
        "packed weights give no gradient; call under torch.no_grad(), or train without packing"
    )


for _name, _inputs, _function in (
    ("experts", "Tensor h, Tensor ids, Tensor weights", _experts_cpu),
    ("layer", "Tensor h", _layer_cpu),
):
    _LIBRARY.define(f"{_name}({_inputs}, {_PACKED}, {_CHECKED}) -> Tensor")
    _LIBRARY.impl(_name, _function, "CPU")
    torch.library.register_fake(f"moesaic::{_name}", _like_rows, lib=_LIBRARY)
    torch.library.register_autograd(f"moesaic::{_name}", _no_gradient, lib=_LIBRARY)
