"""Pruning weights of feed-forward networks layer after layer, each on what the pruned ones give.

What is removed becomes an exact zero; widths stay. The dense model is consumed.

Shapes: T tokens, F neurons of a network, D model width; W rows and C columns of one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moesaic._errors import CheckpointError, InputError, RunError
from moesaic._files import atomic_write
from moesaic._progress import Progress
from moesaic.calibration.stats import CalibrationStats
from moesaic.calibration.walk import walk_layers
from moesaic.compression.pruning._base import Networks, check_measured
from moesaic.models.ffn import FFN, fill_experts
from moesaic.nn.layer import MoELayer, moe_layers

COLLECTORS = ("tokens",)
# Tokens whose neurons are held at a time.
_CHUNK = 1024


@torch.no_grad()
def prune_weights(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    active: float,
    prune: Callable[[FFN, Tensor], FFN],
    *,
    by: str,
    store: Path | None,
    progress: Progress,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Prune every network of a dense model in sequence.

    Args:
        model: A dense model of a known architecture.
        stats: Its calibration with the collector `tokens`.
        active: Fraction of weights that `prune` keeps, of every row or block of columns.
        prune: Gives a network with zeros, from the network and its inputs for all tokens, [T, D].
        by: Name of the pruning.
        store: Directory for finished layers; an interrupted run goes on after them.
        progress: Told of every token.

    Returns:
        The pruned model in evaluation mode, and what came out: the fraction `active` of weights
        of the networks that are not zero.

    Raises:
        InputError: Before the model is touched, if the settings do not fit it or the statistics.
        RunError: If the inputs of a network are not finite.
    """
    stats = check_measured(model, stats, COLLECTORS, by=by)
    networks = Networks.of(model)
    widths = networks.widths()
    least = min(model.config.hidden_size, *widths)
    if round(active * least) < 1:
        raise InputError(
            f"active={active} keeps none of the {least} weights of a row; raise it to "
            f"{1 / least:.3g}"
        )
    ids_NS = stats.whole()["tokens.ids_NS"].long()
    if int(ids_NS.max()) >= model.config.vocab_size:
        raise InputError(
            f"{stats.directory} has the token {int(ids_NS.max())}, the model knows "
            f"{model.config.vocab_size}; calibrate this model"
        )
    specs = networks.adopt(widths)
    model.eval()
    # Those that an interrupted run left, since the walk goes on behind them.
    num_done = 0
    while store is not None and _file(store, num_done).is_file():
        moe = networks.fresh(num_done, specs[num_done])
        _take_up(moe, _file(store, num_done))
        networks.put(num_done, moe)
        num_done += 1
    hidden = None if store is None else store / "hidden.safetensors"
    for visit in walk_layers(
        model, ids_NS, sequential=True, store=hidden, progress=progress, name="prune"
    ):
        # The last of them may not have given its outputs yet.
        if visit.index < num_done:
            continue
        if not bool(visit.h_TD.isfinite().all()):
            raise RunError(
                f"the inputs of the network of layer {visit.index} are not finite after the "
                "layers before it were pruned; raise active or use float32"
            )
        moe = networks.fresh(visit.index, specs[visit.index])
        fill_experts(moe, prune(networks.read(visit.index), visit.h_TD))
        if store is not None:
            with atomic_write(_file(store, visit.index)) as temporary:
                save_file(moe.state_dict(), temporary)
        networks.put(visit.index, moe)
    return model, {"active": _share_of_weights(moe_layers(model))}


def neuron_chunks(ffn: FFN, h_TD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs of the network and of its down product, some tokens at a time, in float32."""
    for piece_TD in h_TD.split(_CHUNK):
        yield piece_TD.float(), ffn.neurons(piece_TD).float()


def drop_smallest(score_WC: Tensor, num_dropped: int) -> Tensor:
    """Mark so many entries of each row with the smallest scores, exactly.

    Args:
        score_WC: Scores, [W, C].
        num_dropped: Of each row; of equal scores the first are dropped.

    Returns:
        True where a score is to go, [W, C].
    """
    order_WC = score_WC.sort(dim=1, stable=True).indices
    dropped_WC = torch.zeros_like(score_WC, dtype=torch.bool)
    return dropped_WC.scatter_(1, order_WC[:, :num_dropped], True)


def _file(store: Path, index: int) -> Path:
    return store / f"layer_{index:03d}.safetensors"


def _take_up(moe: MoELayer, file: Path) -> None:
    """Fill a layer with what an interrupted run left of it."""
    try:
        moe.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({str(error).splitlines()[0]}); delete {file.parent} and run "
            "it again"
        ) from error


def _share_of_weights(layers: list[MoELayer]) -> float:
    """Fraction of the weights of matrices that are not zero."""
    weights = [moe.shared.weights() for moe in layers if moe.shared is not None]
    matrices = [matrix for weight in weights for matrix in (weight.up, weight.down)]
    kept = sum(int(matrix.count_nonzero()) for matrix in matrices)
    return kept / sum(matrix.numel() for matrix in matrices)
