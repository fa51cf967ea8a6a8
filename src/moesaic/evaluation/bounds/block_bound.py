"""The best blocks of every token, known from the outputs of all of them.

Ours. The criterion is the error itself: with block outputs o_i, G_ij = <o_i, o_j> and g in {0, 1},
the squared error of a token's layer output is (g - 1)^T G (g - 1). Its exact minimum over sets is a
combinatorial search; here blocks are switched off one by one, each time the one that raises the
error least (greedy backward selection), which is exact for one block off.

Shapes: T tokens, C tokens of a chunk, K kept, D model width, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moesaic._config import method_config
from moesaic._errors import InputError
from moesaic._hooks import hooked
from moesaic._progress import SILENT, Progress
from moesaic.calibration.collectors import block_outputs
from moesaic.calibration.stats import CalibrationStats
from moesaic.conversion._active import whole_experts
from moesaic.conversion._table import CONVERSIONS
from moesaic.conversion.partition._base import validate_num_experts
from moesaic.evaluation.bounds import _common
from moesaic.evaluation.bounds._common import check_choice, check_fraction, count_kept
from moesaic.models.ffn import dense_ffn_width
from moesaic.nn.experts._base import Experts
from moesaic.nn.layer import moe_layers
from moesaic.nn.routing import Routing
from moesaic.nn.shape import layer_shapes

BlockScore = Literal["gram", "norm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockBound:
    """Settings of the bound on blocks.

    Attributes:
        active: Fraction of the dense network's weights that a token uses, in (0, 1]; a whole number
            of blocks, those that are always on included.
        by: `gram` minimises the error of the layer's output by greedy backward selection, `norm`
            keeps the blocks of the longest outputs.
        convert: The conversion whose blocks these are, one that only cuts; a name of `moesaic ls
            conversions`.
        options: Its settings. Its routers are not used, so what starts them can be left out:
            `init: open` for DSMoE.
    """

    active: float = 0.5
    by: BlockScore = "gram"
    convert: str = "dsmoe"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fraction(self.active)
        for name in ("active", "method"):
            if name in self.options:
                raise InputError(
                    f"options.{name} of the bound on blocks stands beside options; leave it out"
                )
        if "cut" not in CONVERSIONS[self.convert].abilities:
            cuts = [name for name, info in CONVERSIONS.items() if "cut" in info.abilities]
            raise InputError(
                "the bound on blocks needs a conversion whose blocks add up to the dense network "
                f"({', '.join(cuts)}), got {self.convert!r}; choose one of them"
            )
        experts = getattr(self.conversion(), "experts", None)
        if experts is not None:
            whole_experts(self.active, experts)

    def conversion(self) -> Any:
        """Settings of the conversion, checked; blocks stay as they are cut, to add up."""
        options = {**self.options, "active": self.active}
        where = f"convert {self.convert}"
        settings = method_config(CONVERSIONS, self.convert, options, where=where)
        moves = hasattr(settings, "refit")
        return dataclasses.replace(settings, refit=False, kept=1.0) if moves else settings

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that the conversion needs."""
        needed: tuple[str, ...] = self.conversion().collectors()
        return needed

    def check_model(self, config: Any) -> None:
        """Refuse a model by its config alone, so before any text is read.

        Raises:
            InputError: If its networks cannot be cut into so many blocks.
        """
        experts = getattr(self.conversion(), "experts", None)
        if experts is not None:
            validate_num_experts(dense_ffn_width(config), experts)


def bound_blocks(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: BlockBound,
    *,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Convert a dense model, and make it keep the best blocks of every token.

    Each layer keeps the number of blocks that is nearest to the fraction, together with what of it
    is always on, and at least one.

    Args:
        model: A dense model of a known architecture; it is consumed.
        stats: Calibration with `config.collectors()`; none if that is empty.
        config: Settings.
        store: Directory for finished layers; an interrupted conversion goes on after them.
        progress: Told of every layer.

    Returns:
        The converted model, whose hooks stay, and what was kept: the fraction `active` of the dense
        network's weights and, of each layer, how many blocks.

    Raises:
        InputError: Before any work, if the settings do not fit the model or the statistics.
    """
    model, _ = CONVERSIONS.load(config.convert)(
        model, stats, config.conversion(), store=store, progress=progress
    )
    shapes = layer_shapes(model, dense_ffn_width(model.config))
    kept = [
        shape.num_experts and max(1, round(shape.experts_on(config.active) * shape.num_experts))
        for shape in shapes
    ]
    _keep(model, [count for count in kept if count], config.by)
    fractions = [shape.fraction(count) for shape, count in zip(shapes, kept, strict=True)]
    return model, {"active": sum(fractions) / len(fractions), "blocks_per_layer": kept}


@contextmanager
def block_bound(
    model: PreTrainedModel, active: float, *, by: BlockScore = "gram"
) -> Iterator[float]:
    """Keep, for every token, the best blocks of a converted model while the block lasts.

    The routing is replaced, so that everything that reads it sees the bound: the activity that
    `evaluate_perplexity` measures is that of the bound. Kept blocks have weight one; a bypass adds
    nothing.

    Args:
        model: A converted model with routers; unchanged afterwards.
        active: Fraction of each layer's blocks to keep, in (0, 1]; round(active * E) of them.
        by: How blocks are chosen; see `BlockBound`.

    Yields:
        The fraction of the blocks that is kept, exactly, the mean over layers with routers.

    Raises:
        InputError: If the model has no routers, or nothing would be kept.
    """
    routed = _routed(model)
    kept = [count_kept(active, experts.num_experts, "blocks") for _, experts in routed]
    with hooked(_keep(model, kept, by)):
        yield sum(
            k / experts.num_experts for k, (_, experts) in zip(kept, routed, strict=True)
        ) / len(routed)


def _routed(model: PreTrainedModel) -> Sequence[tuple[nn.Module, Experts]]:
    """Routers and experts of the layers that have them, first to last."""
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
    return routed


def _keep(model: PreTrainedModel, kept: Sequence[int], by: BlockScore) -> list[RemovableHandle]:
    """Put the hooks in place: so many blocks in each layer that has routers."""
    check_choice("by", by, ("gram", "norm"))
    handles = [
        router.register_forward_hook(_best_blocks(experts, count, by))
        for (router, experts), count in zip(_routed(model), kept, strict=True)
    ]
    # A bypass was fitted to what another choice leaves out.
    bypasses = [layer.bypass for layer in moe_layers(model) if layer.bypass is not None]
    return handles + [bypass.register_forward_hook(_nothing) for bypass in bypasses]


def _nothing(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    """Add nothing."""
    return torch.zeros_like(out)


def _best_blocks(experts: Experts, num_kept: int, by: BlockScore) -> Callable[..., Routing]:
    """A hook behind a router that answers with the best blocks instead of the router's."""

    @torch.no_grad()
    def choose(router: nn.Module, args: tuple[Any, ...], routing: Routing) -> Routing:
        h_TD: Tensor = args[0]
        weights = experts.weights()
        num_experts, dim = experts.num_experts, h_TD.shape[1]
        ids_TK = torch.empty(h_TD.shape[0], num_kept, dtype=torch.int64, device=h_TD.device)
        for part in _common.chunks(h_TD.shape[0], num_experts * max(num_experts, dim)):
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
