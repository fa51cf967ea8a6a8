"""From gates with a threshold to the same number of blocks for every token.

Ours. Stock software knows a fixed number of experts per token; a DSMoE (arXiv 2502.12455) gives
every token its own. Measured on calibration text, the blocks of every layer that are on most become
its shared part, and of the others the k highest gates are taken. What a gate weighed stays as near
as the router of the target allows:

- `sigmoid-top-k`: gates that weigh keep their value and their factor E over k. Gates that weigh one
  come from scores scaled down to within 2^-7 of zero, whose sigmoid is a half in the same order;
  the factor 2 makes ones of them, and the bias of the gates becomes the bias of the choice.
- `topk-softmax`: for gates that weigh one; scores scaled down as above give every block 1 / k, and
  the factor k goes into the blocks. This router has no bias, so the gates' own is put into the
  router's rows along the direction in which inputs are most nearly constant (least squares).

Shapes: T tokens, N sequences, S positions, D model width, E blocks, F width of one block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic._hooks import hooked
from moesaic._progress import SILENT, Progress
from moesaic.models.export._base import Layout
from moesaic.models.modeling import MoesaicMixin
from moesaic.nn.layer import LayerConfig, MoELayer, moe_layers
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold
from moesaic.nn.routing import Routing

# Scores of gates that weigh one are scaled down below it: gates are then ones to 0.4%.
_SMALL = 2.0**-7
# Of the mean square of the inputs, for the direction in which they are constant.
_RIDGE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class FixK:
    """Settings of the projection.

    Attributes:
        k: Blocks of every token, the shared ones included; the mean that calibration measured,
            rounded, if not given.
        shared: Blocks of every layer that become its shared part, those that are on most. If not
            given, as many as in every layer are on for `always` of the tokens, and one where the
            target needs one.
        always: Share of the tokens from which a block counts as always on, in (0, 1].
    """

    k: int | None = None
    shared: int | None = None
    always: float = 0.99

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise InputError(f"k must be at least 1, got {self.k}; leave it out for the mean")
        if self.shared is not None and self.shared < 0:
            raise InputError(f"shared must be at least 0, got {self.shared}; 1 is usual")
        if not 0.0 < self.always <= 1.0:
            raise InputError(f"always must be in (0, 1], got {self.always}; 0.99 is usual")


@dataclass(slots=True)
class GateUse:
    """How the gates of one layer were used.

    Attributes:
        num_tokens: T.
        on_E: Tokens that each block was on for.
        value_E: Sum of each gate over the tokens that it was on for.
        largest: Largest magnitude of a score without its bias.
        moment_DD: Sum of the outer products of inputs, or nothing.
        sum_D: Sum of inputs, or nothing.
    """

    num_tokens: int
    on_E: Tensor
    value_E: Tensor
    largest: float = 0.0
    moment_DD: Tensor = field(default_factory=lambda: torch.zeros(()))
    sum_D: Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def share_E(self) -> Tensor:
        """Share of the tokens that each block was on for."""
        return self.on_E / self.num_tokens

    @property
    def mean_E(self) -> Tensor:
        """Mean of each gate where it was on; one where it never was."""
        return torch.where(self.on_E > 0, self.value_E / self.on_E.clamp(min=1), 1.0)


@torch.no_grad()
def fix_k(
    model: PreTrainedModel,
    ids_NS: Tensor,
    layout: Layout,
    config: FixK,
    progress: Progress = SILENT,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Give every token the same number of blocks; the model is consumed.

    Args:
        model: With a DSMoE router and no other part in every layer, on, as `obstacle` of the
            format found.
        ids_NS: Calibration text, [N, S].
        layout: What the target's layers look like.
        config: Settings.
        progress: Told of every token.

    Returns:
        The same object in evaluation mode, and what was decided: blocks per token, shared blocks,
        the measured mean of every layer, and layers that became dense.

    Raises:
        InputError: If the settings do not fit the layers, or gates do not depend on the token.
    """
    layers = moe_layers(model.eval())
    absorbs = layout.router == "topk-softmax" and any(
        _router(layer).bias is not None for layer in layers
    )
    uses = measure_gates(model, ids_NS, moments=absorbs, progress=progress)
    num_experts = layers[0].config.num_experts
    means = [float(use.share_E.sum()) for use in uses]
    dense = [layout.dense_layers and mean >= config.always * num_experts for mean in means]
    routed = [index for index, is_dense in enumerate(dense) if not is_dense]
    if not routed:
        raise InputError(
            "every block of every layer is on for every token, so nothing is left to route; lower "
            "active, or export the dense parent"
        )
    shared, k = _sizes(config, layout, [uses[i] for i in routed], [means[i] for i in routed])
    configs = []
    for layer, use, is_dense in zip(layers, uses, dense, strict=True):
        num_shared = num_experts if is_dense else shared
        make_layer(layer, use, layout, num_shared=num_shared, k=k)
        configs.append(to_plain(layer.config))
    model.config.moesaic["layers"] = configs
    model.config.moesaic["losses"] = {}
    # Other weights may be folded into blocks, so that all of them at weight one are no teacher.
    model.config.moesaic["exact"] = False
    assert isinstance(model, MoesaicMixin)
    model.attach_losses()
    return model, {
        "k": k,
        "shared": shared,
        "blocks": num_experts,
        "mean_per_layer": [round(mean, 3) for mean in means],
        "dense_layers": [index for index, is_dense in enumerate(dense) if is_dense],
    }


def _sizes(
    config: FixK, layout: Layout, uses: list[GateUse], means: list[float]
) -> tuple[int, int]:
    """Decide on shared blocks and on blocks per token; all layers have the same."""
    num_experts = len(uses[0].on_E)
    k = config.k
    if k is None:
        k = max(1 + layout.min_shared, round(sum(means) / len(means)))
    # What routes needs two blocks to choose from, and one of them for every token.
    most = min(k - 1, num_experts - 2)
    if layout.max_shared is not None:
        most = min(most, layout.max_shared)
    if not layout.min_shared < k <= num_experts or most < layout.min_shared:
        raise InputError(
            f"k must be in [{layout.min_shared + 1}, {num_experts}] for {num_experts} blocks of "
            f"which {layout.min_shared} are shared, got {k}; change it or convert with more experts"
        )
    if config.shared is not None:
        if not layout.min_shared <= config.shared <= most:
            raise InputError(
                f"shared must be in [{layout.min_shared}, {most}] for this target with k={k} of "
                f"{num_experts} blocks, got {config.shared}; change it or choose another target"
            )
        return config.shared, k
    always = min(int((use.share_E >= config.always).sum()) for use in uses)
    return min(max(always, layout.min_shared), most), k


@torch.no_grad()
def measure_gates(
    model: PreTrainedModel, ids_NS: Tensor, *, moments: bool, progress: Progress = SILENT
) -> list[GateUse]:
    """Read text and count how the gates of every layer are used.

    Args:
        model: With a DSMoE router in every layer.
        ids_NS: Text, [N, S].
        moments: Whether the second moments of the inputs are summed too, D * D floats a layer.
        progress: Told of every token.
    """
    layers = moe_layers(model)
    uses = []
    for layer in layers:
        zeros_E = torch.zeros(layer.config.num_experts, dtype=torch.float64)
        uses.append(GateUse(0, zeros_E, zeros_E.clone()))
    stage_of = progress.stage("gates", ids_NS.numel(), "tokens")
    handles = [
        _router(layer).register_forward_hook(partial(_count, use, moments))
        for layer, use in zip(layers, uses, strict=True)
    ]
    with hooked(handles), stage_of as stage:
        for ids_BS in ids_NS.split(2):
            model(input_ids=ids_BS.to(model.device), use_cache=False, logits_to_keep=1)
            stage.advance(ids_BS.numel())
    return uses


def _count(
    use: GateUse, moments: bool, router: nn.Module, args: tuple[Any, ...], routing: Routing
) -> None:
    """Hook behind a router."""
    assert isinstance(router, SigmoidThreshold)
    h_TD = args[0].float()
    on_TE = routing.active_TE()
    use.num_tokens += len(h_TD)
    use.on_E += on_TE.sum(0).cpu()
    use.value_E += (routing.scores_TE.sigmoid() * on_TE).sum(0).double().cpu()
    bare_TE = routing.scores_TE if router.bias is None else routing.scores_TE - router.bias.float()
    use.largest = max(use.largest, float(bare_TE.abs().max()))
    if moments:
        use.moment_DD = use.moment_DD + (h_TD.T @ h_TD).cpu()
        use.sum_D = use.sum_D + h_TD.sum(0).cpu()


def _router(layer: MoELayer) -> SigmoidThreshold:
    assert isinstance(layer.router, SigmoidThreshold)
    return layer.router


def constant_direction(moment_DD: Tensor, mean_D: Tensor) -> Tensor:
    """The direction u whose product with an input is nearest to one: ridge regression, [D].

    Args:
        moment_DD: Mean outer product of the inputs.
        mean_D: Mean of the inputs.
    """
    moment_DD, mean_D = moment_DD.double(), mean_D.double()
    ridge_D = _RIDGE * moment_DD.diagonal().mean() * torch.ones_like(mean_D)
    u_D: Tensor = torch.linalg.solve(moment_DD + torch.diag(ridge_D), mean_D)
    return u_D


def make_layer(layer: MoELayer, use: GateUse, layout: Layout, *, num_shared: int, k: int) -> None:
    """Turn one layer, in place, into one of a fixed number of blocks.

    Args:
        layer: With a DSMoE router.
        use: How its gates were used.
        layout: What it is to look like.
        num_shared: Blocks that become its shared part; all of them for a layer without a router.
        k: Blocks of every token, the shared ones included.
    """
    router, config = _router(layer), layer.config
    assert layer.experts is not None
    weights = layer.experts.weights()
    num_experts = config.num_experts
    order_E = use.share_E.argsort(descending=True, stable=True)
    shared, routed = order_E[:num_shared], order_E[num_shared:].sort().values
    dense = not len(routed)
    base = num_experts / k if router.config.normalize == "count" and not dense else 1.0
    values: dict[str, Any] = {}
    scale = base
    new: Mapping[str, Tensor] = {}
    if not dense:
        options, new, scale = _new_router(router, use, layout, routed, k=k - num_shared, base=base)
        values = {"router": layout.router, "router_options": options}
    made = MoELayer(
        layer.dim,
        LayerConfig(
            num_experts=len(routed),
            width=config.width if len(routed) else 0,
            shared_width=num_shared * config.width,
            activation=config.activation,
            experts=config.experts,
            **values,
        ),
    ).to(weights.up.device, weights.up.dtype)
    if made.shared is not None:
        each_E = use.mean_E if router.config.value == "gate" else torch.ones(num_experts)
        factor_E = (base * each_E).to(weights.down)
        part = made.shared.weights()
        gate_SFD, up_SFD = weights.up[shared].chunk(2, dim=1)
        part.up[0].copy_(torch.cat([gate_SFD.flatten(0, 1), up_SFD.flatten(0, 1)]))
        down_SDF = weights.down[shared] * factor_E[shared, None, None]
        part.down[0].copy_(down_SDF.transpose(0, 1).flatten(1))
    if made.experts is not None and made.router is not None:
        part = made.experts.weights()
        part.up.copy_(weights.up[routed])
        part.down.copy_(weights.down[routed] * scale)
        made.router.load_state_dict(new)
    _become(layer, made)


def _new_router(
    router: SigmoidThreshold,
    use: GateUse,
    layout: Layout,
    routed: Tensor,
    *,
    k: int,
    base: float,
) -> tuple[dict[str, Any], Mapping[str, Tensor], float]:
    """Settings and tensors of the new router, and the factor that its blocks take.

    Args:
        router: The old one.
        use: How it was used.
        layout: Names the new one.
        routed: Blocks that it routes.
        k: Of which it chooses so many.
        base: What an active block of weight one weighs.
    """
    weight_ED = router.map_ED().detach().float()[routed]
    bias_E = torch.zeros(len(routed)) if router.bias is None else router.bias.float()[routed]
    if k < len(routed) and not bool(weight_ED.any()):
        raise InputError(
            "the gates do not depend on the token, so no k of them can be chosen; convert with "
            "init 'gram' or train first"
        )
    if layout.router == "sigmoid-top-k" and router.config.value == "gate":
        assert router.bias is None, "the format refuses such gates"
        weights = {"weight": weight_ED, "choice_bias": torch.zeros(len(routed))}
        return {"top_k": k, "scale": base}, weights, 1.0
    if layout.router == "sigmoid-top-k":
        small = _power_of_two(_SMALL / max(use.largest, 1e-6))
        # The slope of the sigmoid at zero is a quarter.
        weights = {"weight": small * weight_ED, "choice_bias": small / 4 * bias_E}
        return {"top_k": k, "scale": 2 * base}, weights, 1.0
    # What all blocks have in common decides nothing.
    bias_E = bias_E - bias_E.mean()
    if router.bias is not None:
        mean_D = use.sum_D / use.num_tokens
        u_D = constant_direction(use.moment_DD / use.num_tokens, mean_D).float()
        weight_ED = weight_ED + bias_E[:, None] * u_D
    bound = use.largest + 2 * float(bias_E.abs().max())
    small = _power_of_two(_SMALL / max(bound, 1e-6))
    return {"top_k": k, "renormalize": True}, {"weight": small * weight_ED}, base * k


def _power_of_two(value: float) -> float:
    """The largest power of two up to a value: multiplying by it rounds nothing."""
    return 2.0 ** math.floor(math.log2(value))


def _become(layer: MoELayer, made: MoELayer) -> None:
    """Give one layer the parts of another, so that nobody who holds it holds the old one."""
    layer.config = made.config
    layer.router, layer.experts, layer.shared = made.router, made.experts, made.shared
    layer.eval()
