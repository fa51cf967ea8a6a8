"""Hold what was written to what it was made of: logits, then greedy text.

Where two experts are as near to being chosen as rounding goes, two orders of summation may choose
either, and everything after is another model's: such positions are left out if they differ, and
counted.

Shapes: B prompts, S positions, V vocabulary, T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from moesaic._errors import RunError
from moesaic._hooks import hooked
from moesaic.nn.layer import moe_layers
from moesaic.nn.routers._base import Router
from moesaic.nn.routing import Routing

# Of the largest logit: two orders of summation in float32 differ by less.
TOLERANCE = 1e-4
# Of the scores of a token, from the highest to the lowest: how far its inputs may move them.
_NOISE = 1e-5
# Part of the positions, and of the continuations, that near ties of experts may change.
_MOST_TIED = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How near a written model is to the one in memory.

    Attributes:
        difference: Largest difference of a logit, over the largest magnitude of a logit.
        positions: Positions that were compared.
        tied: Of which so many differ after a near tie of experts, and count in nothing else.
        prompts: Prompts continued greedily.
        agreeing: Prompts whose continuations are the same, token for token.
    """

    difference: float
    positions: int
    tied: int
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
            tokens are as likely as each other, and no two experts are as near to being chosen.
    """
    largest, away_BS = 1e-12, []
    for ids_1S in ids_BS.split(1):
        want_SV = model(input_ids=ids_1S, use_cache=False).logits[0].float()
        got_SV = written(input_ids=ids_1S, use_cache=False).logits[0].float()
        largest = max(largest, float(want_SV.abs().max()))
        away_BS.append((got_SV - want_SV).abs().amax(1))
    difference, tied = 0.0, 0
    for ids_1S, away_S in zip(ids_BS.split(1), away_BS, strict=True):
        # What is no number is off too.
        off_S = ~(away_S <= TOLERANCE * largest)
        first = int(off_S.int().argmax())
        if off_S.any() and near_ties(model, ids_1S)[: first + 1].any():
            tied += len(away_S) - first
            away_S = away_S[:first]
        difference = max([difference, *away_S.nan_to_num(torch.inf).tolist()])
    difference /= largest
    if not difference <= TOLERANCE or tied > _MOST_TIED * ids_BS.numel():
        difference = float(torch.cat(away_BS).max()) / largest
        raise RunError(
            f"the exported model's logits differ by {difference:.1e} of the largest, more than "
            f"{TOLERANCE:.0e}, from those of the model in memory, so it was not kept; this is a bug"
        )
    agreeing, by_experts = 0, 0
    for ids_1S in ids_BS.split(1):
        ours, theirs = (greedy(each, ids_1S, new_tokens) for each in (model, written))
        agreeing += ours == theirs
        if ours == theirs or _tied(model, ids_1S, ours, theirs, difference * largest):
            continue
        by_experts += 1
        if by_experts > _MOST_TIED * len(ids_BS) or not _parts_by_experts(
            model, ids_1S, ours, theirs
        ):
            raise RunError(
                "the exported model continues a prompt in another way than the model in memory, so "
                "it was not kept; this is a bug"
            )
    return Verification(
        difference=difference,
        positions=ids_BS.numel(),
        tied=tied,
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


@torch.no_grad()
def near_ties(model: PreTrainedModel, ids_1S: Tensor) -> Tensor:
    """Positions at which rounding may decide on an expert of some layer, [S] bool."""
    tied_S = torch.zeros(ids_1S.shape[1], dtype=torch.bool)

    def look(router: Router, _: Any, routing: Routing) -> None:
        tied_S.logical_or_(_is_near(router, routing).cpu())

    routers = [router for layer in moe_layers(model) for router in layer.routers()]
    with hooked(router.register_forward_hook(look) for router in routers):
        model(input_ids=ids_1S, use_cache=False)
    return tied_S


def _is_near(router: Router, routing: Routing) -> Tensor:
    """Whether another expert is as near to being chosen as one that is, [T] bool."""
    choice = router.choice()
    values_TE = routing.scores_TE
    none_T = torch.zeros(len(values_TE), dtype=torch.bool, device=values_TE.device)
    if choice is None or choice.rule not in ("above", "highest"):
        return none_T
    if choice.by_gate or choice.rule == "above":
        values_TE = values_TE.sigmoid()
    if (bias_E := router.score_map().choice_bias) is not None:
        values_TE = values_TE + bias_E
    if choice.rule == "above":
        gap_T = (values_TE - choice.threshold).abs().amin(1)
    elif choice.top_k < values_TE.shape[1]:
        last_T2 = values_TE.topk(choice.top_k + 1, dim=1).values[:, -2:]
        gap_T = last_T2[:, 0] - last_T2[:, 1]
    else:
        return none_T
    span_T = values_TE.amax(1) - values_TE.amin(1)
    last_place = torch.finfo(values_TE.dtype).eps * values_TE.abs().amax(1)
    return gap_T <= 4 * last_place + _NOISE * span_T


def _tied(
    model: PreTrainedModel, ids_1S: Tensor, ours: list[int], theirs: list[int], noise: float
) -> bool:
    """Whether the first token that differs was as likely as the other, within the noise."""
    same = _in_common(ours, theirs)
    before_1S = torch.cat([ids_1S, torch.tensor([ours[:same]], dtype=ids_1S.dtype)], dim=1)
    logits_V = model(input_ids=before_1S, use_cache=False).logits[0, -1].float()
    gap = float((logits_V[ours[same]] - logits_V[theirs[same]]).abs())
    return gap <= max(4 * noise, 1e-6)


def _parts_by_experts(
    model: PreTrainedModel, ids_1S: Tensor, ours: list[int], theirs: list[int]
) -> bool:
    """Whether rounding may have decided on an expert before the first token that differs."""
    same_1N = torch.tensor([ours[: _in_common(ours, theirs)]], dtype=ids_1S.dtype)
    return bool(near_ties(model, torch.cat([ids_1S, same_1N], dim=1)).any())


def _in_common(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first that differs."""
    return next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1)
