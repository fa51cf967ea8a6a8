"""One sparse gated feed-forward network, with its router, beside the dense one and its peers.

Shapes: T tokens, K slots per token, E experts, F width of one expert, D model width, M = E * F.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor

from moesaic._errors import InputError
from moesaic._progress import SILENT, Progress
from moesaic.evaluation.bench import peers
from moesaic.evaluation.bench.cell import (
    DENSE,
    OURS,
    Method,
    Methods,
    document,
    require_memory,
    time_cell,
    use_threads,
)
from moesaic.evaluation.bench.ours import ExpertsCall, our_layer
from moesaic.evaluation.bench.roof import BUFFER_BYTES, Limits
from moesaic.models.checkpoint import dtype_of
from moesaic.nn.layer import LayerConfig, MoELayer
from moesaic.nn.routers._base import linear_scores
from moesaic.ops.reference import experts_reference
from moesaic.ops.weights import ExpertWeights

# Scores have a spread of one and are sums in float32.
_NEAR = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnConfig:
    """What is measured: every combination of the lists.

    Attributes:
        shape: DxM, width of the model by neurons of the dense network.
        active: Fractions of the experts that each token uses.
        tokens: Tokens in one call.
        experts: Numbers of experts.
        dtype: Of weights and inputs.
        threads: Of torch and of the peers; 0 leaves what torch has.
        seconds: Budget of the timing of one combination.
        working_set_mb: Copies of the weights that together are as large run in turn, so that no
            method finds its weights in a cache, as in a model of many layers; 0 for one copy.
        roof_mb: Size of what is read to measure the bandwidth of memory.
        seed: Of weights and inputs.
    """

    shape: tuple[str, ...] = ("576x1536", "2048x8192", "4096x11008")
    active: tuple[float, ...] = (0.25, 0.375, 0.5, 0.75)
    tokens: tuple[int, ...] = (1, 4, 8, 64, 512, 2048)
    experts: tuple[int, ...] = (8, 32, 128, 512)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    threads: int = 0
    seconds: float = 2.0
    working_set_mb: int = 600
    roof_mb: int = BUFFER_BYTES >> 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("shape", "active", "tokens", "experts"):
            if not getattr(self, name):
                raise InputError(f"{name} must name at least 1 value, got none; name one")
        for shape in self.shape:
            read_shape(shape)
        for fraction in self.active:
            if not 0.0 < fraction <= 1.0:
                raise InputError(f"active must be in (0, 1], got {fraction}; 0.375 is usual")
        for name in ("tokens", "experts"):
            if min(getattr(self, name)) < 1:
                raise InputError(f"{name} must be at least 1, got {min(getattr(self, name))}")
        for name in ("threads", "working_set_mb"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.seconds <= 0 or self.roof_mb < 1:
            raise InputError(
                "seconds must be above 0 and roof_mb at least 1, got "
                f"{self.seconds} and {self.roof_mb}"
            )

    def to_plain(self) -> dict[str, Any]:
        """The `config` section of the document."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnCell:
    """One combination: D, M, E, K and T."""

    dim: int
    neurons: int
    num_experts: int
    num_active: int
    num_tokens: int

    @property
    def weight_numbers(self) -> int:
        """Numbers in the weights of all experts."""
        return 3 * self.dim * self.neurons


def read_shape(text: str) -> tuple[int, int]:
    """Read DxM."""
    dim, _, neurons = text.partition("x")
    if not (dim.isdigit() and neurons.isdigit() and int(dim) and int(neurons)):
        raise InputError(f"shape must be DxM such as 2048x8192, got {text!r}")
    return int(dim), int(neurons)


def ffn_cells(config: FfnConfig) -> list[FfnCell]:
    """List the combinations in which the experts divide the neurons and the active are whole.

    Raises:
        InputError: If there is none.
    """
    cells = []
    for shape, experts, active, tokens in itertools.product(
        config.shape, config.experts, config.active, config.tokens
    ):
        dim, neurons = read_shape(shape)
        num_active = active * experts
        if neurons % experts == 0 and num_active >= 1 and num_active.is_integer():
            cells.append(
                FfnCell(
                    dim=dim,
                    neurons=neurons,
                    num_experts=experts,
                    num_active=int(num_active),
                    num_tokens=tokens,
                )
            )
    if not cells:
        raise InputError(
            "no combination has experts that divide the neurons and a whole number active; "
            f"got shape {config.shape}, experts {config.experts}, active {config.active}"
        )
    return cells


def ffn_cost(config: FfnConfig) -> dict[str, float]:
    """Estimate what a run takes: cells, seconds and bytes of memory."""
    cells = ffn_cells(config)
    # Making and packing the copies takes about as long as timing them.
    return {
        "cells": len(cells),
        "seconds": 2.0 * config.seconds * (len(cells) + 2),
        "memory_bytes": max(_memory(cell, config) for cell in cells),
    }


Build = Callable[[FfnCell, FfnConfig], tuple[Methods, "Use"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What the inputs of a cell ask for: experts used at all, and pairs of token and expert."""

    touched: int
    pairs: int


def bench_ffn(config: FfnConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Measure every combination of a sparse network whose tokens each use exactly K experts.

    Args:
        config: What is measured.
        progress: Told of every cell.

    Returns:
        The document: machine, commit, roof, and a row per method in every cell.

    Raises:
        InputError: If the combinations are empty or do not fit into memory.
        RunError: If ours or a peer is wrong; nothing is reported then.
    """
    return run_cells("ffn", config, _methods, progress)


def run_cells(
    kind: str, config: FfnConfig, build: Build, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure the roof, then every cell with the methods that `build` makes."""
    cells = ffn_cells(config)
    cost = ffn_cost(config)
    require_memory(cost["memory_bytes"], "the largest combination")
    use_threads(config.threads)
    with (progress or SILENT).stage(f"bench {kind}", len(cells) + 1, "cells") as stage:
        limits = Limits((config.dtype,), seconds=config.seconds, buffer_bytes=config.roof_mb << 20)
        stage.advance()
        results = []
        for cell in cells:
            results.append(_run_cell(cell, config, limits, build))
            stage.advance()
    return document(kind, config, results, dtype=config.dtype, roof=limits.roof)


def sparse_work(cell: FfnCell, use: Use, dtype: str) -> tuple[float, float]:
    """Bytes that must be read and FLOPs that must be done."""
    expert = cell.weight_numbers / cell.num_experts
    return use.touched * expert * dtype_of(dtype).itemsize, 2 * use.pairs * expert


def _run_cell(cell: FfnCell, config: FfnConfig, limits: Limits, build: Build) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    with torch.inference_mode():
        methods, use = build(cell, config)
        num_bytes, flops = sparse_work(cell, use, config.dtype)
        probes = limits.probes(num_bytes, flops, config.dtype)
        roof_s, rows = time_cell(methods, config.dtype, seconds=config.seconds, probes=probes)
    return {
        "shape": f"{cell.dim}x{cell.neurons}",
        "experts": cell.num_experts,
        "active": cell.num_active / cell.num_experts,
        "tokens": cell.num_tokens,
        "dtype": config.dtype,
        "copies": num_copies(cell, config),
        "touched_experts": use.touched,
        "pairs": use.pairs,
        "bytes": num_bytes,
        "flops": flops,
        "roof_ms": 1e3 * roof_s,
        "rows": rows,
    }


def num_copies(cell: FfnCell, config: FfnConfig) -> int:
    """Copies of the weights that together fill the working set."""
    one = cell.weight_numbers * dtype_of(config.dtype).itemsize
    return max(1, math.ceil((config.working_set_mb << 20) / one))


def _memory(cell: FfnCell, config: FfnConfig) -> float:
    """Bytes at most: dense, split, packed and kt-kernel's copies, the reference, the roof."""
    one = cell.weight_numbers * dtype_of(config.dtype).itemsize
    activations = 4 * cell.num_tokens * (cell.num_active * cell.dim + 4 * cell.neurons)
    copies = 4 * num_copies(cell, config) * one
    roof = config.roof_mb << 20
    return max(copies + 8 * cell.weight_numbers + 2 * activations + roof, 2 * roof)


def _methods(cell: FfnCell, config: FfnConfig) -> tuple[Methods, Use]:
    """Build every method on its copies of the weights."""
    dtype = dtype_of(config.dtype)
    width = cell.neurons // cell.num_experts
    up = torch.randn(cell.num_experts, 2 * width, cell.dim).div_(cell.dim**0.5)
    down = torch.randn(cell.num_experts, cell.dim, width).div_(cell.neurons**0.5)
    weights = ExpertWeights(up.to(dtype), down.to(dtype), "silu", True)
    # Random rows, random inputs: the choices of two tokens are independent.
    router_ED = torch.randn(cell.num_experts, cell.dim).div_(cell.dim**0.5).to(dtype)
    h_TD = _tokens(cell, router_ED)
    ids_TK, weights_TK = route(h_TD, router_ED, cell.num_active)
    use = Use(touched=int(ids_TK.unique().numel()), pairs=ids_TK.numel())
    wide = weights._replace(up=weights.up.float(), down=weights.down.float())
    sparse = experts_reference(h_TD.float(), ids_TK, weights_TK, wide)
    all_TE = torch.arange(cell.num_experts).expand(cell.num_tokens, -1)
    dense = experts_reference(h_TD.float(), all_TE, torch.ones(all_TE.shape), wide)
    copies = [
        weights._replace(up=weights.up.clone(), down=weights.down.clone())
        for _ in range(num_copies(cell, config))
    ]
    found = Methods()

    def add(name: str, prepare: Callable[[ExpertWeights], ExpertsCall]) -> None:
        calls = [_routed(prepare(copy), h_TD, router_ED, cell.num_active) for copy in copies]
        found.running[name] = Method(calls, sparse)

    found.running[DENSE] = Method([dense_call(copy, h_TD) for copy in copies], dense)
    layers = [our_layer(_layer(copy, router_ED, cell.num_active)) for copy in copies]
    found.running[OURS] = Method([partial(layer, h_TD) for layer in layers], sparse)
    for name in peers.TRANSFORMERS:
        if why := peers.why_not_transformers(name, cell.num_tokens * cell.num_active, weights):
            found.skipped[f"transformers {name}"] = why
        else:
            add(f"transformers {name}", _transformers(name, cell.num_active))
    why = "bfloat16 alone is compared" if config.dtype != "bfloat16" else peers.why_not_kt()
    if why:
        found.skipped[peers.KT_KERNEL] = why
    else:
        add(peers.KT_KERNEL, lambda copy: peers.kt_experts(copy, cell.num_active, cell.num_tokens))
    return found, use


def _tokens(cell: FfnCell, router_ED: Tensor) -> Tensor:
    """Draw tokens whose K-th score and the one below are further apart than rounding moves them."""
    h_TD = torch.randn(cell.num_tokens, cell.dim).to(router_ED.dtype)
    if cell.num_active == cell.num_experts:
        return h_TD
    while True:
        sorted_TE = linear_scores(h_TD, router_ED).sort(dim=1, descending=True).values
        near_T = sorted_TE[:, cell.num_active - 1] - sorted_TE[:, cell.num_active] < _NEAR
        if not near_T.any():
            return h_TD
        h_TD[near_T] = torch.randn(int(near_T.sum()), cell.dim).to(h_TD.dtype)


def _layer(weights: ExpertWeights, router_ED: Tensor, num_active: int) -> MoELayer:
    """The layer of these weights that routes as `route` does."""
    config = LayerConfig(
        num_experts=weights.num_experts,
        width=weights.width,
        router="sigmoid-top-k",
        router_options={"top_k": num_active},
    )
    with torch.device("meta"):
        layer = MoELayer(weights.up.shape[2], config)
    tensors = {
        "router.weight": router_ED,
        "router.choice_bias": torch.zeros(weights.num_experts),
        "experts.gate_up_proj": weights.up,
        "experts.down_proj": weights.down,
    }
    layer.load_state_dict(tensors, assign=True)
    return layer


def route(h_TD: Tensor, router_ED: Tensor, num_active: int) -> tuple[Tensor, Tensor]:
    """Choose exactly K experts per token, in as few calls of torch as it takes: for the peers."""
    scores_TK, ids_TK = linear_scores(h_TD, router_ED).topk(num_active, dim=1)
    return ids_TK, scores_TK.sigmoid()


def _transformers(name: str, num_active: int) -> Callable[[ExpertWeights], ExpertsCall]:
    return lambda copy: peers.transformers_experts(name, copy, num_active)


def _routed(
    experts: ExpertsCall, h_TD: Tensor, router_ED: Tensor, num_active: int
) -> Callable[[], Tensor]:
    return lambda: experts(h_TD, *route(h_TD, router_ED, num_active))


def dense_call(weights: ExpertWeights, h_TD: Tensor) -> Callable[[], Tensor]:
    """Make the dense network of the same neurons: three products."""
    gate_MD, up_MD = (part.flatten(0, 1) for part in weights.up.chunk(2, dim=1))
    down_DM = weights.down.permute(1, 0, 2).flatten(1).contiguous()

    def call() -> Tensor:
        a_TM = nnf.silu(nnf.linear(h_TD, gate_MD)) * nnf.linear(h_TD, up_MD)
        return nnf.linear(a_TM, down_DM)

    return call
