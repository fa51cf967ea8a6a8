"""What losses share: means over the tokens that are not padding, and how uneven experts are.

Shapes: B sequences, S positions, T = B * S tokens, E experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.nn._processes import sum_over_processes
from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Settings of a loss that has none."""


class Passes(NamedTuple):
    """What a loss of the ability `two-passes` is given in the place of a routing.

    Attributes:
        first_TV: Logits of a pass over the text, [T, V].
        second_TV: Those of another pass over the same text, with draws of its own, [T, V].
    """

    first_TV: Tensor
    second_TV: Tensor


def token_mean(values_T: Tensor, mask_BS: Tensor) -> Tensor:
    """Mean of a value per token over unmasked tokens; zero when all are masked."""
    mask_T = mask_BS.flatten().to(values_T.dtype)
    return (values_T * mask_T).sum() / mask_T.sum().clamp(min=1)


def squared_variation(sum_E: Tensor) -> Tensor:
    """Variance over squared mean of one value per expert; zero where all are zero.

    The variance is that of these values, not the estimate for a larger population.
    """
    mean = sum_E.mean()
    return (sum_E - mean).square().mean() / mean.square().clamp(min=1e-10)


def load_and_probability(routing: Routing, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Share of a sequence's tokens that use each expert, and the mean of its softmax.

    Padding counts for nothing; a sequence of padding alone has zeros.

    Args:
        routing: A routing whose scores are softmax logits.
        mask_BS: True where a token is not padding; [1, T] takes all tokens together.

    Returns:
        Load, which has no gradient, and probability, [B, E] each.
    """
    num_sequences = mask_BS.shape[0]
    shape = (num_sequences, mask_BS.numel() // max(1, num_sequences))
    probs_TE = routing.scores_TE[:, : routing.num_experts].softmax(-1)
    mask_BS1 = mask_BS.reshape(*shape, 1).to(probs_TE.dtype)
    load_BSE = routing.active_TE().reshape(*shape, routing.num_experts).to(probs_TE.dtype)
    probs_BSE = probs_TE.reshape(*shape, routing.num_experts)
    num_B1 = mask_BS1.sum(1).clamp(min=1)
    return (load_BSE * mask_BS1).sum(1) / num_B1, (probs_BSE * mask_BS1).sum(1) / num_B1


def shares(load_BE: Tensor) -> Tensor:
    """Divide loads by their sum over experts, [B, E]; where nobody was chosen they stay zero."""
    return load_BE / load_BE.sum(1, keepdim=True).clamp(min=1e-10)


def pooled_load(load_E: Tensor, mask_BS: Tensor) -> Tensor:
    """Turn shares of this process's tokens into shares of the tokens of all processes, [E]."""
    num_tokens = mask_BS.sum().to(load_E.dtype)
    sums = sum_over_processes(torch.cat([load_E * num_tokens, num_tokens.reshape(1)]))
    return sums[:-1] / sums[-1].clamp(min=1)
