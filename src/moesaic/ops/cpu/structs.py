"""The structs and functions of the native code, as Python passes them.

Field by field those of experts.h and decoder.h, which say what they mean.
"""

from __future__ import annotations

import ctypes
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
    """The struct of that name in experts.h."""

    _fields_: ClassVar[list[Any]] = [
        ("scores", Linear),
        ("threshold", _DOUBLE),
        ("value_one", _INT),
        ("normalize", _INT),
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
        ("output_bias", _POINTER),
        ("eps", _DOUBLE),
        ("attention", Attention),
        ("router", Router),
        ("experts", Experts),
        ("shared", Experts),
        ("bypass_down", Linear),
        ("bypass_up", Linear),
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


_LAYER, _BATCH = ctypes.POINTER(Layer), ctypes.POINTER(Batch)

# Arguments of the functions of kernels.cpp.
SIGNATURES: dict[str, list[Any]] = {
    "moesaic_experts": [ctypes.POINTER(Experts), *[_POINTER] * 3, _INT, _INT, _POINTER],
    "moesaic_layer": [
        *[ctypes.POINTER(Router), ctypes.POINTER(Experts)],
        *[_POINTER, _INT, _POINTER],
    ],
    "moesaic_linear": [ctypes.POINTER(Linear), _POINTER, _INT, _POINTER],
    "moesaic_layers": [_LAYER, _INT, _BATCH, *[_POINTER] * 3, _INT],
    "moesaic_attention": [_LAYER, _BATCH, *[_POINTER] * 2],
    "moesaic_ffn": [_LAYER, _BATCH, *[_POINTER] * 4, _INT],
    "moesaic_head": [
        *[ctypes.POINTER(Linear), _POINTER, _DOUBLE, _POINTER, _INT],
        *[_POINTER, _INT, _POINTER],
    ],
}
