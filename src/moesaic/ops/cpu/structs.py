"""The structs and functions of the native code, as Python passes them.

Field by field those of experts.h, routing.h, ffn.h and decoder.h, which say what they mean.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

_POINTER, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Linear(ctypes.Structure):
    """The struct of that name in experts.h."""

    _fields_: ClassVar[list[Any]] = [
        ("panels", _POINTER),
        ("scale", _POINTER),
        ("bias", _POINTER),
        ("inputs", _INT),
        ("outputs", _INT),
        ("format", _INT),
    ]


class Experts(ctypes.Structure):
    """The struct of that name in experts.h."""

    _fields_: ClassVar[list[Any]] = [
        ("up", _POINTER),
        ("down", _POINTER),
        ("up_scale", _POINTER),
        ("down_scale", _POINTER),
        ("up_bias", _POINTER),
        ("down_bias", _POINTER),
        ("experts", _INT),
        ("width", _INT),
        ("inputs", _INT),
        ("outputs", _INT),
        ("format", _INT),
        ("activation", _INT),
        ("gated", _INT),
    ]


class Router(ctypes.Structure):
    """The struct of that name in routing.h."""

    _fields_: ClassVar[list[Any]] = [
        ("scores", Linear),
        ("choice_bias", _POINTER),
        ("factor", _POINTER),
        ("threshold", _DOUBLE),
        ("scale", _DOUBLE),
        ("num_scores", _INT),
        ("rule", _INT),
        ("gate", _INT),
        ("normalize", _INT),
        ("by_gate", _INT),
        ("lowest_first", _INT),
        ("top_k", _INT),
        ("groups", _INT),
        ("top_groups", _INT),
    ]


class Ffn(ctypes.Structure):
    """The struct of that name in ffn.h."""

    _fields_: ClassVar[list[Any]] = [
        ("output_bias", _POINTER),
        ("router", Router),
        ("experts", Experts),
        ("shared", Experts),
        ("bypass_down", Linear),
        ("bypass_up", Linear),
    ]


class Attention(ctypes.Structure):
    """The struct of that name in decoder.h."""

    _fields_: ClassVar[list[Any]] = [
        ("qkv", Linear),
        ("out", Linear),
        ("q_norm", _POINTER),
        ("k_norm", _POINTER),
        ("cos", _POINTER),
        ("sin", _POINTER),
        ("keys", _POINTER),
        ("values", _POINTER),
        ("norm_whole", _INT),
        ("rotary", _INT),
        ("heads", _INT),
        ("kv_heads", _INT),
        ("head_dim", _INT),
        ("window", _INT),
        ("scale", _DOUBLE),
        ("softcap", _DOUBLE),
    ]


class Layer(ctypes.Structure):
    """The struct of that name in decoder.h."""

    _fields_: ClassVar[list[Any]] = [
        ("attention_norm", _POINTER),
        ("attention_post", _POINTER),
        ("ffn_norm", _POINTER),
        ("ffn_post", _POINTER),
        ("eps", _DOUBLE),
        ("attention", Attention),
        ("ffn", Ffn),
    ]


class Batch(ctypes.Structure):
    """The struct of that name in decoder.h."""

    _fields_: ClassVar[list[Any]] = [
        ("slot", _POINTER),
        ("position", _POINTER),
        ("threshold", _POINTER),
        ("tokens", _INT),
        ("dim", _INT),
        ("stride", _INT),
        ("length", _INT),
    ]


def width_of(ffn: Ffn) -> int:
    """D of a layer that has experts of any kind."""
    return int((ffn.experts if ffn.experts.experts else ffn.shared).inputs)


def num_pointers(kind: type[ctypes.Structure]) -> int:
    """Pointers of a struct, those of the structs in it included."""
    return sum(
        num_pointers(field) if issubclass(field, ctypes.Structure) else int(field is _POINTER)
        for _, field in _fields(kind)
    )


def numbers_of(struct: ctypes.Structure) -> tuple[list[int], list[float]]:
    """The integers of a struct and its other numbers, in order."""
    sizes: list[int] = []
    numbers: list[float] = []
    for name, field in _fields(struct):
        value = getattr(struct, name)
        if issubclass(field, ctypes.Structure):
            more_sizes, more_numbers = numbers_of(value)
            sizes += more_sizes
            numbers += more_numbers
        elif field is not _POINTER:
            (sizes if field is _INT else numbers).append(value)
    return sizes, numbers


def rebuilt(
    kind: type[ctypes.Structure],
    pointers: Iterable[int | None],
    sizes: Iterable[int],
    numbers: Iterable[float],
) -> Any:
    """A struct of these pointers, integers and other numbers, each in order."""
    return _rebuilt(kind, iter(pointers), iter(sizes), iter(numbers))


def _fields(struct: Any) -> list[tuple[str, Any]]:
    return list(struct._fields_)


def _rebuilt(kind: type[ctypes.Structure], *values: Iterator[Any]) -> Any:
    by_kind = dict(zip((_POINTER, _INT, _DOUBLE), values, strict=True))
    return kind(
        *(
            _rebuilt(field, *values)
            if issubclass(field, ctypes.Structure)
            else next(by_kind[field])
            for _, field in _fields(kind)
        )
    )


_LAYER, _BATCH = ctypes.POINTER(Layer), ctypes.POINTER(Batch)

# Arguments of the functions of kernels.cpp.
SIGNATURES: dict[str, list[Any]] = {
    "moesaic_experts": [
        *[ctypes.POINTER(Experts), _POINTER, _INT, _POINTER, _POINTER],
        *[_INT, _INT, _POINTER, ctypes.c_int],
    ],
    "moesaic_layer": [ctypes.POINTER(Ffn), _POINTER, _INT, _INT, _POINTER, ctypes.c_int],
    "moesaic_linear": [ctypes.POINTER(Linear), _POINTER, _INT, _POINTER],
    "moesaic_layers": [_LAYER, _INT, _BATCH, *[_POINTER] * 3, _INT],
    "moesaic_attention": [_LAYER, _BATCH, *[_POINTER] * 2],
    "moesaic_ffn": [_LAYER, _BATCH, *[_POINTER] * 4, _INT],
    "moesaic_head": [
        *[ctypes.POINTER(Linear), _POINTER, _DOUBLE, _POINTER, _INT],
        *[_POINTER, _INT, _POINTER],
    ],
}
