"""An MoE layer of ours in vLLM: our router and bypass around vLLM's fused experts.

The fused experts take the same number of slots for every token. A token that uses fewer blocks
fills the others with blocks that it does not use, at weight 0: exact, and nothing saved for them.

The routing reaches vLLM as the weights of all blocks, [T, E], in the place of its router's logits,
so that every router of ours works and tokens may be gathered from other processes on the way.

Parallel plans: experts are split by their neurons (tensor parallel) or among processes (expert
parallel, `--enable-expert-parallel`), the shared part by its neurons; router, bypass and the bias
of the output are everywhere.

Shapes: T tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.platforms import current_platform

from moesaic.nn.bypass import Bypass
from moesaic.nn.layer import LayerConfig
from moesaic.nn.routers._base import Router
from moesaic.serving.vllm.obstacles import make_router
from moesaic.serving.vllm.slots import SlotRouting, num_slots


class SharedNetwork(nn.Module):
    """The part of a layer that is always on.

    Args:
        dim: D.
        width: Its neurons.
        reduce: Whether its parts are summed over processes here, not with the experts.
        quant_config: Of vLLM.
        prefix: Of its names.
    """

    def __init__(
        self, dim: int, width: int, *, reduce: bool, quant_config: Any, prefix: str
    ) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            dim,
            [width, width],
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            width,
            dim,
            bias=False,
            quant_config=quant_config,
            reduce_results=reduce,
            prefix=f"{prefix}.down_proj",
        )
        self.act = SiluAndMul()

    def forward(self, h_TD: Tensor) -> Tensor:
        """Compute the network, [T, D]."""
        gate_up, _ = self.gate_up_proj(h_TD)
        out_TD: Tensor = self.down_proj(self.act(gate_up))[0]
        return out_TD

    def load(self, name: str, tensor_1: Tensor) -> str:
        """Load a tensor of our checkpoint, which has one expert; gives the parameter's name."""
        module: Any = getattr(self, name)
        if name == "down_proj":
            module.weight.weight_loader(module.weight, tensor_1[0])
        else:
            for shard, part in enumerate(tensor_1[0].chunk(2)):
                module.weight.weight_loader(module.weight, part, shard)
        return f"{name}.weight"


class FusedMoELayer(nn.Module):
    """One layer of a converted model.

    Args:
        dim: D.
        config: The layer as data, without an obstacle.
        quant_config: Of vLLM.
        prefix: Of its names.
    """

    def __init__(self, dim: int, config: LayerConfig, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.dim = dim
        self.router: Router | None = None
        self.shared: SharedNetwork | None = None
        self.experts: Any = None
        if config.shared_width:
            self.shared = SharedNetwork(
                dim,
                config.shared_width,
                reduce=not config.num_experts,
                quant_config=quant_config,
                prefix=f"{prefix}.shared",
            )
        if config.num_experts:
            self.router = make_router(config, dim)
            routing = SlotRouting()
            self.experts = FusedMoEFactory(
                num_experts=config.num_experts,
                top_k=num_slots(self.router, dim),
                hidden_size=dim,
                intermediate_size=config.width,
                renormalize=False,
                quant_config=quant_config,
                prefix=f"{prefix}.experts",
                custom_routing_function=routing,
                router_logits_dtype=torch.float32,
                shared_experts=self.shared,
            )
            # vLLM's kernels for CPUs take every id for a place in their own process.
            if current_platform.is_cpu() and self.experts.expert_map is not None:
                routing.hold(self.experts.expert_map)
        self.bypass: Bypass | None = None
        if config.bypass_rank:
            self.bypass = Bypass(dim, config.bypass_rank).requires_grad_(False)
        self.output_bias: nn.Parameter | None = None
        if config.output_bias:
            self.output_bias = nn.Parameter(torch.zeros(dim), requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        """Compute `MoELayer.forward`, [..., D] to [..., D]."""
        h_TD = h.view(-1, self.dim)
        # First, because vLLM's experts may write into their input.
        beside_TD = None if self.bypass is None else self.bypass(h_TD)
        out_TD: Tensor
        if self.router is not None:
            weights_TE = self.router(h_TD).weights_TE().float()
            out_TD = self.experts(h_TD, weights_TE)
        elif self.shared is not None:
            out_TD = self.shared(h_TD)
        else:
            out_TD = torch.zeros_like(h_TD)
        if self.output_bias is not None:
            out_TD = out_TD + self.output_bias
        if beside_TD is not None:
            out_TD = out_TD + beside_TD
        return out_TD.view(h.shape)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Load tensors of our checkpoint; gives the names of the parameters that hold them."""
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, tensor in weights:
            part, _, rest = name.partition(".")
            if part == "experts":
                for each in self.experts.load_weights([(rest, tensor)]):
                    yield f"experts.{each}"
            elif part == "shared":
                assert self.shared is not None
                yield f"shared.{self.shared.load(rest, tensor)}"
            else:
                own[name].data.copy_(tensor)
                yield name
