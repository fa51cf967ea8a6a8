"""Causal attention whose heads are experts: each sees only the tokens that are routed to it.

Source: Union of Experts, arXiv 2503.02495, SMHA. A head has its own columns of the query, key and
value matrices and its own rows of the output matrix, so attention is the sum of its heads, exactly.
A head's queries, keys and values are those of its own tokens alone.

Where we differ from the released code: rotary positions are those of the text and not of the
tokens left in a head, which loses distances; a head is never filled up with tokens that did not ask
for it; and what a router weighs, the heads weigh (see the router `data-selection`).

Every head is computed for every token and masked: the arithmetic that a head saves is not saved
here.

Shapes: B sequences, S positions, D model width, H heads, P width of one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from moesaic._errors import InputError
from moesaic.nn.routers._base import Router, RouterState

# Rotates the queries and keys [B, H, S, P] of a sequence by their positions.
Rotary = tuple[Tensor, Tensor]


class SelectiveAttention(nn.Module):
    """Attention as a union of heads.

    Args:
        dim: D.
        num_heads: H, which divides D.
        router: Chooses among H experts.

    Attributes:
        qkv_proj: Query, key and value rows of every head, [3, H, P, D].
        o_proj: Output columns of every head, [H, D, P].
    """

    def __init__(self, dim: int, num_heads: int, router: Router) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise InputError(f"num_heads must divide dim={dim}, got {num_heads}; choose a divisor")
        if router.num_experts != num_heads:
            raise InputError(
                f"the router must choose among num_heads={num_heads} experts, got "
                f"{router.num_experts}; make it for as many"
            )
        self.num_heads = num_heads
        self.router = router
        self.qkv_proj = nn.Parameter(torch.empty(3, num_heads, dim // num_heads, dim))
        self.o_proj = nn.Parameter(torch.empty(num_heads, dim, dim // num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small random weights."""
        nn.init.normal_(self.qkv_proj, std=0.02)
        nn.init.normal_(self.o_proj, std=0.02)
        self.router.reset_parameters()

    @torch.no_grad()
    def fill(self, q_MD: Tensor, k_ND: Tensor, v_ND: Tensor, o_DM: Tensor) -> None:
        """Take the heads of a dense attention.

        Args:
            q_MD: Query matrix, out x in; head h has its h-th part of the rows.
            k_ND: Key matrix; with fewer heads each one serves as many neighbouring queries.
            v_ND: Value matrix, as the keys.
            o_DM: Output matrix; head h has its h-th part of the columns.
        """
        head_dim = self.qkv_proj.shape[2]
        for place, matrix in enumerate((q_MD, k_ND, v_ND)):
            heads_HPD = matrix.unflatten(0, (-1, head_dim))
            repeats = self.num_heads // heads_HPD.shape[0]
            self.qkv_proj[place].copy_(heads_HPD.repeat_interleave(repeats, 0))
        self.o_proj.copy_(o_DM.unflatten(1, (self.num_heads, head_dim)).movedim(1, 0))

    def forward(self, h_BSD: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Route the tokens to heads and add up what these give.

        Args:
            h_BSD: Inputs, [B, S, D].
            rotary: Cosines and sines of the positions, [B, S, P] or [1, S, P], as transformers
                gives them; none for no positions.

        Returns:
            [B, S, D] in the dtype of h_BSD.
        """
        num_sequences, length, _ = h_BSD.shape
        routing = self.router(h_BSD.flatten(0, 1), RouterState(num_sequences=num_sequences))
        weights_BSH = routing.weights_TE().unflatten(0, (num_sequences, length))
        active_BHS = routing.active_TE().unflatten(0, (num_sequences, length)).movedim(2, 1)
        q_BHSP, k_BHSP, v_BHSP = torch.einsum("bsd,nhpd->nbhsp", h_BSD, self.qkv_proj)
        if rotary is not None:
            q_BHSP, k_BHSP = (_rotate(x, rotary) for x in (q_BHSP, k_BHSP))
        causal_SS = torch.ones(length, length, dtype=torch.bool, device=h_BSD.device).tril()
        # A token sees itself also where it is off, and weighs nothing there: no row is empty.
        itself_SS = torch.eye(length, dtype=torch.bool, device=h_BSD.device)
        seen_BHSS = causal_SS & (active_BHS.unsqueeze(2) | itself_SS)
        out_BHSP = nnf.scaled_dot_product_attention(q_BHSP, k_BHSP, v_BHSP, attn_mask=seen_BHSS)
        out_BHSP = out_BHSP * weights_BSH.movedim(2, 1).unsqueeze(3).to(out_BHSP.dtype)
        return torch.einsum("bhsp,hdp->bsd", out_BHSP, self.o_proj)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"heads={self.num_heads}"


def _rotate(x_BHSP: Tensor, rotary: Rotary) -> Tensor:
    """Turn pairs of halves by their positions, as Llama does."""
    cos_BSP, sin_BSP = rotary
    first, second = x_BHSP.chunk(2, dim=-1)
    turned_BHSP = torch.cat([-second, first], -1)
    return x_BHSP * cos_BSP.unsqueeze(1) + turned_BHSP * sin_BSP.unsqueeze(1)
