"""Our expert paths inside any mixture of experts of transformers.

transformers keeps a table of functions that may stand in for the forward of an architecture's
experts. Ours is entered under the name `moesaic` as soon as that table exists.

Shapes: T tokens, K slots per token, E experts, F width of one expert, D model width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.ops.select import apply_experts
from moesaic.ops.weights import ACTIVATIONS, ExpertWeights

NAME = "moesaic"


def register() -> None:
    """Let any mixture of experts of transformers be switched to our ops by name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the experts of a transformers module on the path that suits the call.

    Args:
        self: The module with the weights; see `expert_weights` for what it must hold.
        hidden_states: Inputs, [T, D].
        top_k_index: Expert of each slot, [T, K] int64. A slot is empty if its id is -1 or at
            least E, also where the functions of transformers would read past the weights.
        top_k_weights: Weight of each slot, [T, K]; ignored where the slot is empty.

    Returns:
        Weighted sum of each token's experts, [T, D], in the dtype of the inputs.

    Raises:
        InputError: If the module holds its weights in a form that our ops do not know.
    """
    weights = expert_weights(self)
    # Ranks that split the experts mark slots of other ranks with ids from E on.
    ids_TK = top_k_index.clamp(-1, weights.num_experts)
    if getattr(self, "has_post_expert_norm", False):
        return _normed_experts(hidden_states, ids_TK, top_k_weights, weights, self.post_expert_norm)
    return apply_experts(hidden_states, ids_TK, top_k_weights, weights)


def expert_weights(module: Any) -> ExpertWeights:
    """Read an experts module of transformers, without copying a weight.

    Its flags say how it stores them: in x out instead of out x in (`is_transposed`), gate and up
    neurons in turn instead of one after the other (not `is_concatenated`), with biases
    (`has_bias`), or without a gate (not `has_gate`).

    Args:
        module: An instance of a class decorated with `use_experts_implementation`.

    Returns:
        Views of the weights. The activation has a name where it is one of `ACTIVATIONS` and the
        gate is the plain `act(gate) * up`; else the module's own gate is called.

    Raises:
        InputError: If the weights are quantised, split over devices, or need a gate of the
            architecture that it does not define.
    """
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, up_name), module.down_proj
    for name, weight in ((up_name, up), ("down_proj", down)):
        if not weight.is_floating_point() or weight.itemsize < 2:
            raise InputError(
                f"{name} of {type(module).__name__} must be float16, bfloat16, float32 or float64 "
                f"for experts_implementation={NAME!r}, got {weight.dtype}; load the model without "
                "quantisation or choose another implementation"
            )
        if weight.shape[0] != module.num_experts:
            raise InputError(
                f"{name} of {type(module).__name__} must hold num_experts={module.num_experts} "
                f"experts on this device for experts_implementation={NAME!r}, got "
                f"{weight.shape[0]}; choose another implementation for split experts"
            )
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    name, glu = _gate(module)
    return ExpertWeights(
        up=up,
        down=down,
        activation=name,
        gated=module.has_gate,
        up_bias=getattr(module, f"{up_name}_bias") if module.has_bias else None,
        down_bias=module.down_proj_bias if module.has_bias else None,
        glu=glu,
        packed=getattr(module, "moesaic_packed", None),
    )


def _gate(module: Any) -> tuple[str, Any]:
    """Give the name of the activation or, where no name says it all, the function to call."""
    from transformers.integrations.moe import _default_apply_gate

    if not module.has_gate:
        name = _activation_name(module.act_fn)
        return name, None if name else module.act_fn
    if getattr(module._apply_gate, "__func__", None) is not _default_apply_gate:
        return "", module._apply_gate
    if not module.is_concatenated:
        raise InputError(
            f"{type(module).__name__} stores gate and up neurons in turn (is_concatenated=False) "
            f"and must define _apply_gate for experts_implementation={NAME!r}; define it or choose "
            "'eager'"
        )
    name = _activation_name(module.act_fn)
    return name, None if name else module._apply_gate


def _activation_name(act: Any) -> str:
    """Give the name of an activation; empty if our ops know none for it."""
    for name, function in ACTIVATIONS.items():
        if act is function:
            return name
    return _module_names().get(type(act), "")


@functools.cache
def _module_names() -> dict[type, str]:
    """Name the activation modules of transformers that compute one of ours."""
    from transformers.activations import ACT2FN

    return {type(ACT2FN[name]): name for name in ACTIVATIONS}


def _normed_experts(
    h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weights: ExpertWeights, norm: Any
) -> Tensor:
    """Sum the weighted outputs of each token's experts, each normalised by itself."""
    num_slots = ids_TK.shape[1]
    # Every slot is a token of its own, so that no expert's output is summed before its norm.
    h_ND = h_TD.repeat_interleave(num_slots, dim=0)
    ids_N1 = ids_TK.reshape(-1, 1)
    y_ND = norm(apply_experts(h_ND, ids_N1, torch.ones_like(ids_N1, dtype=h_TD.dtype), weights))
    empty_TK = (ids_TK < 0) | (ids_TK == weights.num_experts)
    sum_dtype = torch.promote_types(h_TD.dtype, torch.float32)
    weights_TK = weights_TK.to(sum_dtype).masked_fill(empty_TK, 0.0)
    y_TKD: Tensor = y_ND.to(sum_dtype).unflatten(0, ids_TK.shape)
    return (y_TKD * weights_TK.unsqueeze(-1)).sum(1).to(h_TD.dtype)
