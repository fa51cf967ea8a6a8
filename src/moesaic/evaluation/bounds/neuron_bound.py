"""The best neurons of every token, known from their values.

Ours. The scores are those that the literature predicts: the gate's magnitude (as in CATS, arXiv
2404.08763) and the length of a neuron's contribution to the output.

Shapes: T tokens, C tokens of a chunk, K kept, F neurons, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moesaic._errors import InputError
from moesaic._hooks import hooked
from moesaic._progress import SILENT, Progress
from moesaic.calibration.stats import CalibrationStats
from moesaic.evaluation.bounds import _common
from moesaic.evaluation.bounds._common import check_choice, check_fraction, count_kept
from moesaic.models.architectures import ARCHITECTURES, architecture_of
from moesaic.models.ffn import FFN, decoder_layers, ffn_module, read_ffn
from moesaic.ops.weights import activation

NeuronScore = Literal["gate", "contribution"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronBound:
    """Settings of the bound on neurons.

    Attributes:
        active: Fraction of the neurons of each network to keep, in (0, 1], to the nearest neuron.
        by: What makes a neuron good: `contribution` is |a_j| times the length of its down column,
            `gate` the magnitude of its activated gate, which is known before the up product.
    """

    active: float = 0.5
    by: NeuronScore = "contribution"

    def __post_init__(self) -> None:
        check_fraction(self.active)

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that it needs: none."""
        return ()


def bound_neurons(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: NeuronBound,
    *,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Make a dense model keep, for every token, the best neurons of each network.

    Args:
        model: A dense model of a known architecture; it is consumed.
        stats: Not used.
        config: Settings.
        store: Not used: there is nothing to go on with.
        progress: Not told: nothing takes time.

    Returns:
        The same model, whose hooks stay, and the fraction `active` that is kept.

    Raises:
        InputError: If the model is no dense one, has no gates to go by, or nothing would be kept.
    """
    _, kept = _keep(model, config.active, config.by)
    return model, {"active": kept}


@contextmanager
def neuron_bound(
    model: PreTrainedModel, active: float, *, by: NeuronScore = "contribution"
) -> Iterator[float]:
    """Keep, for every token, the best neurons of each network while the block lasts.

    Args:
        model: A dense model of a known architecture; unchanged afterwards.
        active: Fraction of neurons to keep, in (0, 1]; round(active * F) of them.
        by: What makes a neuron good; see `NeuronBound`.

    Yields:
        The fraction that is kept, exactly, the mean over layers.

    Raises:
        InputError: If the model is no dense one, has no gates to go by, or nothing would be kept.
    """
    handles, kept = _keep(model, active, by)
    with hooked(handles):
        yield kept


def _keep(
    model: PreTrainedModel, active: float, by: NeuronScore
) -> tuple[list[RemovableHandle], float]:
    """Put the hooks in place; gives them and the fraction that they keep."""
    check_choice("by", by, ("contribution", "gate"))
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
    kept = [count_kept(active, ffn.width, "neurons") for ffn in ffns]
    handles = []
    for layer, ffn, count in zip(layers, ffns, kept, strict=True):
        keeper = _NeuronKeeper(ffn, count, by)
        network: nn.Module = ffn_module(layer, row)
        down: nn.Module = attrgetter(row.down)(layer)
        handles.append(network.register_forward_pre_hook(keeper.see_input))
        handles.append(down.register_forward_pre_hook(keeper.cut))
    return handles, sum(k / ffn.width for k, ffn in zip(kept, ffns, strict=True)) / len(ffns)


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
        for part in _common.chunks(a_TF.shape[0], self.ffn.width):
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
