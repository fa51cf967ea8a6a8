"""Hold what was written to what it was made of: logits, then greedy text.

Shapes: B prompts, S positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from moesaic._errors import RunError

# Of the largest logit: two orders of summation in float32 differ by less.
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How near a written model is to the one in memory.

    Attributes:
        difference: Largest difference of a logit, over the largest magnitude of a logit.
        positions: Positions that were compared.
        prompts: Prompts continued greedily.
        agreeing: Prompts whose continuations are the same, token for token.
    """

    difference: float
    positions: int
    prompts: int
    agreeing: int


@torch.no_grad()
def verify(
    written: PreTrainedModel, model: PreTrainedModel, ids_BS: Tensor, *, new_tokens: int = 16
) -> Verification:
    """Compare a written model with the one in memory.

    Args:
        written: Read back.
        model: What it was written from.
        ids_BS: Prompts, [B, S].
        new_tokens: That each prompt is continued by.

    Raises:
        RunError: If logits differ by more than `TOLERANCE`, or greedy text does where no two
            tokens are as likely as each other.
    """
    largest, difference = 0.0, 0.0
    for ids_1S in ids_BS.split(1):
        want_SV = model(input_ids=ids_1S, use_cache=False).logits[0].float()
        got_SV = written(input_ids=ids_1S, use_cache=False).logits[0].float()
        largest = max(largest, float(want_SV.abs().max()))
        difference = max(difference, float((got_SV - want_SV).abs().max()))
    difference /= max(largest, 1e-12)
    if not difference <= TOLERANCE:
        raise RunError(
            f"the exported model's logits differ by {difference:.1e} of the largest, more than "
            f"{TOLERANCE:.0e}, from those of the model in memory, so it was not kept; this is a bug"
        )
    agreeing = 0
    for ids_1S in ids_BS.split(1):
        ours, theirs = (greedy(each, ids_1S, new_tokens) for each in (model, written))
        agreeing += ours == theirs
        if ours != theirs and not _tied(model, ids_1S, ours, theirs, difference * largest):
            raise RunError(
                "the exported model continues a prompt in another way than the model in memory, so "
                "it was not kept; this is a bug"
            )
    return Verification(
        difference=difference,
        positions=ids_BS.numel(),
        prompts=len(ids_BS),
        agreeing=agreeing,
    )


def greedy(model: PreTrainedModel, ids_1S: Tensor, new_tokens: int) -> list[int]:
    """Continue a prompt by the most likely tokens, without stopping at any."""
    make: Any = GenerationConfig
    settings = make(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    generate: Any = model.generate
    out_1S = generate(ids_1S, attention_mask=torch.ones_like(ids_1S), generation_config=settings)
    new: list[int] = out_1S[0, ids_1S.shape[1] :].tolist()
    return new


def _tied(
    model: PreTrainedModel, ids_1S: Tensor, ours: list[int], theirs: list[int], noise: float
) -> bool:
    """Whether the first token that differs was as likely as the other, within the noise."""
    same = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1)
    before_1S = torch.cat([ids_1S, torch.tensor([ours[:same]], dtype=ids_1S.dtype)], dim=1)
    logits_V = model(input_ids=before_1S, use_cache=False).logits[0, -1].float()
    gap = float((logits_V[ours[same]] - logits_V[theirs[same]]).abs())
    return gap <= max(4 * noise, 1e-6)
