"""Trained experts with projections in common: groups of matrices are factorised together.

Source: Mixture of Latent Experts, arXiv 2503.23100, the two phases of its conversion: each matrix
is cut to a rank, then those of a group become W_i = A_i B. The best factors in the sense of squared
error are known: B is spanned by the right singular vectors of the stacked matrices, A_i = W_i B^T,
and the error is the sum of the squared singular values left out (Eckart and Young). Gate and up are
factorised one by one, the down matrix stays whole. Neighbours make a group, as far as we know also
in the paper. A small error of matrices need not be a small one of outputs: inputs are not alike in
all directions.

Shapes: E experts, G groups of N = E / G neighbours, F width of one expert, M width of the latent
space, D model width; R rows and C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic.nn.experts._base import Experts
from moesaic.nn.experts.latent import LatentExpertsConfig, LatentGatedExperts
from moesaic.nn.layer import moe_layers


@dataclass(frozen=True, slots=True)
class Factors:
    """Matrices W_i of E experts as products A_i B_q, and what that costs.

    Attributes:
        private: A, [E, R, M].
        common: B, [G, M, C], whose rows are orthonormal.
        rank_error: Squared error of the first phase, each matrix at its rank, summed.
        joint_error: Squared error of the second against the first, summed.
        error: Squared error of both against the matrices, summed.
    """

    private: Tensor
    common: Tensor
    rank_error: float
    joint_error: float
    error: float


def factorise(matrices: Tensor, group_size: int, latent_width: int, rank: int = 0) -> Factors:
    """Factorise the matrices of neighbouring experts together, in float64.

    Args:
        matrices: W, [E, R, C].
        group_size: N, which divides E.
        latent_width: M.
        rank: Of the first phase; 0 leaves the matrices whole.

    Returns:
        The factors and the errors of the two phases.
    """
    whole = matrices.double()
    cut = whole
    if rank:
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        cut = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
    stacks = cut.unflatten(0, (-1, group_size)).flatten(1, 2)
    # All right singular vectors, so that a latent space wider than the stack is still filled.
    common = torch.linalg.svd(stacks, full_matrices=True).Vh[:, :latent_width]
    private = cut @ common.transpose(1, 2).repeat_interleave(group_size, 0)
    product = private @ common.repeat_interleave(group_size, 0)
    return Factors(
        private,
        common,
        float((cut - whole).square().sum()),
        float((product - cut).square().sum()),
        float((product - whole).square().sum()),
    )


@torch.no_grad()
def latent_experts(
    experts: Experts, group_size: int, latent_width: int = 0, rank: int = 0
) -> tuple[LatentGatedExperts, dict[str, float]]:
    """Bring gated experts into latent form.

    Args:
        experts: Gated experts; they stay as they are.
        group_size: N, neighbours that share a projection; it divides E.
        latent_width: M, at most D; 0 is the width of an expert.
        rank: To which each matrix is cut first; 0 leaves it whole.

    Returns:
        The latent experts, in the dtype of the others, and the squared errors of gate and up
        together, `rank`, `joint` and `total`, over the squared size of the matrices.

    Raises:
        InputError: If the experts are not gated, or the settings do not fit them.
    """
    weights = experts.weights()
    num_experts, dim, width = weights.down.shape
    if not weights.gated or weights.glu is not None:
        raise InputError(
            f"latent experts are made of gated ones, got {type(experts).__name__}; convert with "
            "gated experts"
        )
    latent = latent_width or width
    if not 1 <= latent <= dim:
        raise InputError(f"latent_width must be in [1, dim={dim}], got {latent}; lower it")
    if not 0 <= rank <= min(width, dim):
        raise InputError(f"rank must be in [0, {min(width, dim)}], got {rank}; 0 cuts nothing")
    config = LatentExpertsConfig(
        activation=weights.activation,
        bias=weights.up_bias is not None,
        down_bias=weights.down_bias is not None,
        group_size=group_size,
        latent_width=latent_width,
    )
    made = LatentGatedExperts(dim, num_experts, width, config).to(weights.down)
    gate_up = weights.up.unflatten(1, (2, width))
    errors = dict.fromkeys(("rank", "joint", "total"), 0.0)
    for place in range(2):
        found = factorise(gate_up[:, place], group_size, latent, rank)
        made.gate_up_common[:, place].copy_(found.common)
        made.gate_up_private[:, place].copy_(found.private)
        errors["rank"] += found.rank_error
        errors["joint"] += found.joint_error
        errors["total"] += found.error
    made.down_proj.copy_(weights.down)
    for mine, theirs in (
        (made.gate_up_proj_bias, weights.up_bias),
        (made.down_proj_bias, weights.down_bias),
    ):
        if mine is not None and theirs is not None:
            mine.copy_(theirs)
    size = float(weights.up.double().square().sum())
    return made, {name: error / size for name, error in errors.items()}


def factorise_model(
    model: PreTrainedModel, group_size: int, latent_width: int = 0, rank: int = 0
) -> tuple[PreTrainedModel, list[Mapping[str, float]]]:
    """Bring all experts of a converted model into latent form, in place.

    Args:
        model: A converted model; its routers and what is always on stay as they are.
        group_size: N, neighbours that share a projection.
        latent_width: M; 0 is the width of an expert.
        rank: To which each matrix is cut first; 0 leaves it whole.

    Returns:
        The same model, and the errors of every layer with experts.

    Raises:
        InputError: Before the model is touched, if it has no experts or the settings do not fit.
    """
    routed = {
        place: layer for place, layer in enumerate(moe_layers(model)) if layer.experts is not None
    }
    if not routed:
        raise InputError(f"{type(model).__name__} has no experts to factorise; convert it first")
    made = {
        place: latent_experts(layer.experts, group_size, latent_width, rank)
        for place, layer in routed.items()
        if layer.experts is not None
    }
    options = {"group_size": group_size, "latent_width": latent_width}
    for place, layer in routed.items():
        layer.experts = made[place][0]
        layer.config = replace(layer.config, experts="latent-gated", experts_options=options)
        model.config.moesaic["layers"][place] = to_plain(layer.config)
    # All experts on is no longer the dense parent.
    model.config.moesaic["exact"] = False
    return model, [errors for _, errors in made.values()]
