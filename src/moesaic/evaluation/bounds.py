"""What no router can beat: the best neurons or blocks of every token, known from their outputs.

For evaluation alone: hooks put the bound in place of a model's own choice, and are gone when the
block ends. A bound computes everything and then leaves out what counts least, so it saves nothing;
it says how much quality is lost by leaving out that much, were the choice free of error.

Ours. The neuron scores are those that the literature predicts: the gate's magnitude (as in CATS,
arXiv 2404.08763) and the length of a neuron's contribution to the output. For blocks the criterion
is the error itself: with block outputs o_i, G_ij = <o_i, o_j> and g in {0, 1}, the squared error
of a token's layer output is (g - 1)^T G (g - 1). Its exact minimum over sets is a combinatorial
search; here blocks are switched off one by one, each time the one that raises the error least
(greedy backward selection), which is exact for one block off.

Shapes: T tokens, C tokens of a chunk, K kept, F neurons, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moesaic._errors import InputError
from moesaic.calibration.collectors import block_outputs
from moesaic.models.architectures import ARCHITECTURES, architecture_of
from moesaic.models.ffn import FFN, decoder_layers, ffn_module, read_ffn
from moesaic.nn.experts._base import Experts
from moesaic.nn.layer import moe_layers
from moesaic.nn.routing import Routing
from moesaic.ops.weights import activation

NeuronScore = Literal["gate", "contribution"]
BlockScore = Literal["gram", "norm"]

# Floats of the largest tensor of a chunk: 64 MB.
_MAX_FLOATS = 1 << 24


@contextmanager
def neuron_bound(
    model: PreTrainedModel, active: float, *, by: NeuronScore = "contribution"
) -> Iterator[float]:
    """Keep, for every token, the best neurons of each network while the block lasts.

    Args:
        model: A dense model of a known architecture; unchanged afterwards.
        active: Fraction of neurons to keep, in (0, 1]; round(active * F) of them.
        by: What makes a neuron good: `contribution` is |a_j| times the length of its down column,
            `gate` the magnitude of its activated gate, which is known before the up product.

    Yields:
        The fraction that is kept, exactly, the mean over layers.

    Raises:
        InputError: If the model is no dense one, has no gates to go by, or nothing would be kept.
    """
    _check_choice("by", by, ("contribution", "gate"))
    row = architecture_of(model.config.model_type)
    if model.config.model_type not in ARCHITECTURES:
        raise InputError(
            "the bound on neurons needs a dense model, got a converted one; give its dense parent "
            "or take block_bound"
        )
    if by == "gate" and not row.gated:
        raise InputError(
            f"{model.config.model_type} has no gates to choose neurons by; use by='contribution'"
        )
    act = getattr(model.config, row.activation)
    layers = decoder_layers(model)
    ffns = [read_ffn(layer, row, act) for layer in layers]
    kept = [_num_kept(active, ffn.width, "neurons") for ffn in ffns]
    handles = []
    try:
        for layer, ffn, num_kept in zip(layers, ffns, kept, strict=True):
            keeper = _NeuronKeeper(ffn, num_kept, by)
            network: nn.Module = ffn_module(layer, row)
            down: nn.Module = attrgetter(row.down)(layer)
            handles.append(network.register_forward_pre_hook(keeper.see_input))
            handles.append(down.register_forward_pre_hook(keeper.cut))
        yield sum(k / ffn.width for k, ffn in zip(kept, ffns, strict=True)) / len(ffns)
    finally:
        _remove(handles)


@contextmanager
def block_bound(
    model: PreTrainedModel, active: float, *, by: BlockScore = "gram"
) -> Iterator[float]:
    """Keep, for every token, the best blocks of a converted model while the block lasts.

    The routing is replaced, so that everything that reads it sees the bound: the activity that
    `evaluate_perplexity` measures is that of the bound. Kept blocks have weight one.

    Args:
        model: A converted model with routers; unchanged afterwards.
        active: Fraction of each layer's blocks to keep, in (0, 1]; round(active * E) of them.
        by: `gram` minimises the error of the layer's output by greedy backward selection, `norm`
            keeps the blocks of the longest outputs.

    Yields:
        The fraction of the blocks that is kept, exactly, the mean over layers with routers.

    Raises:
        InputError: If no layer has a router, or nothing would be kept.
    """
    _check_choice("by", by, ("gram", "norm"))
    routed = [
        (layer.router, layer.experts)
        for layer in moe_layers(model)
        if layer.router is not None and layer.experts is not None
    ]
    if not routed:
        raise InputError(
            "the bound on blocks needs a converted model with routers, got one without; convert it "
            "first or take neuron_bound"
        )
    kept = [_num_kept(active, experts.num_experts, "blocks") for _, experts in routed]
    handles = []
    try:
        for (router, experts), num_kept in zip(routed, kept, strict=True):
            handles.append(router.register_forward_hook(_best_blocks(experts, num_kept, by)))
        yield sum(
            k / experts.num_experts for k, (_, experts) in zip(kept, routed, strict=True)
        ) / len(routed)
    finally:
        _remove(handles)


class _NeuronKeeper:
    """Sets the neurons of one network that count least to zero, on their way to the down product.

    Args:
        ffn: The network.
        num_kept: K.
        by: Score of a neuron.
    """

    def __init__(self, ffn: FFN, num_kept: int, by: NeuronScore) -> None:
        self.ffn = ffn
        self.num_kept = num_kept
        self.by = by
        self.length_F: Tensor = ffn.down_DF.float().norm(dim=0)
        self.h: Tensor | None = None

    def see_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Hook in front of the network: its input gives the gates."""
        self.h = args[0] if self.by == "gate" else None

    @torch.no_grad()
    def cut(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Hook in front of the down product, whose input the neurons are."""
        a_TF = args[0].reshape(-1, self.ffn.width)
        h_TD = None if self.h is None else self.h.reshape(a_TF.shape[0], -1)
        self.h = None
        kept_TF = torch.zeros_like(a_TF)
        for part in _chunks(a_TF.shape[0], self.ffn.width):
            score_CF = self._score(a_TF[part], None if h_TD is None else h_TD[part])
            best_CK = score_CF.topk(self.num_kept, dim=1).indices
            kept_TF[part] = kept_TF[part].scatter(1, best_CK, a_TF[part].gather(1, best_CK))
        return (kept_TF.reshape(args[0].shape), *args[1:])

    def _score(self, a_CF: Tensor, h_CD: Tensor | None) -> Tensor:
        if h_CD is None:
            return a_CF.float().abs() * self.length_F
        assert self.ffn.gate_FD is not None
        gate_CF = nnf.linear(h_CD, self.ffn.gate_FD, self.ffn.gate_bias_F)
        score_CF: Tensor = activation(self.ffn.activation)(gate_CF).float().abs()
        return score_CF


def _best_blocks(experts: Experts, num_kept: int, by: BlockScore) -> Callable[..., Routing]:
    """A hook behind a router that answers with the best blocks instead of the router's."""

    @torch.no_grad()
    def choose(router: nn.Module, args: tuple[Any, ...], routing: Routing) -> Routing:
        h_TD: Tensor = args[0]
        weights = experts.weights()
        num_experts, dim = experts.num_experts, h_TD.shape[1]
        ids_TK = torch.empty(h_TD.shape[0], num_kept, dtype=torch.int64, device=h_TD.device)
        for part in _chunks(h_TD.shape[0], num_experts * max(num_experts, dim)):
            o_CED = block_outputs(h_TD[part], weights)
            if by == "norm":
                ids_TK[part] = o_CED.norm(dim=2).topk(num_kept, dim=1).indices
            else:
                gram_CEE = torch.bmm(o_CED, o_CED.transpose(1, 2))
                on_CE = select_blocks(gram_CEE, num_kept)
                ids_TK[part] = on_CE.nonzero()[:, 1].reshape(-1, num_kept)
        ones_TK = torch.ones(ids_TK.shape, dtype=h_TD.dtype, device=h_TD.device)
        return Routing(ids_TK, ones_TK, routing.scores_TE, num_experts)

    return choose


def select_blocks(gram_TEE: Tensor, num_kept: int) -> Tensor:
    """Switch blocks off one by one, each time the one that raises the error least.

    With S the blocks that are off, the error is the sum of G_ij over S x S; a block i that joins
    them adds G_ii + 2 sum over j in S of G_ij.

    Args:
        gram_TEE: Gram matrix of the block outputs of every token, [T, E, E].
        num_kept: Blocks that stay on, at most E.

    Returns:
        Whether a block stays on, [T, E] bool, `num_kept` of each row.
    """
    num_tokens, num_experts, _ = gram_TEE.shape
    on_TE = torch.ones(num_tokens, num_experts, dtype=torch.bool, device=gram_TEE.device)
    cost_TE = torch.diagonal(gram_TEE, dim1=1, dim2=2).clone()
    token_T = torch.arange(num_tokens, device=gram_TEE.device)
    for _ in range(num_experts - num_kept):
        worst_T = cost_TE.masked_fill(~on_TE, torch.inf).argmin(1)
        on_TE[token_T, worst_T] = False
        cost_TE += 2 * gram_TEE[token_T, worst_T]
    return on_TE


def _chunks(num_tokens: int, floats_per_token: int) -> Iterator[slice]:
    step = max(1, _MAX_FLOATS // floats_per_token)
    return (slice(start, start + step) for start in range(0, num_tokens, step))


def _num_kept(active: float, total: int, what: str) -> int:
    """The number that a fraction stands for, or a refusal."""
    if not 0.0 < active <= 1.0 or round(active * total) < 1:
        raise InputError(
            f"active must be in (0, 1] and keep at least 1 of {total} {what}, got {active}; the "
            f"least is {1 / total:.3g}"
        )
    return round(active * total)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
