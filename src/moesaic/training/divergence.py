"""How far a model is from its teacher: in its logits, and in its hidden states on the way.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Rows worked on at a time: two matrices of this many rows are all that is added.
_CHUNK = 128


class _Divergence(torch.autograd.Function):
    """Mean over tokens of KL(teacher || student); its gradient is known at once."""

    @staticmethod
    def forward(ctx: Any, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        grad_TV = torch.empty_like(student_TV) if student_TV.requires_grad else None
        total = torch.zeros((), device=student_TV.device, dtype=torch.float64)
        for start in range(0, len(student_TV), _CHUNK):
            rows = slice(start, start + _CHUNK)
            log_s = student_TV[rows].float().log_softmax(-1)
            log_t = teacher_TV[rows].float().log_softmax(-1)
            p_t = log_t.exp()
            total += (p_t * (log_t - log_s)).sum().double()
            if grad_TV is not None:
                grad_TV[rows] = (log_s.exp_() - p_t).div_(len(student_TV)).to(grad_TV.dtype)
        ctx.grad_TV = grad_TV
        return (total / max(1, len(student_TV))).float()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.grad_TV * grads[0].to(ctx.grad_TV.dtype), None


def divergence(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student), in nats.

    Args:
        student_TV: Logits that learn, [T, V].
        teacher_TV: Logits to match, [T, V]; they get no gradient.

    Returns:
        A scalar in float32.
    """
    out: Tensor = _Divergence.apply(student_TV, teacher_TV)
    return out


def mismatch(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared difference of hidden states over the square of the teacher's.

    Relative for each token, since a few tokens have states hundreds of times as long as the rest.

    Args:
        student: After every layer, [B, S, D]; they learn.
        teacher: To match, [B, S, D].

    Returns:
        Mean over layers and tokens, a scalar in float32.
    """
    terms = []
    for ours_BSD, theirs_BSD in zip(student, teacher, strict=True):
        theirs = theirs_BSD.float()
        energy_BS = theirs.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        terms.append(((ours_BSD.float() - theirs).square().sum(-1) / energy_BS).mean())
    return torch.stack(terms).mean()
