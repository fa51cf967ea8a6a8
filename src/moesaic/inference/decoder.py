"""A model's decoder layers, packed for the native code, with a cache of keys and values.

transformers spends most of a small model's step between its products: hundreds of small tensor
operations per token. Here a step is one native call for all layers. What is read from the model
is what its modules hold; whether that is all they do is not assumed but tried: a new decoder must
give the model's own logits on a few tokens before it is used.

Shapes: T rows (tokens of any mix of sequences), D model width, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic._errors import InputError
from moesaic.inference._attention import pack_attention, rotary_tables
from moesaic.inference._layout import layout_of, norm_weight
from moesaic.models.architectures import architecture_of
from moesaic.models.ffn import decoder_layers, read_ffn
from moesaic.nn.layer import MoELayer, all_experts_on, moe_layers
from moesaic.nn.packed_layer import pack_ffn, why_not_packed
from moesaic.nn.routers._table import ROUTERS
from moesaic.ops.cpu import library, structs
from moesaic.ops.cpu.packed import (
    Format,
    PackedExperts,
    PackedLinear,
    format_of,
    lanes,
)
from moesaic.ops.select import spread

# Rows of one native call: bounds its scratch.
MAX_ROWS = 512
_PROBE = 8


class Decoder:
    """A packed model and the cache of its sequences.

    Args:
        model: A dense model, or one of ours, of a supported architecture, on the CPU.
        weight_format: How weights are stored; that of the model's dtype if none.
        length: Positions that the cache holds for a sequence.
        slots: Sequences that the cache holds.
        release: Give up the model's own weights as they are packed, so that memory never holds
            both; the model is of no use afterwards.

    Raises:
        InputError: If the architecture or its kind of experts has no native decoder, or this one
            does not give the model's logits.
        RunError: If the native code cannot run here.
    """

    # Sums run in one order, whatever rows stand beside each other.
    any_rows = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        weight_format: Format | None = None,
        length: int = 2048,
        slots: int = 1,
        release: bool = False,
    ) -> None:
        if length < 1 or slots < 1:
            raise InputError(f"length and slots must be at least 1, got {length} and {slots}")
        layout = layout_of(model)
        _check_layers(model)
        library.library()
        model.eval()
        self.config: Any = model.config
        self.slots = slots
        # Whole panels of positions.
        self.length = length + -length % (2 * lanes())
        dtype = next(model.parameters()).dtype
        self.weight_format: Format = weight_format or format_of(dtype)
        probe_T = torch.arange(_PROBE) * 7 % self.config.vocab_size
        with torch.no_grad(), all_experts_on(model):
            expected_TV = model(input_ids=probe_T.unsqueeze(0)).logits[0].float()
        # What the structs point to must live as long as they do.
        self._kept: list[Any] = []
        self._embed = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        self._head = PackedLinear(head.weight, head.bias, self.weight_format)
        base: Any = model.model
        self._norm = norm_weight(base.norm, layout)
        layers = decoder_layers(model)
        tables = rotary_tables(model, self.length)
        self.num_layers = len(layers)
        self._layers = (structs.Layer * len(layers))()
        # Routers that have no native form, by layer.
        self._routers: dict[int, nn.Module] = {}
        for i, layer in enumerate(layers):
            self._pack(i, layer, layout, tables)
            if release:
                _release(layer, keep=self._routers.get(i))
        self.num_experts = max(layer.ffn.experts.experts for layer in self._layers)
        self.dim: int = self.config.hidden_size
        # Rows of a power of two share few places of a cache; one register more spreads them.
        padded = self._layers[0].attention.out.outputs
        self._stride = padded + lanes()
        self._prove(probe_T, expected_TV)
        if release and head.weight is not self._embed.weight:
            _release(head)

    def _pack(self, i: int, layer: Any, layout: Any, tables: Any) -> None:
        c = self._layers[i]

        def norm(name: str) -> int | None:
            if not name:
                return None
            weight = norm_weight(getattr(layer, name), layout)
            self._kept.append(weight)
            return weight.data_ptr()

        c.attention_norm = norm(layout.attention_norm)
        c.attention_post = norm(layout.attention_post)
        c.ffn_norm = norm(layout.ffn_norm)
        c.ffn_post = norm(layout.ffn_post)
        c.eps = self.config.rms_norm_eps
        attention, kept = pack_attention(
            layer.self_attn,
            layout,
            tables(i),
            weight_format=self.weight_format,
            length=self.length,
            slots=self.slots,
        )
        c.attention = attention
        self._kept.append(kept)
        ffn = layer.mlp
        if not isinstance(ffn, MoELayer):
            row = architecture_of(self.config.model_type)
            dense = read_ffn(layer, row, getattr(self.config, row.activation))
            packed_dense = PackedExperts(dense.as_expert(), self.weight_format)
            self._kept.append(packed_dense)
            c.ffn.experts = packed_dense.struct
            return
        packed = pack_ffn(ffn, self.weight_format)
        self._kept.append(packed)
        c.ffn = packed.struct
        if ffn.router is not None and packed.choice is None:
            self._routers[i] = ffn.router

    @torch.no_grad()
    def step(
        self,
        ids_T: Tensor,
        slot_T: Tensor,
        position_T: Tensor,
        rows: Iterable[int],
        *,
        threshold_T: Tensor | None = None,
        used_LTE: Tensor | None = None,
        all_on: bool = False,
    ) -> Tensor:
        """Read tokens, each into its sequence, and give logits after some of them.

        Args:
            ids_T: Token ids, [T] int64, at most 512.
            slot_T: Sequence of each token, [T] int64. Tokens of one sequence stand together, in
                order of their positions.
            position_T: Position of each token, [T] int64; all before it were read before or are
                in this call.
            rows: The tokens after which logits are wanted.
            threshold_T: If given, [T] float64: the threshold of the sigmoid gates for each
                token, or NaN for that of the routers.
            used_LTE: If given, [L, T, E] uint8, filled with 1 for each expert that a token used
                and 0 for the others; E is `num_experts`.
            all_on: Every expert for every token, routers unasked: the dense parent.

        Returns:
            Logits [rows, V] in float32.
        """
        num_tokens = ids_T.shape[0]
        self._check(num_tokens, slot_T, position_T)
        if used_LTE is not None:
            shape = (self.num_layers, num_tokens, self.num_experts)
            _check_kind("used_LTE", used_LTE, shape, torch.uint8)
            used_LTE.zero_()
        if threshold_T is not None:
            _check_kind("threshold_T", threshold_T, (num_tokens,), torch.float64)
        slot_T = slot_T.to(torch.int64).contiguous()
        position_T = position_T.to(torch.int64).contiguous()
        h_TS = torch.zeros(num_tokens, self._stride)
        h_TS[:, : self.dim] = self._embed(ids_T)
        x_TS = torch.zeros_like(h_TS)
        batch = structs.Batch(
            slot=slot_T.data_ptr(),
            position=position_T.data_ptr(),
            threshold=None if threshold_T is None else threshold_T.data_ptr(),
            tokens=num_tokens,
            dim=self.dim,
            stride=self._stride,
            length=self.length,
        )
        by_ref = ctypes.byref(batch)
        h, x = h_TS.data_ptr(), x_TS.data_ptr()
        if not self._routers and not all_on:
            self._native(0, self.num_layers, by_ref, h, x, used_LTE)
        else:
            for i in range(self.num_layers):
                if not all_on and i not in self._routers:
                    self._native(i, 1, by_ref, h, x, used_LTE)
                    continue
                layer = ctypes.byref(self._dense(i) if all_on else self._layers[i])
                library.call("moesaic_attention", layer, by_ref, h, x)
                ids_TK, weights_TK = self._route(i, x_TS[:, : self.dim], all_on)
                if used_LTE is not None:
                    num_experts = self._layers[i].ffn.experts.experts
                    held_TK = (ids_TK < num_experts) & (weights_TK != 0)
                    used_LTE[i, :, :num_experts] = spread(ids_TK, held_TK, num_experts)
                pointers = ids_TK.data_ptr(), weights_TK.data_ptr()
                library.call("moesaic_ffn", layer, by_ref, h, x, *pointers, ids_TK.shape[1])
        rows_R = torch.tensor(list(rows), dtype=torch.int64)
        if len(rows_R) and not 0 <= int(rows_R.min()) <= int(rows_R.max()) < num_tokens:
            raise InputError(f"rows must be in [0, {num_tokens}), got {rows_R.tolist()}")
        out_RV = torch.empty(len(rows_R), self._head.padded)
        library.call(
            "moesaic_head",
            ctypes.byref(self._head.struct),
            self._norm.data_ptr(),
            self.config.rms_norm_eps,
            h,
            self._stride,
            rows_R.data_ptr(),
            len(rows_R),
            out_RV.data_ptr(),
        )
        logits_RV = out_RV[:, : self._head.num_outputs]
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits_RV if not cap else torch.tanh(logits_RV / cap) * cap

    def _native(
        self, first: int, count: int, batch: Any, h: int, x: int, used_LTE: Tensor | None
    ) -> None:
        """Run layers whose routers are native, in one call."""
        layers = ctypes.byref(self._layers[first])
        used = None if used_LTE is None else used_LTE[first].data_ptr()
        library.call("moesaic_layers", layers, count, batch, h, x, used, self.num_experts)

    def _dense(self, i: int) -> structs.Layer:
        """A layer without what stands in for experts that are off."""
        layer = structs.Layer.from_buffer_copy(self._layers[i])
        layer.ffn.bypass_down = structs.Linear()
        return layer

    def _route(self, i: int, x_TD: Tensor, all_on: bool) -> tuple[Tensor, Tensor]:
        num_experts = self._layers[i].ffn.experts.experts
        if all_on:
            on_TK = torch.ones(x_TD.shape[0], num_experts)
            return torch.arange(num_experts).expand(on_TK.shape).contiguous(), on_TK
        routing = self._routers[i](x_TD)
        return routing.ids_TK.contiguous(), routing.weights_TK.float().contiguous()

    def _check(self, num_tokens: int, slot_T: Tensor, position_T: Tensor) -> None:
        """Native code checks nothing: what would read outside of the cache is refused here."""
        if not 1 <= num_tokens <= MAX_ROWS:
            raise InputError(f"a step reads 1 to {MAX_ROWS} tokens, got {num_tokens}; split them")
        if not slot_T.shape == position_T.shape == (num_tokens,):
            raise InputError(
                f"slots and positions must be one per token, got {tuple(slot_T.shape)} and "
                f"{tuple(position_T.shape)} for {num_tokens} tokens"
            )
        if slot_T.min() < 0 or slot_T.max() >= self.slots:
            raise InputError(f"slots must be in [0, {self.slots}), got {slot_T.tolist()}")
        if position_T.min() < 0 or position_T.max() >= self.length:
            raise InputError(
                f"positions must be in [0, {self.length}), got {int(position_T.max())}; make the "
                "decoder with a larger length"
            )

    def _prove(self, probe_T: Tensor, expected_TV: Tensor) -> None:
        """Refuse to decode unless the logits are the model's, every expert on."""
        position_T = torch.arange(len(probe_T))
        logits_TV = self.step(
            probe_T, torch.zeros_like(probe_T), position_T, range(len(probe_T)), all_on=True
        )
        error = ((logits_TV - expected_TV).norm() / expected_TV.norm()).item()
        bound = 1e-3 if self.weight_format == "float32" else 0.1
        if not error <= bound:
            raise InputError(
                f"the native decoder differs from {type(self.config).__name__}'s own logits by "
                f"{error:.2g}, more than {bound}; generate with transformers instead"
            )


def _check_kind(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse what native code cannot read or write in place."""
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise InputError(
            f"{name} must be {dtype} of shape {shape} and contiguous, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )


def _check_layers(model: nn.Module) -> None:
    """Refuse what native code does not do.

    It reads the weights of experts and computes no more than they say, and it asks a router about
    one layer alone.
    """
    for i, layer in enumerate(moe_layers(model)):
        reason = why_not_packed(layer)
        if reason:
            raise InputError(f"layer {i} {reason}; generate with transformers")
        router = layer.router
        # The tokens of several sequences are one batch there, without their ids.
        if router is not None and (
            router.needs_previous
            or router.needs_tokens
            or router.reads_sequences
            or "sees-batch" in ROUTERS[layer.config.router].abilities
        ):
            raise InputError(
                f"layer {i} has the router {layer.config.router!r}, which needs more than its "
                "tokens and has no native code; generate with transformers"
            )


def _release(module: nn.Module, keep: nn.Module | None = None) -> None:
    kept = set() if keep is None else set(keep.parameters())
    for parameter in module.parameters():
        if parameter not in kept:
            parameter.data = torch.empty(0)
