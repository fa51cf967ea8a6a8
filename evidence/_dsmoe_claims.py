"""The claims of the DSMoE paper, each held to the numbers of `evidence.dsmoe`.

A number is the mean over seeds; a sentence also says in how many seeds a comparison came out.

Shapes: S seeds, N kinds of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

TARGET = 3
OURS = "straight-through"
Seeds = Sequence[dict[str, Any]]
Verdict = tuple[dict[str, bool], str]


def judge(results: dict[str, Any]) -> Verdict:
    """Say for each claim whether it came out, and with which numbers."""
    holds: dict[str, bool] = {}
    said = []
    for part in (_table_3, _figure_2, _table_1, _table_4, _tables_5_6, _figure_3):
        claims, sentence = part(results["seeds"])
        holds |= claims
        said.append(sentence)
    off = max(abs(p["active"] - p["count"]) for p in _matched(results["seeds"]))
    holds["Every matched count is within 0.05 of the one asked for"] = off <= 0.05
    missed = [claim for claim, true in holds.items() if not true]
    verdict = f"{len(holds) - len(missed)} of {len(holds)} claims came out at this scale"
    verdict += f" (not: {'; '.join(missed)})" if missed else ""
    return holds, f"{verdict}. Losses are in nats per byte of held-out text. {' '.join(said)}"


def matched(seed: dict[str, Any], route: str, count: float = TARGET) -> float:
    """Loss of one way of one seed where its active count is the one asked for."""
    if route == "top-3":
        return float(seed[route]["loss"])
    (point,) = (p for p in seed[route]["counts"] if p["count"] == count)
    return float(point["loss"])


def _matched(seeds: Seeds) -> list[dict[str, float]]:
    return [
        point
        for seed in seeds
        for found in seed.values()
        if isinstance(found, dict)
        for point in found.get("counts", ())
    ]


def _mean(seeds: Seeds, value: Callable[[dict[str, Any]], Any]) -> Any:
    """Mean over seeds of a number, or of each number of a list."""
    mean = np.mean([value(seed) for seed in seeds], axis=0)
    return mean.tolist()


def _wins(seeds: Seeds, better: Callable[[dict[str, Any]], bool]) -> str:
    return f"in {sum(better(seed) for seed in seeds)} of {len(seeds)} seeds"


def _table_3(seeds: Seeds) -> Verdict:
    ours, hard = (_mean(seeds, lambda s, r=r: s[r]["loss"]) for r in (OURS, "hard"))
    ours_on, hard_on = (_mean(seeds, lambda s, r=r: s[r]["active"]) for r in (OURS, "hard"))
    ours_at, hard_at = (_mean(seeds, lambda s, r=r: matched(s, r)) for r in (OURS, "hard"))
    wins = _wins(seeds, lambda s: matched(s, OURS) < matched(s, "hard"))
    return {
        "Table 3, as trained: gates without the straight-through estimator lose more": ours < hard,
        f"Table 3, at {TARGET} of 8: gates without the straight-through estimator lose more": (
            ours_at < hard_at
        ),
    }, (
        f"Table 3: as trained, at a threshold of 0.5, straight-through has {ours:.3f} with "
        f"{ours_on:.2f} of 8 blocks active and gates without it {hard:.3f} with {hard_on:.2f}; "
        f"with the threshold moved to {TARGET} active, {ours_at:.3f} against {hard_at:.3f} "
        f"(lower {wins})."
    )


def _figure_2(seeds: Seeds) -> Verdict:
    counts = [point["count"] for point in seeds[0][OURS]["counts"]]
    gaps = [
        _mean(seeds, lambda s, c=c: matched(s, "soft", c) - matched(s, OURS, c)) for c in counts
    ]
    return {
        "Figure 2: soft gates thresholded at the end lose more at every count": min(gaps) > 0
    }, (
        "Figure 2: soft gates thresholded at the end differ from straight-through by "
        + ", ".join(f"{gap:+.3f} at {count:g}" for gap, count in zip(gaps, counts, strict=True))
        + " active."
    )


def _table_1(seeds: Seeds) -> Verdict:
    ours, top = (_mean(seeds, lambda s, r=r: matched(s, r)) for r in (OURS, "top-3"))
    dense = _mean(seeds, lambda s: s["dense"]["loss"])
    wins = _wins(seeds, lambda s: matched(s, OURS) < matched(s, "top-3"))
    return {f"Table 1: straight-through beats softmax top-{TARGET} at its count": ours < top}, (
        f"Table 1: at {TARGET} active, straight-through {ours:.3f} and softmax top-{TARGET} "
        f"{top:.3f} (straight-through lower {wins}); the dense model with the same training "
        f"{dense:.3f}."
    )


def _table_4(seeds: Seeds) -> Verdict:
    thresholds = [point["threshold"] for point in seeds[0][OURS]["sweep"]]
    active = _mean(seeds, lambda s: [point["active"] for point in s[OURS]["sweep"]])
    losses = _mean(seeds, lambda s: [point["loss"] for point in s[OURS]["sweep"]])
    steps = -np.diff(active)
    one_rate = _mean(seeds, lambda s: [point["active"] for point in s["one rate"]["sweep"]])
    return {
        "Table 4: the count falls by degrees as the threshold rises": bool(
            min(steps) > 0 and max(steps) < 1 and max(active) < 7.5 and min(active) > 0.5
        ),
        "Table 4: the loss rises with the threshold": bool(min(np.diff(losses)) >= 0),
    }, (
        f"Table 4: from a threshold of {thresholds[0]} to {thresholds[-1]} active blocks go from "
        f"{active[0]:.2f} to {active[-1]:.2f} of 8, by {max(steps):.2f} in the largest step, and "
        f"the loss from {losses[0]:.3f} to {losses[-1]:.3f}; with one rate for all weights blocks "
        f"go from {one_rate[0]:.2f} to {one_rate[-1]:.2f}, by {max(-np.diff(one_rate)):.2f}."
    )


def _tables_5_6(seeds: Seeds) -> Verdict:
    tokens = [point["tokens"] for point in seeds[0][OURS]["curve"]]
    losses = _mean(seeds, lambda s: [point["loss"] for point in s[OURS]["curve"]])
    active = _mean(seeds, lambda s: [point["active"] for point in s[OURS]["curve"]])
    falls = int(np.sum(np.diff(losses) < 0))
    return {
        "Tables 5-6: the loss is lower after all tokens than at first": losses[-1] < losses[0]
    }, (
        f"Tables 5-6: from {tokens[0]} to {tokens[-1]} tokens the loss goes from {losses[0]:.3f} "
        f"to {losses[-1]:.3f}, falling in {falls} of {len(losses) - 1} steps, while active blocks "
        f"go from {active[0]:.2f} to {active[-1]:.2f}."
    )


def _figure_3(seeds: Seeds) -> Verdict:
    def per_layer(seed: dict[str, Any]) -> list[float]:
        return np.mean(list(seed[OURS]["layers"].values()), axis=0).tolist()

    layers = _mean(seeds, per_layer)
    names = list(seeds[0][OURS]["layers"])
    counts_SN = np.array([[np.mean(seed[OURS]["layers"][n]) for n in names] for seed in seeds])
    signs = set(np.sign(counts_SN[:, 0] - counts_SN[:, 1]).tolist())
    domains = " and ".join(
        f"{count:.2f} on {name}" for name, count in zip(names, counts_SN.mean(0), strict=True)
    )
    bumps = _wins(seeds, lambda s: has_bump(per_layer(s)))
    return {
        "Figure 3: the first and the last layer use the most blocks": (
            min(layers[0], layers[-1]) > max(layers[1:-1])
        ),
        "Figure 3: between them stands a bump, which makes a W": has_bump(layers),
        "Figure 3: counts differ between kinds of text, the same way in every seed": (
            len(signs) == 1 and signs != {0.0}
        ),
    }, (
        f"Figure 3: active blocks from the first layer to the last are "
        f"{', '.join(f'{count:.2f}' for count in layers)} (a bump {bumps}); {domains}."
    )


def has_bump(layers: Sequence[float]) -> bool:
    """Whether a layer inside uses more blocks than some layer on each side of it, ends left out."""
    return any(
        layers[middle] > max(min(layers[1:middle]), min(layers[middle + 1 : -1]))
        for middle in range(2, len(layers) - 2)
    )
