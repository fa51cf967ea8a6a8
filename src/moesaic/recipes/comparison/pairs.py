"""Methods beside each other, document by document: an interval far narrower than that of either.

What a text is like moves the perplexity of all models alike, so that intervals over documents can
overlap where one method is ahead on nearly every document.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations, product
from typing import Any

from moesaic.analysis import Pair
from moesaic.evaluation import QualityConfig
from moesaic.evaluation.intervals import BlockLosses, perplexity_ratio


def paired(lines: Iterable[Mapping[str, Any]], config: QualityConfig) -> list[Pair]:
    """Pair every two methods at the same budget, with the same training.

    Args:
        lines: Results of cells. Those that do not hold what each block lost are left out.
        config: Resamples and seed of the bootstrap.

    Returns:
        For each pair in either order, the lower end of the 95% interval of how much more the one
        loses than the other, the lowest that their seeds give.
    """
    groups: dict[tuple[float, bool], dict[str, list[BlockLosses]]] = {}
    for line in lines:
        if line["status"] == "done" and "losses" in line:
            group = groups.setdefault((line["active"], line["trained"]), {})
            losses = BlockLosses.from_plain(line["losses"])
            group.setdefault(line["method"], []).append(losses)
    return [
        Pair(
            method=ahead,
            other=behind,
            budget=budget,
            trained=trained,
            low=_lowest(group[behind], group[ahead], config),
        )
        for (budget, trained), group in groups.items()
        for ahead, behind in permutations(group, 2)
    ]


def _lowest(
    behind: Sequence[BlockLosses], ahead: Sequence[BlockLosses], config: QualityConfig
) -> float:
    return min(
        perplexity_ratio(more, less, config.resamples, config.seed).low
        for more, less in product(behind, ahead)
    )
