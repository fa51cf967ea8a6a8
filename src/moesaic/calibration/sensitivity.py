"""How much an error in each layer's feed-forward output moves the model's predictions.

For a small change d of the output y of one layer at one token, the divergence of the predictions
is about d^T F d / 2 with the Fisher matrix F = E[g g^T], where g is the gradient at y of the log
probability of a token drawn from the model itself. For a change of relative energy e in no
particular direction that is e * |y|^2 |g|^2 / (2 D), so the mean of |y|^2 |g|^2 / D ranks the
layers. One backward pass measures all of them. (Fisher information for pruning: Theis et al. 2018,
arXiv 1801.05787.)

Shapes: N blocks, S tokens, D model width, V vocabulary, L layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic._hooks import hooked
from moesaic._progress import SILENT, Progress
from moesaic.calibration.unfinished import keep, restore
from moesaic.models.architectures import architecture_of
from moesaic.models.ffn import decoder_layers, ffn_output


def layer_sensitivity(
    model: PreTrainedModel,
    ids_NS: Tensor,
    *,
    seed: int = 0,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> list[float]:
    """Measure the sensitivity of every layer.

    Args:
        model: Dense or converted, in evaluation mode; its parameters get no gradient.
        ids_NS: Text, [N, S]; a few blocks are enough.
        seed: Of the tokens drawn from the model.
        store: File for the sums, to go on after an interruption with the block it was in. A file
            of another text or model must not be given; its owner knows.
        progress: Told of every token.

    Returns:
        Mean of |y|^2 |g|^2 / D of each layer.
    """
    row = architecture_of(model.config.model_type)
    layers = decoder_layers(model)
    outputs: dict[int, Tensor] = {}

    def watch(index: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            # The first layer's output depends on nothing that trains.
            out = out if out.requires_grad else out.detach().requires_grad_()
            out.retain_grad()
            outputs[index] = out
            return out

        return hook

    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    sums_L = torch.zeros(len(layers), dtype=torch.float64)
    first, kept = restore(store)
    if kept:
        sums_L.copy_(kept["sums_L"])
        generator.set_state(kept["generator"])
    num_left = ids_NS[first:].numel()
    handles = [
        ffn_output(layer, row).register_forward_hook(watch(index))
        for index, layer in enumerate(layers)
    ]
    stage_of = progress.stage("sensitivity", num_left, "tokens")
    try:
        model.requires_grad_(False)
        with hooked(handles), torch.enable_grad(), stage_of as stage:
            for block in range(first, len(ids_NS)):
                ids_1S = ids_NS[block : block + 1]
                logits_SV = model(input_ids=ids_1S, use_cache=False).logits[0].float()
                probs_SV = logits_SV.detach().softmax(-1)
                drawn_S = torch.multinomial(probs_SV.cpu(), 1, generator=generator).squeeze(1)
                drawn_S = drawn_S.to(logits_SV.device)
                nnf.cross_entropy(logits_SV, drawn_S, reduction="sum").backward()
                for index, out in outputs.items():
                    assert out.grad is not None
                    y_TD, g_TD = out.detach().flatten(0, -2), out.grad.flatten(0, -2)
                    energy_T = y_TD.float().square().sum(1) * g_TD.float().square().sum(1)
                    sums_L[index] += energy_T.sum().item() / y_TD.shape[1]
                outputs.clear()
                keep(store, block + 1, {"sums_L": sums_L, "generator": generator.get_state()})
                stage.advance(ids_1S.numel())
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return (sums_L / ids_NS.numel()).tolist()
