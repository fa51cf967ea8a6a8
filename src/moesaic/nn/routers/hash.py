"""The experts of a token follow from its id alone, by a table that is drawn and never learned.

Source: "Hash Layers For Large Sparse Models", arXiv 2106.04426, section 3.2, random hash: each
entry of the vocabulary has a random expert, which weighs one. Here every expert gets equally many
entries, within one, and with k experts per token they differ and weigh 1 / k. Left out: tables from
token frequencies or clusters, and hashes of several tokens.

It shows what a learned router has to beat. How even loads are depends on how often tokens occur.

Shapes: T tokens, D model width, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.routers._base import Router, RouterState, check_top_k
from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class HashConfig:
    """Settings of the router.

    Attributes:
        vocab_size: V, of the model.
        top_k: Experts per token; the paper uses 1.
        seed: Of the table. Layers with different seeds group tokens differently.
    """

    vocab_size: int = 257
    top_k: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise InputError(
                f"vocab_size must be at least 1, got {self.vocab_size}; give that of the model"
            )
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; choose 1 to num_experts")
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, got {self.seed}; any other draws a table")


class Hash(Router):
    """A fixed table from tokens to experts.

    Args:
        dim: D, which plays no part.
        num_experts: E.
        config: Settings.

    Attributes:
        table_VK: Experts of every token, [V, K] int64; part of the checkpoint.
    """

    table_VK: Tensor
    needs_tokens = True

    def __init__(self, dim: int, num_experts: int, config: HashConfig) -> None:
        check_top_k(config.top_k, num_experts)
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        empty_VK = torch.empty(config.vocab_size, config.top_k, dtype=torch.int64)
        self.register_buffer("table_VK", empty_VK)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table of the seed."""
        draw = torch.Generator().manual_seed(self.config.seed)
        rank_V = torch.randperm(self.config.vocab_size, generator=draw)
        # Neighbours of a first expert that is dealt out in turn: distinct, and as even as it is.
        slots_K = torch.arange(self.config.top_k)
        table_VK = (rank_V.unsqueeze(1) + slots_K) % self.num_experts
        self.table_VK.copy_(table_VK.to(self.table_VK.device))

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Look the experts up.

        Args:
            h_TD: Inputs, [T, D], of which only the count matters.
            state: Holds the token ids.

        Returns:
            K = top_k slots of weight 1 / k; scores are one for an expert that was chosen and zero
            for the others.

        Raises:
            InputError: If the token ids are not there, or one lies outside of the table.
        """
        tokens_T = None if state is None else state.tokens_T
        if tokens_T is None or tokens_T.shape[0] != h_TD.shape[0]:
            given = "none" if tokens_T is None else f"those of {tokens_T.shape[0]}"
            raise InputError(
                f"router hash needs the token ids of {h_TD.shape[0]} tokens, got {given}; give the "
                "model input_ids and not inputs_embeds, run layers inside "
                "moesaic.nn.layer.pass_state, and train without gradient checkpointing"
            )
        if tokens_T.numel() and int(tokens_T.max()) >= self.config.vocab_size:
            raise InputError(
                f"vocab_size must be above every token id, got {self.config.vocab_size} and token "
                f"{int(tokens_T.max())}; give the router the vocab_size of the model"
            )
        ids_TK = self.table_VK[tokens_T]
        dtype = torch.promote_types(h_TD.dtype, torch.float32)
        weights_TK = torch.full_like(ids_TK, 1 / self.config.top_k, dtype=dtype)
        zeros_TE = torch.zeros(ids_TK.shape[0], self.num_experts, dtype=dtype, device=h_TD.device)
        return Routing(ids_TK, weights_TK, zeros_TE.scatter(1, ids_TK, 1.0), self.num_experts)

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, top_k={self.config.top_k}, "
            f"vocab_size={self.config.vocab_size}, seed={self.config.seed}"
        )
