"""A plain reference of pruning in sequence: prune a layer of a dense model, run the whole again.

Shapes: T tokens, F neurons of a network, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import torch
from compression_cases import make_text
from model_cases import Case, dense_model, read_all
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.models.ffn import decoder_layers

Cut = Callable[[Tensor, Tensor], Tensor]


def text_ids() -> Tensor:
    """What calibration draws of all of the text, [N, S]."""
    text = make_text()
    return torch.from_numpy(text.take(len(text), seed=0).ids_NS).long()


def _keep(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module, args) -> None:
        seen[name] = args[0].flatten(0, -2)

    return hook


@torch.no_grad()
def prune_by_hand(case: Case, cut: Cut, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Prune every matrix of every network, each layer on the output of the pruned ones before it.

    Args:
        case: The model.
        cut: Gives a pruned matrix from the matrix, out x in, and its inputs, [T, C].
        dtype: Of the model.
    """
    model = dense_model(case, dtype)
    for index, layer in enumerate(decoder_layers(model)):
        seen: dict[str, Tensor] = {}
        modules = {name: attrgetter(name)(layer) for name in (case.row.ffn, case.row.down)}
        handles = [
            module.register_forward_pre_hook(_keep(seen, name)) for name, module in modules.items()
        ]
        model(text_ids())
        for handle in handles:
            handle.remove()
        ffn = read_all(model)[index]
        h_TD, a_TF = seen[case.row.ffn].float(), seen[case.row.down].float()
        for matrix, inputs in ((ffn.gate_FD, h_TD), (ffn.up_FD, h_TD), (ffn.down_DF, a_TF)):
            if matrix is not None:
                matrix.copy_(cut(matrix, inputs))
    return model
