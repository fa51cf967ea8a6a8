"""The teacher of a model: its dense parent, held by the model itself or loaded beside it."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from moesaic.nn.layer import moe_layers


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
    """Tell whether a model has as many neurons in every layer as its dense parent had."""
    width = model.config.moesaic.get("dense_width")
    configs = [layer.config for layer in moe_layers(model)]
    return width is None or all(
        config.shared_width + config.num_experts * config.width == width for config in configs
    )


def given_teacher(teacher: PreTrainedModel) -> PreTrainedModel:
    """Freeze a teacher that was loaded beside the model."""
    teacher.requires_grad_(False)
    teacher.eval()
    return teacher


@torch.no_grad()
def teacher_logits(teacher: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits of the teacher, [B, S, V]."""
    logits: torch.Tensor = teacher(**inputs, use_cache=False).logits
    return logits
