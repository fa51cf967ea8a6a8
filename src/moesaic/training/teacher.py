"""The teacher of a model: its dense parent, held by the model itself or loaded beside it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.nn.layer import moe_layers
from moesaic.training.zeros import pruned_zeros


def dense_teacher(model: PreTrainedModel) -> PreTrainedModel:
    """Make the frozen dense parent of a converted model.

    Parameters that do not train are shared with the model; only those that train are copied, as
    they are now. Call it after deciding what trains and before the first step.

    Args:
        model: A converted model that has not been trained since its conversion.

    Returns:
        A model of its own whose layers compute every expert at weight one.
    """
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    teacher: PreTrainedModel = copy.deepcopy(model, dict(shared))
    for parameter in teacher.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    for layer in moe_layers(teacher):
        layer.all_on = True
    teacher.eval()
    return teacher


def is_own_teacher(model: PreTrainedModel) -> bool:
    """Tell whether a model with all experts on is its dense parent.

    Every neuron has one place then, and no weight was changed. An ordinary dense model may be
    narrower than its parent was, and does not tell.
    """
    if not moe_layers(model) or pruned_zeros(model):
        return False
    width = model.config.moesaic.get("dense_width")
    configs = [layer.config for layer in moe_layers(model)]
    exact: bool = model.config.moesaic.get("exact", True)
    return exact and (
        width is None
        or all(
            config.shared_width + config.num_experts * config.width == width for config in configs
        )
    )


def given_teacher(teacher: PreTrainedModel) -> PreTrainedModel:
    """Freeze a teacher that was loaded beside the model."""
    teacher.requires_grad_(False)
    teacher.eval()
    return teacher


@torch.no_grad()
def ask_teacher(teacher: PreTrainedModel, *, hidden: bool, **inputs: Tensor) -> Any:
    """Run the teacher: `logits` [B, S, V] and, if wanted, the `hidden_states` of every layer."""
    return teacher(**inputs, use_cache=False, output_hidden_states=hidden)
