"""Run a decoder one layer at a time over stored text, so that one layer's data is live at once.

Memory: the hidden states of all tokens between two layers (T * D floats) and the inputs of one
network (as much again, in one buffer for all layers). With a store the states are on disk after
every layer, and an interrupted walk goes on with the next one; writing takes T * D floats for as
long as it lasts.

A walk in sequence shows a layer before the layer's output is computed, so that every layer reads
what the layers before it give after they were changed. It runs each layer twice: as far as its
network to show it, and whole when the visit is over.

Shapes: N blocks, S tokens of a block, T = N * S tokens, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic._errors import RunError
from moesaic._hooks import hooked
from moesaic._progress import SILENT, Progress, Stage
from moesaic.calibration.unfinished import keep, restore
from moesaic.models.architectures import architecture_of
from moesaic.models.ffn import decoder_layers, ffn_module


@dataclass(frozen=True, slots=True)
class LayerVisit:
    """One layer, with what reaches its feed-forward network.

    Attributes:
        index: Number of the layer, from 0.
        layer: The decoder layer.
        h_TD: Input of its network for every token, [T, D]; overwritten when the loop goes on.
    """

    index: int
    layer: nn.Module
    h_TD: Tensor


class _Inputs:
    """What reaches a network, for all tokens in one buffer that serves layer after layer."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.count = 0
        self.buffer_TD = torch.empty(0, 0)

    def keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Hook in front of the network."""
        piece_TD = args[0].detach().reshape(-1, args[0].shape[-1])
        if self.buffer_TD.shape[1] != piece_TD.shape[1]:
            self.buffer_TD = piece_TD.new_empty(self.num_tokens, piece_TD.shape[1])
        start, self.count = self.count, self.count + piece_TD.shape[0]
        if self.count <= self.num_tokens:
            self.buffer_TD[start : self.count] = piece_TD

    def take(self, index: int) -> Tensor:
        """Give the inputs of a layer that ran, and be ready for the next."""
        count, self.count = self.count, 0
        if count != self.num_tokens:
            raise RunError(
                f"the network of layer {index} saw {count} of {self.num_tokens} tokens, so it does "
                "not run where the architecture table says; correct its row"
            )
        return self.buffer_TD


class _ReachedError(Exception):
    """Ends a forward pass that is needed no further."""


@torch.no_grad()
def walk_layers(
    model: PreTrainedModel,
    ids_NS: Tensor,
    *,
    batch_blocks: int = 4,
    sequential: bool = False,
    store: Path | None = None,
    progress: Progress = SILENT,
    name: str = "calibrate",
) -> Iterator[LayerVisit]:
    """Visit every decoder layer in order.

    Args:
        model: Dense or converted, in evaluation mode.
        ids_NS: Token ids, [N, S]; every block full, so no padding.
        batch_blocks: Blocks that run together.
        sequential: Whether a layer's output is computed after its visit, by what the visitor made
            of the layer, instead of before.
        store: File for the hidden states, to go on after an interruption. A file of another text
            or model must not be given; its owner knows. What a visitor made of the layers that
            were visited must be in the model again.
        progress: Told of every token and layer.
        name: Of the stage that the progress is told of.

    Yields:
        The layers that were not visited before. When the loop comes back, the layer counts as
        visited.

    Raises:
        RunError: If a network did not see every token once; in sequence a second time goes
            unnoticed, because a layer runs no further than the first.
        CheckpointError: If the store is damaged.
    """
    ids_NS = ids_NS.to(model.device)
    row = architecture_of(model.config.model_type)
    layers = decoder_layers(model)
    arguments = _layer_arguments(model, layers, ids_NS[:1])
    first, kept = restore(store)
    hidden_NSD = kept.get("hidden")
    if hidden_NSD is None:
        hidden_NSD = torch.cat(
            [_embed(model, layers[0], ids) for ids in ids_NS.split(batch_blocks)]
        )
    inputs = _Inputs(ids_NS.numel())
    with progress.stage(name, (len(layers) - first) * ids_NS.numel(), "tokens") as stage:
        for index in range(first, len(layers)):
            layer, network = layers[index], ffn_module(layers[index], row)
            pieces = hidden_NSD.split(batch_blocks)
            # After the hooks that are there, so that it sees what the network gets.
            with hooked([network.register_forward_pre_hook(inputs.keep)]):
                if sequential:
                    _look(layer, network, pieces, arguments[index])
                else:
                    _run(layer, pieces, arguments[index], stage)
            yield LayerVisit(index, layer, inputs.take(index))
            if sequential:
                _run(layer, pieces, arguments[index], stage)
            keep(store, index + 1, {"hidden": hidden_NSD})


def _run(
    layer: nn.Module, pieces: Sequence[Tensor], arguments: dict[str, Any], stage: Stage
) -> None:
    """Put the outputs of a layer in the place of its inputs: one layer's states are all we keep."""
    for piece_NSD in pieces:
        out = layer(piece_NSD, **arguments)
        piece_NSD.copy_(out[0] if isinstance(out, tuple) else out)
        stage.advance(piece_NSD.shape[0] * piece_NSD.shape[1])


def _look(
    layer: nn.Module, network: nn.Module, pieces: Sequence[Tensor], arguments: dict[str, Any]
) -> None:
    """Run a layer as far as its network."""

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _ReachedError

    with hooked([network.register_forward_pre_hook(stop)]):
        for piece_NSD in pieces:
            with contextlib.suppress(_ReachedError):
                layer(piece_NSD, **arguments)


def _layer_arguments(
    model: PreTrainedModel, layers: list[nn.Module], ids_1S: Tensor
) -> list[dict[str, Any]]:
    """What the model passes to each layer beside the hidden states; every block gets the same."""
    arguments: list[dict[str, Any]] = [{} for _ in layers]

    def note(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            arguments[index] = {k: v for k, v in kwargs.items() if k != "hidden_states"}

        return hook

    handles = [
        layer.register_forward_pre_hook(note(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    with hooked(handles):
        model(input_ids=ids_1S, use_cache=False)
    return arguments


def _embed(model: PreTrainedModel, first_layer: nn.Module, ids_NS: Tensor) -> Tensor:
    """Hidden states that reach the first layer, [N, S, D]."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _ReachedError

    handle = first_layer.register_forward_pre_hook(stop, with_kwargs=True)
    with hooked([handle]), contextlib.suppress(_ReachedError):
        model(input_ids=ids_NS, use_cache=False)
    return seen[0]
