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
        lines: Results of cells. A method whose lines do not all hold what each block lost is left
            out of its budget.
        config: Resamples and seed of the bootstrap.

    Returns:
        For each pair in either order, the lower end of the 95% interval of how much more the one
        loses than the other, the lowest that their seeds give.
    """
    seeds: dict[tuple[float, bool], dict[str, list[Mapping[str, Any]]]] = {}
    for line in lines:
        if line["status"] == "done":
            group = seeds.setdefault((line["active"], line["trained"]), {})
            group.setdefault(line["method"], []).append(line)
    pairs = []
    for (budget, trained), group in seeds.items():
        losses = {
            method: [BlockLosses.from_plain(line["losses"]) for line in done]
            for method, done in group.items()
            if all("losses" in line for line in done)
        }
        pairs += [
            Pair(
                method=ahead,
                other=behind,
                budget=budget,
                trained=trained,
                low=_lowest(losses[behind], losses[ahead], config),
            )
            for ahead, behind in permutations(losses, 2)
        ]
    return pairs


def _lowest(
    behind: Sequence[BlockLosses], ahead: Sequence[BlockLosses], config: QualityConfig
) -> float:
    return min(
        perplexity_ratio(more, less, config.resamples, config.seed).low
        for more, less in product(behind, ahead)
    )
