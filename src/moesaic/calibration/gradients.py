"""What the gradient of the loss says about neurons and channels: one backward pass a block.

Source: the importance of LLM-Pruner, arXiv 2305.11627, as its code computes it. First order: the
sum over a group's weights of |w dL/dw|, with the gradient of the mean loss of all blocks. Second
order: the sum of w^2 times the mean over blocks of the squared gradient. A group is a neuron of a
feed-forward network, or a channel of the residual stream. The importance of a neuron's activation
in a domain, the mean over the domain's tokens of |a dL/da|, is that of LLaMA-MoE, arXiv 2406.16554.
Ours: whole blocks of the calibration text as samples, and the biases of a neuron as its weights.

Shapes: N blocks, S tokens of a block, F neurons of a layer, D channels, C domains of the text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic._errors import InputError, RunError
from moesaic._hooks import hooked
from moesaic._progress import Progress
from moesaic.calibration.stats import Measured
from moesaic.calibration.unfinished import keep, restore
from moesaic.data.blocks import TokenBlocks
from moesaic.models.architectures import Architecture, architecture_of
from moesaic.models.channels import NARROWABLE, channel_axes
from moesaic.models.ffn import decoder_layers, ffn_module, read_ffn
from moesaic.nn.layer import MoELayer

_CHANNELS = "channels"


class Gradients:
    """Importance of neurons and channels from gradients, on the first 10 blocks.

    Holds the summed gradient in float32, 4 bytes for every weight of the model (of its networks
    alone where channels cannot be removed), and what a backward pass over one block does. With a
    store the sums are on disk after every block.
    """

    num_blocks = 10

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.row = architecture_of(model.config.model_type)
        self.layers = decoder_layers(model)
        if any(isinstance(ffn_module(layer, self.row), MoELayer) for layer in self.layers):
            raise InputError(
                "collector 'gradients' needs a dense network, got a converted layer; give the "
                "dense parent"
            )

    def measure(
        self, text: TokenBlocks, seed: int, progress: Progress, store: Path | None = None
    ) -> Measured:
        """Of each layer: `weight_importance_F`, `weight_second_F` and `activation_importance_CF`.

        Of the model: `tokens_C`, how many tokens of each domain were read; the importance in a
        domain without any is 0. Where channels can be removed (`moesaic.models.channels`), also
        `channel_importance_D` and `channel_second_D`.
        """
        ids_NS = torch.from_numpy(text.ids_NS[: self.num_blocks]).long().to(self.model.device)
        domain_N = text.domain_N[: self.num_blocks].tolist()
        tokens_C = torch.zeros(len(text.domains), dtype=torch.int64)
        activation = getattr(self.model.config, self.row.activation)
        sums = [
            torch.zeros(len(text.domains), read_ffn(layer, self.row, activation).width)
            for layer in self.layers
        ]
        weights = _WeightSums(_shares(self.model, self.layers, self.row))
        done, kept = restore(store)
        if kept:
            tokens_C = kept.pop("tokens_C")
            sums = [kept.pop(f"activation.{index}") for index in range(len(sums))]
            weights.take_up(kept)
        with (
            _only_these_train(self.model, weights.shares),
            weights.watching(),
            _neuron_values(self.layers, self.row) as values,
            torch.enable_grad(),
            progress.stage("gradients", ids_NS[done:].numel(), "tokens") as stage,
        ):
            for block in range(done, len(ids_NS)):
                ids_S, domain = ids_NS[block], domain_N[block]
                logits_SV = self.model(input_ids=ids_S[None], use_cache=False).logits[0].float()
                nnf.cross_entropy(logits_SV[:-1], ids_S[1:]).backward()
                for index, sum_CF in enumerate(sums):
                    sum_CF[domain] += _activation_importance(values.pop(index, None), index).cpu()
                tokens_C[domain] += ids_S.numel()
                activations = {f"activation.{index}": sum_CF for index, sum_CF in enumerate(sums)}
                so_far = {"tokens_C": tokens_C, **activations, **weights.so_far()}
                keep(store, block + 1, so_far)
                stage.advance(ids_S.numel())
        first, second = weights.result(len(ids_NS))
        whole = {"tokens_C": tokens_C}
        if _CHANNELS in first:
            whole["channel_importance_D"] = first[_CHANNELS]
            whole["channel_second_D"] = second[_CHANNELS]
        return Measured(
            whole,
            [
                {
                    "weight_importance_F": first[str(index)],
                    "weight_second_F": second[str(index)],
                    "activation_importance_CF": sum_CF / tokens_C.clamp(min=1)[:, None],
                }
                for index, sum_CF in enumerate(sums)
            ],
        )


class _Share(NamedTuple):
    """Which groups the weights of a parameter belong to.

    Attributes:
        kind: The neurons of a layer, by its number, or the channels.
        axis: The axis of the parameter that runs over the groups.
        repeats: How often it runs over them, once after the other: twice for gate and up in one.
    """

    kind: str
    axis: int
    repeats: int = 1

    def sums(self, values: Tensor) -> Tensor:
        """Sum values of the parameter's shape over the weights of each group."""
        first = values.movedim(self.axis, 0)
        return first.reshape(self.repeats, first.shape[0] // self.repeats, -1).sum((0, 2))


def _shares(
    model: PreTrainedModel, layers: list[nn.Module], row: Architecture
) -> dict[nn.Parameter, list[_Share]]:
    """The groups of every parameter that has any."""
    shares: dict[nn.Parameter, list[_Share]] = defaultdict(list)
    for index, layer in enumerate(layers):
        for path in filter(None, (row.gate, row.up)):
            module = attrgetter(path)(layer)
            repeats = 2 if row.fused else 1
            shares[module.weight].append(_Share(str(index), int(row.transposed), repeats))
            if module.bias is not None:
                shares[module.bias].append(_Share(str(index), 0, repeats))
        down = attrgetter(row.down)(layer)
        shares[down.weight].append(_Share(str(index), int(not row.transposed)))
    if model.config.model_type in NARROWABLE:
        axes = channel_axes(model)
        for name, parameter in model.named_parameters():
            if name in axes:
                shares[parameter].append(_Share(_CHANNELS, axes[name]))
    return dict(shares)


class _WeightSums:
    """Gathers the gradients of weights, block after block, and makes importances of them."""

    def __init__(self, shares: dict[nn.Parameter, list[_Share]]) -> None:
        self.shares = shares
        self.totals = {p: torch.zeros_like(p, dtype=torch.float32) for p in shares}
        self.second: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take every gradient as soon as a backward pass has it."""
        with hooked(p.register_post_accumulate_grad_hook(self._take) for p in self.shares):
            yield

    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        # Freed here, so that of one block only the gradients that the pass still needs are held.
        gradient, parameter.grad = parameter.grad.float(), None
        self.totals[parameter] += gradient
        self._add(self.second, parameter, (parameter.detach().float() * gradient).square())

    def _add(self, groups: dict[str, Tensor], parameter: nn.Parameter, values: Tensor) -> None:
        for share in self.shares[parameter]:
            part = share.sums(values)
            groups[share.kind] = groups[share.kind] + part if share.kind in groups else part

    def so_far(self) -> dict[str, Tensor]:
        """What the blocks until now gave, for `take_up`."""
        totals = {f"total.{place}": total for place, total in enumerate(self.totals.values())}
        return totals | {f"second.{kind}": value for kind, value in self.second.items()}

    def take_up(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `so_far` gave of the same model."""
        device = next(iter(self.shares)).device
        for place, total in enumerate(self.totals.values()):
            total.copy_(tensors[f"total.{place}"])
        for name, value in tensors.items():
            which, _, kind = name.partition(".")
            if which == "second":
                self.second[kind] = value.to(device)

    def result(self, num_blocks: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Importance of the groups of each kind, of first and of second order."""
        first: dict[str, Tensor] = {}
        for parameter, total in self.totals.items():
            self._add(first, parameter, (parameter.detach().float() * total / num_blocks).abs())
        return first, {kind: total / num_blocks for kind, total in self.second.items()}


@contextmanager
def _only_these_train(
    model: PreTrainedModel, wanted: dict[nn.Parameter, list[_Share]]
) -> Iterator[None]:
    """Give gradients to some parameters alone; all are as they were when the block ends."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(parameter in wanted)
            parameter.grad = None
        yield
    finally:
        for parameter, trained, gradient in before:
            parameter.requires_grad_(trained)
            parameter.grad = gradient


@contextmanager
def _neuron_values(layers: list[nn.Module], row: Architecture) -> Iterator[dict[int, Tensor]]:
    """Keep what enters every down product, with its gradient, by the number of the layer."""
    values: dict[int, Tensor] = {}

    def watch(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].retain_grad()
            values[index] = args[0]

        return hook

    handles = [
        attrgetter(row.down)(layer).register_forward_pre_hook(watch(index))
        for index, layer in enumerate(layers)
    ]
    with hooked(handles):
        yield values


def _activation_importance(a: Tensor | None, index: int) -> Tensor:
    """Sum of |a dL/da| over the tokens of a block, [F]."""
    if a is None or a.grad is None:
        raise RunError(
            f"the network of layer {index} saw no token, so it does not run where the "
            "architecture table says; correct its row"
        )
    return (a.detach().float() * a.grad.float()).abs().flatten(0, -2).sum(0)
