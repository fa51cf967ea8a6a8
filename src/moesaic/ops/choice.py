"""How a router that scores experts by one linear map decides, as data.

Native code routes by it; what a router computes in torch is the specification.

Shapes: D model width, E experts, S >= E scores: those beyond E stand for no expert.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Rule = Literal["above", "highest", "highest-of-each", "cumulated"]
Gate = Literal["sigmoid", "softmax", "one"]
Normalize = Literal["none", "sum", "count"]


class Choice(NamedTuple):
    """Which experts a token uses, and what they weigh, given its scores.

    Attributes:
        rule: `above`: those whose sigmoid exceeds `threshold`. `highest`: the `top_k` highest.
            `highest-of-each`: the `top_k` highest of each group. `cumulated`: by falling
            probability, while the sum of those before does not exceed `threshold`.
        gate: What an expert weighs: the sigmoid of its score, its part of the softmax over all
            scores, or one.
        threshold: See `rule`.
        top_k: See `rule`.
        normalize: `sum` divides the weights of a token by their sum, `count` multiplies them by E
            over their number.
        scale: What every weight is multiplied by.
        by_gate: Whether `highest` compares sigmoids and not scores.
        lowest_first: Whether the lowest of equal experts is chosen; else whichever torch's top-k
            chooses.
        num_groups: Groups of neighbours.
        top_groups: Of `highest`: groups that a token may use, those with the highest sums of their
            best two; as many as `num_groups` for all.
    """

    rule: Rule
    gate: Gate
    threshold: float = 0.0
    top_k: int = 0
    normalize: Normalize = "none"
    scale: float = 1.0
    by_gate: bool = False
    lowest_first: bool = False
    num_groups: int = 1
    top_groups: int = 1


class ScoreMap(NamedTuple):
    """The tensors behind a choice.

    Attributes:
        weight: Linear map of a token to its scores, [S, D].
        bias: Added to the scores, [S], or none.
        choice_bias: Added to what `highest` compares, and to no weight, [S], or none.
        factor: Of the weight of each expert, [E], or none.
    """

    weight: Tensor
    bias: Tensor | None = None
    choice_bias: Tensor | None = None
    factor: Tensor | None = None
