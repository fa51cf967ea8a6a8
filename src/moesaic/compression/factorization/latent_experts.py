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

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic._files import atomic_write
from moesaic._progress import SILENT, Progress
from moesaic.calibration.stats import CalibrationStats
from moesaic.nn.experts._base import Experts
from moesaic.nn.experts.latent import LatentExpertsConfig, LatentGatedExperts
from moesaic.nn.layer import link_layers, moe_layers

_ERRORS = ("rank_error", "joint_error", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentExperts:
    """Settings of the factorisation.

    Attributes:
        group_size: N, neighbouring experts that share a projection; it divides E. More share more
            and fit worse.
        latent_width: M, at most D; 0 is the width of an expert, which the paper uses.
        rank: To which each matrix is cut first, the first phase of the paper; 0 leaves it whole.
    """

    group_size: int = 2
    latent_width: int = 0
    rank: int = 0

    def __post_init__(self) -> None:
        LatentExpertsConfig(group_size=self.group_size, latent_width=self.latent_width)
        if self.rank < 0:
            raise InputError(f"rank must be at least 0, got {self.rank}; 0 cuts nothing")

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that these settings need: none."""
        return ()

    def check_model(self, config: Any) -> None:
        """Refuse a model without experts, or whose experts these settings do not fit.

        Args:
            config: Of the model.
        """
        layers = getattr(config, "moesaic", {}).get("layers", ())
        routed = [layer for layer in layers if layer["num_experts"]]
        if not routed:
            raise InputError(
                f"a model of type {config.model_type} has no experts to factorise; convert it first"
            )
        for layer in routed:
            self.check_sizes(config.hidden_size, layer["width"], layer["num_experts"])

    def check_sizes(self, dim: int, width: int, num_experts: int) -> None:
        """Refuse experts of a size that these settings do not fit.

        Args:
            dim: D.
            width: F.
            num_experts: E.
        """
        latent = self.latent_width or width
        if num_experts % self.group_size:
            raise InputError(
                f"group_size must divide num_experts={num_experts}, got {self.group_size}; "
                "choose a divisor"
            )
        if latent > dim:
            raise InputError(f"latent_width must be in [1, dim={dim}], got {latent}; lower it")
        if self.rank > min(width, dim):
            raise InputError(
                f"rank must be in [0, {min(width, dim)}], got {self.rank}; 0 cuts nothing"
            )


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
    experts: Experts, config: LatentExperts
) -> tuple[LatentGatedExperts, dict[str, float]]:
    """Bring gated experts into latent form.

    Args:
        experts: Gated experts; they stay as they are.
        config: Settings.

    Returns:
        The latent experts, in the dtype of the others, and the squared errors of gate and up
        together, `rank_error`, `joint_error` and `error`, over the squared size of the matrices.

    Raises:
        InputError: If the experts are not gated, or the settings do not fit them.
    """
    _check_gated(experts)
    weights = experts.weights()
    _, dim, width = weights.down.shape
    config.check_sizes(dim, width, experts.num_experts)
    made = _empty(experts, config)
    gate_up = weights.up.unflatten(1, (2, width))
    errors = dict.fromkeys(_ERRORS, 0.0)
    for place in range(2):
        latent = config.latent_width or width
        found = factorise(gate_up[:, place], config.group_size, latent, config.rank)
        made.gate_up_common[:, place].copy_(found.common)
        made.gate_up_private[:, place].copy_(found.private)
        for name in _ERRORS:
            errors[name] += getattr(found, name)
    made.down_proj.copy_(weights.down)
    for mine, theirs in (
        (made.gate_up_proj_bias, weights.up_bias),
        (made.down_proj_bias, weights.down_bias),
    ):
        if mine is not None and theirs is not None:
            mine.copy_(theirs)
    size = float(weights.up.double().square().sum())
    return made, {name: error / size for name, error in errors.items()}


def _empty(experts: Experts, config: LatentExperts) -> LatentGatedExperts:
    """Latent experts of the size of others, to be filled."""
    weights = experts.weights()
    num_experts, dim, width = weights.down.shape
    settings = LatentExpertsConfig(
        activation=weights.activation,
        bias=weights.up_bias is not None,
        down_bias=weights.down_bias is not None,
        group_size=config.group_size,
        latent_width=config.latent_width,
    )
    return LatentGatedExperts(dim, num_experts, width, settings).to(weights.down)


def _check_gated(experts: Experts | None) -> None:
    kind = type(experts).__name__
    if isinstance(experts, LatentGatedExperts):
        raise InputError(f"{kind} are latent already; give the model that they were made of")
    weights = None if experts is None else experts.weights()
    if weights is None or not weights.gated or weights.glu is not None:
        raise InputError(
            f"latent experts are made of gated ones, got {kind}; convert with gated experts"
        )


@torch.no_grad()
def factorise_experts(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: LatentExperts,
    *,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Bring all experts of a mixture into latent form, in place.

    Args:
        model: A mixture of ours; its routers and what is always on stay as they are.
        stats: Nothing is measured; none.
        config: Settings.
        store: Directory for finished layers; an interrupted run goes on after them.
        progress: Told of every layer.

    Returns:
        The same model in evaluation mode, and what came out: the squared errors of gate and up
        over the squared size of the matrices, means over layers (`rank_error` of the first phase,
        `joint_error` of the second, `error` of both), and `weights`, the parameters of the experts
        over those before.

    Raises:
        InputError: Before the model is touched, if it has no experts or the settings do not fit.
    """
    config.check_model(model.config)
    routed = [layer for layer in moe_layers(model) if layer.experts is not None]
    for layer in routed:
        _check_gated(layer.experts)
    options = {"group_size": config.group_size, "latent_width": config.latent_width}
    before = sum(_num_parameters(layer.experts) for layer in routed)
    errors = []
    with progress.stage("factorise", len(routed), "layers") as stage:
        for place, layer in enumerate(moe_layers(model)):
            if layer.experts is None:
                continue
            made, found = _made_or_read(layer.experts, config, store, place)
            layer.experts = made
            layer.config = replace(layer.config, experts="latent-gated", experts_options=options)
            model.config.moesaic["layers"][place] = to_plain(layer.config)
            errors.append(found)
            stage.advance()
    # Layers that reuse the experts of others hold on to them.
    link_layers(model)
    # All experts on is no longer the dense parent.
    model.config.moesaic["exact"] = False
    means = {name: sum(found[name] for found in errors) / len(errors) for name in _ERRORS}
    after = sum(_num_parameters(layer.experts) for layer in routed)
    return model.eval(), {**means, "weights": after / before}


def _made_or_read(
    experts: Experts, config: LatentExperts, store: Path | None, place: int
) -> tuple[LatentGatedExperts, dict[str, float]]:
    """Factorise the experts of one layer, or read what an interrupted run left."""
    file = None if store is None else store / f"layer_{place:03d}.safetensors"
    if file is not None and file.is_file():
        tensors = load_file(file)
        found = dict(zip(_ERRORS, tensors.pop("errors").tolist(), strict=True))
        made = _empty(experts, config)
        made.load_state_dict(tensors)
        return made, found
    made, found = latent_experts(experts, config)
    if file is not None:
        errors = torch.tensor([found[name] for name in _ERRORS], dtype=torch.float64)
        with atomic_write(file) as temporary:
            save_file({**made.state_dict(), "errors": errors}, temporary)
    return made, found


def _num_parameters(experts: Experts | None) -> int:
    return 0 if experts is None else sum(p.numel() for p in experts.parameters())
