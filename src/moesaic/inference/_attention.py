"""The attention of a decoder layer, packed for the native code.

Shapes: H heads, G key-value heads, C floats of a head, D model width, N positions, R of the C
floats rotated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.inference._layout import Layout, norm_weight
from moesaic.ops.cpu import structs
from moesaic.ops.cpu.packed import Format, PackedLinear, lanes

Tables = tuple[Tensor, Tensor] | None


def pack_attention(
    attention: Any,
    layout: Layout,
    tables: Tables,
    *,
    weight_format: Format,
    length: int,
    slots: int,
) -> tuple[structs.Attention, Any]:
    """Pack an attention module and make its cache; gives the struct and what it points to."""
    config = attention.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim: int = attention.head_dim
    if hasattr(attention, "qkv_proj"):
        qkv_OD, bias_O = attention.qkv_proj.weight, attention.qkv_proj.bias
    else:
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        qkv_OD = torch.cat([part.weight.detach() for part in parts])
        bias_O = None if parts[0].bias is None else torch.cat([p.bias.detach() for p in parts])
    qkv = PackedLinear(qkv_OD, bias_O, weight_format)
    out = PackedLinear(attention.o_proj.weight, attention.o_proj.bias, weight_format)
    norms: list[Tensor] = []
    if getattr(attention, "q_norm", None) is not None:
        norms = [norm_weight(norm, layout) for norm in (attention.q_norm, attention.k_norm)]
    # Zeros of fresh pages cost no memory until they are written.
    keys = torch.zeros(slots, kv_heads, length * dim)
    values = torch.zeros(slots, kv_heads, (dim + -dim % (2 * lanes())) * length)
    struct = structs.Attention(
        qkv=qkv.struct,
        out=out.struct,
        q_norm=norms[0].data_ptr() if norms else None,
        k_norm=norms[1].data_ptr() if norms else None,
        cos=tables[0].data_ptr() if tables else None,
        sin=tables[1].data_ptr() if tables else None,
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        norm_whole=bool(norms) and norms[0].numel() != dim,
        rotary=tables[0].shape[1] if tables else 0,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        window=_window(attention) or 0,
        scale=attention.scaling,
        softcap=getattr(attention, "attn_logit_softcapping", None) or 0.0,
    )
    return struct, (qkv, out, norms, keys, values, tables)


def _window(attention: Any) -> int | None:
    """Positions that a layer sees, itself included."""
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
        return window
    # Mistral and Phi-3 keep it in the config alone, for all layers.
    return getattr(attention.config, "sliding_window", None)


def rotary_tables(model: PreTrainedModel, length: int) -> Callable[[int], Tables]:
    """Cosines and sines of every position, [N, R] each, by layer; none where nothing rotates."""
    base: Any = model.model
    config: Any = model.config
    positions = torch.arange(length).unsqueeze(0)
    # Only its dtype and device are looked at.
    x = torch.zeros(1, 1, 1)
    kinds = getattr(config, "layer_types", None)
    known: dict[str | None, Tables] = {}

    def table(layer_type: str | None) -> Tables:
        if layer_type not in known:
            arguments = () if layer_type is None else (layer_type,)
            cos, sin = base.rotary_emb(x, positions, *arguments)
            known[layer_type] = cos[0].float().contiguous(), sin[0].float().contiguous()
        return known[layer_type]

    by_type = hasattr(base.rotary_emb, "rope_type") and isinstance(base.rotary_emb.rope_type, dict)

    def tables(i: int) -> Tables:
        rotates = getattr(base.layers[i].self_attn, "use_rope", True)
        return table(kinds[i] if by_type and kinds else None) if rotates else None

    return tables
