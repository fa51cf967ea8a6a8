"""TEAL: inputs and neurons of small magnitude count as zero, so their weights need not be read.

Source: Training-Free Activation Sparsity in Large Language Models, arXiv 2408.14690. Its are the
operation x -> x * 1[|x| > t], thresholds that are quantiles of magnitudes on calibration text, and
the block-wise greedy allocation. Ours: only feed-forward networks are sparsified, where the paper
also sparsifies attention and adds both up; gate and up share a threshold, since they share their
input; magnitudes are counted as they are, where the paper's quantile assumes that they are
symmetric around zero; those of neurons are counted with the small inputs already gone; and the
greedy minimises the error of the network's output instead of the whole decoder layer's. Every
token is treated alike; the released code leaves the first half of a prompt dense.

The baseline of what no router predicts: which weights a token uses is read off its activations.

Shapes: T tokens, D model width, F neurons of a network, L layers; 2 is its input and its neurons.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moesaic._errors import InputError
from moesaic._files import atomic_write
from moesaic._progress import SILENT, Progress
from moesaic.calibration.stats import CalibrationStats
from moesaic.compression.pruning._base import Networks, check_active, check_measured
from moesaic.models.ffn import FFN, fill_experts
from moesaic.nn.experts.thresholded import Thresholded
from moesaic.ops.weights import keep_large

# Tokens on which the greedy allocation measures its errors.
_SAMPLE = 1024
# Tokens whose neurons exist at a time.
_CHUNK = 1024
# Shares of weights closer than this are the same.
_ROUNDING = 1e-9
# Bits of bfloat16 without its sign, and of its infinity.
_MAGNITUDES = 1 << 15
_INFINITE = 0x7F80


@dataclass(frozen=True, slots=True, kw_only=True)
class TEAL:
    """Settings of the sparsification.

    Attributes:
        active: Fraction of every network's weights that a token uses on the calibration text, in
            (0, 1].
        allocation: How inputs and neurons share what is left out: `greedy` (the paper) takes from
            whichever costs the output less, in every layer anew; `uniform` leaves the same
            fraction of both out.
        step: Share of the weights that one turn of the greedy leaves out.
    """

    active: float = 0.7
    allocation: Literal["greedy", "uniform"] = "greedy"
    step: float = 0.05

    def __post_init__(self) -> None:
        check_active(self.active)
        if not 0.0 < self.step <= 1.0:
            raise InputError(f"step must be in (0, 1], got {self.step}; 0.05 is the paper's")

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that these settings need."""
        return ("inputs",)


class _Cut(NamedTuple):
    """What was decided for a layer: thresholds, and the sparsity that each of them gave."""

    threshold_2: Tensor
    sparsity_2: Tensor


@torch.no_grad()
def sparsify_teal(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: TEAL,
    *,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Give the networks of a dense model thresholds; it is consumed, layer by layer.

    Args:
        model: A dense model of a known architecture.
        stats: Its calibration with the collector `inputs`.
        config: Settings.
        store: Directory for the thresholds of finished layers; an interrupted run goes on after
            them.
        progress: Told of every layer, once for its thresholds and once for its replacement.

    Returns:
        The model in evaluation mode, and what came out on the calibration text: the fraction
        `active` of weights in use, and per layer the part of inputs (`input_sparsity`) and of
        neurons (`neuron_sparsity`) that is left out.

    Raises:
        InputError: Before the model is touched, if it is no dense one or the statistics do not
            fit it.
    """
    stats = check_measured(model, stats, config.collectors(), by="teal")
    networks = Networks.of(model)
    widths = networks.widths()
    with progress.stage("sparsify", 2 * len(widths), "layers") as stage:
        cuts = []
        for index in range(len(widths)):
            cuts.append(_decide(networks.read(index), stats, index, config, store))
            stage.advance()
        # Thresholds stay, whatever is on.
        specs = networks.adopt(widths, experts="thresholded-", exact=False)
        for index, (spec, cut) in enumerate(zip(specs, cuts, strict=True)):
            moe = networks.fresh(index, spec)
            fill_experts(moe, networks.read(index))
            assert isinstance(moe.shared, Thresholded)
            moe.shared.set_thresholds(*cut.threshold_2.tolist())
            networks.put(index, moe)
            stage.advance()
    shares = weight_shares(gated=networks.row.gated)
    sparsity_L2 = torch.stack([cut.sparsity_2 for cut in cuts])
    left_out = float((sparsity_L2 * torch.tensor(shares, dtype=torch.float64)).sum(1).mean())
    return model.eval(), {
        "active": 1.0 - left_out,
        "input_sparsity": [round(part, 4) for part in sparsity_L2[:, 0].tolist()],
        "neuron_sparsity": [round(part, 4) for part in sparsity_L2[:, 1].tolist()],
    }


def weight_shares(*, gated: bool) -> tuple[float, float]:
    """Parts of a network's weights that its input and that its neurons are multiplied with.

    Two thirds and one third of a gated network, half and half of a plain one.
    """
    matrices = 2 if gated else 1
    return matrices / (matrices + 1), 1 / (matrices + 1)


class Magnitudes:
    """How often each magnitude occurs: exact, up to the rounding to bfloat16, in 256 kB.

    Without its sign a bfloat16 has 32,768 values, and their bits are in the order of the values.

    Args:
        pieces: What is counted, of any shape and dtype.
    """

    def __init__(self, pieces: Iterable[Tensor]) -> None:
        self.counts = torch.zeros(_MAGNITUDES, dtype=torch.int64)
        for piece in pieces:
            bits = piece.to(torch.bfloat16).view(torch.int16).flatten() & (_MAGNITUDES - 1)
            self.counts += torch.bincount(bits.to(torch.int64), minlength=_MAGNITUDES).cpu()
        self.below = self.counts.cumsum(0)

    @property
    def finite(self) -> bool:
        """Whether no value was infinite or not a number."""
        return not bool(self.counts[_INFINITE:].any())

    def threshold(self, sparsity: float) -> tuple[float, float]:
        """Find the threshold that a part of the values does not exceed.

        Args:
            sparsity: Part of the values to leave out, in [0, 1]; 0 gives the threshold 0.

        Returns:
            The threshold, and the part of the values that does not exceed it: the nearest to what
            was asked for.
        """
        total = int(self.below[-1])
        rank = round(sparsity * total)
        if rank == 0:
            return 0.0, int(self.below[0]) / total
        last = int(torch.searchsorted(self.below, rank))
        # The magnitude where the rank is reached stays or goes, whichever is nearer.
        if last and rank - int(self.below[last - 1]) < int(self.below[last]) - rank:
            last -= 1
        # Halfway to the next magnitude: what rounds to this one is left out too.
        edge = torch.tensor((last << 16) | 0x8000, dtype=torch.int32).view(torch.float32)
        return float(edge), int(self.below[last]) / total


def _decide(
    ffn: FFN, stats: CalibrationStats, index: int, config: TEAL, store: Path | None
) -> _Cut:
    """Find the thresholds of one layer, or read what an interrupted run left."""
    file = None if store is None else store / f"layer_{index:03d}.safetensors"
    if file is not None and file.is_file():
        return _Cut(**load_file(file))
    h_TD = stats.layer(index)["inputs.h_TD"]
    if h_TD.shape[1] != ffn.up_FD.shape[1]:
        raise InputError(
            f"{stats.directory} was measured on inputs of {h_TD.shape[1]} values, layer {index} "
            f"has {ffn.up_FD.shape[1]}; calibrate this model"
        )
    inputs = Magnitudes(h_TD.split(_CHUNK))
    if not inputs.finite:
        raise InputError(
            f"the statistics of layer {index} in {stats.directory} have values that are not "
            "finite; calibrate again in float32 or bfloat16"
        )
    if config.allocation == "uniform":
        wanted = (1.0 - config.active, 1.0 - config.active)
    else:
        sample = torch.linspace(0, len(h_TD) - 1, min(_SAMPLE, len(h_TD))).long()
        wanted = allocate_greedily(ffn, _as_input(h_TD[sample], ffn), config.active, config.step)
    input_threshold, input_sparsity = inputs.threshold(wanted[0])
    neurons = Magnitudes(
        ffn.neurons(keep_large(_as_input(piece, ffn), input_threshold))
        for piece in h_TD.split(_CHUNK)
    )
    if not neurons.finite:
        raise InputError(
            f"neurons of layer {index} are not finite on the calibration text; load the model in "
            "float32 or bfloat16"
        )
    neuron_threshold, neuron_sparsity = neurons.threshold(wanted[1])
    cut = _Cut(
        torch.tensor([input_threshold, neuron_threshold]),
        torch.tensor([input_sparsity, neuron_sparsity], dtype=torch.float64),
    )
    if file is not None:
        with atomic_write(file) as temporary:
            save_file(cut._asdict(), temporary)
    return cut


def _as_input(h_TD: Tensor, ffn: FFN) -> Tensor:
    return h_TD.to(ffn.up_FD.device, ffn.up_FD.dtype)


def allocate_greedily(ffn: FFN, h_TD: Tensor, active: float, step: float) -> tuple[float, float]:
    """Share what is left out of a network between its inputs and its neurons.

    TEAL's block-wise greedy (arXiv 2408.14690, its algorithm 1) on the two tensors of one network:
    from nothing left out, the tensor whose next step raises the error less takes it, until the
    budget is spent; a step of the same share of weights is a larger part of the tensor that fewer
    weights read. The error is the mean over tokens of the length of the output's difference.

    Args:
        ffn: The network.
        h_TD: Inputs, [T, D], of the network's dtype.
        active: Fraction of weights in use at the end, in (0, 1].
        step: Share of the weights that one turn leaves out; the last turn takes what is missing.

    Returns:
        Sparsity of the inputs and of the neurons; weighted by `weight_shares` they give
        1 - active.
    """
    shares = weight_shares(gated=ffn.gate_FD is not None)
    inputs = Magnitudes([h_TD])

    def neurons(sparsity: float) -> Tensor:
        return ffn.neurons(keep_large(h_TD, inputs.threshold(sparsity)[0]))

    def error(a_TF: Tensor, sparsity: float) -> float:
        kept_TF = keep_large(a_TF, Magnitudes([a_TF]).threshold(sparsity)[0])
        return float((nnf.linear(kept_TF, ffn.down_DF) - want_TD).float().norm(dim=1).mean())

    a_TF = ffn.neurons(h_TD)
    want_TD = nnf.linear(a_TF, ffn.down_DF)
    first, second = 0.0, 0.0
    missing = 1.0 - active
    while missing > _ROUNDING:
        turn = min(step, missing)
        trials = []
        if first < 1.0:
            more = min(1.0, first + turn / shares[0])
            fewer_TF = neurons(more)
            trials.append((error(fewer_TF, second), more, second, fewer_TF))
        if second < 1.0:
            more = min(1.0, second + turn / shares[1])
            trials.append((error(a_TF, more), first, more, a_TF))
        _, first, second, a_TF = min(trials, key=lambda trial: trial[0])
        missing = 1.0 - active - first * shares[0] - second * shares[1]
    return first, second
