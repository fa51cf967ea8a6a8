"""Architectures at equal cost, ranked by what they lose, with how even and how fast they are.

A standing is an architecture over its seeds. One whose counted FLOPs at the measured use are off
the reference by more than `TOLERANCE`, or whose routing sees other tokens when it is measured, is
shown and not ranked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, NamedTuple

from moesaic.analysis import _record
from moesaic.analysis._format import percent

# How far the FLOPs of a token may be from those of the dense model.
TOLERANCE = 0.05
SEES_BATCH = "its routing sees other and later tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaderboard:
    """What is reported.

    Attributes:
        protocol: As plain data; its architectures are listed in its order where nothing ranks them.
        lines: Results, one for each cell.
    """

    protocol: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]


class Spread(NamedTuple):
    """A mean over seeds, and the least and the largest."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one value of each seed."""
        return cls(fmean(values), min(values), max(values))

    def text(self, write: Callable[[float], str] = "{:.3f}".format) -> str:
        """As 1.234 (1.230-1.240); where all seeds have the same 1.234.

        Args:
            write: Writes each of the numbers.
        """
        mean, low, high = map(write, self)
        return mean if low == high else f"{mean} ({low}-{high})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """An architecture over its seeds; means of those that are done, some with their spread.

    Attributes:
        name: Of the architecture.
        status: `done` if a seed is; else `refused`, `error` or `missing`.
        reason: Of a seed that was refused or failed.
        seeds: How many are done.
        loss: On held-out text, nats per token.
        flops: FLOPs of a token at the measured use over the reference.
        why_unranked: Empty if it is ranked.
        router: Registered name; empty for dense networks.
        experts: Routed experts of a layer.
        shared: Neurons that are always on beside them.
        width: Neurons of an expert, or of the dense network.
        experts_used: Routed experts that a token used, mean over layers.
        max_over_mean: Load of the busiest expert over the mean, mean over layers.
        entropy: Of the loads, 1 where they are even, mean over layers.
        dead: Experts without a token, mean over seeds.
        total_experts: Of all layers.
        train_tokens_per_s: While training.
        parameters: All.
        active_parameters: What one token uses.
        curve: Tokens and training loss of the first seed.
        layers: `max_over_mean` of every layer of the first seed.
    """

    name: str
    status: Literal["done", "refused", "error", "missing"]
    reason: str = ""
    seeds: int = 0
    loss: Spread | None = None
    flops: Spread | None = None
    why_unranked: str = ""
    router: str = ""
    experts: int = 0
    shared: int = 0
    width: int = 0
    experts_used: Spread | None = None
    max_over_mean: Spread | None = None
    entropy: Spread | None = None
    dead: float | None = None
    total_experts: int = 0
    train_tokens_per_s: float | None = None
    parameters: float | None = None
    active_parameters: float | None = None
    curve: Sequence[tuple[float, float]] = ()
    layers: Sequence[float] = ()


def standings(board: Leaderboard) -> list[Standing]:
    """Put the lines together: ranked ones first, lowest loss first, then what was not measured.

    Raises:
        InputError: If a line holds a wrong kind of value.
    """
    found = [
        _standing(str(name), [line for line in board.lines if line["architecture"] == name])
        for name in _record.section(board.protocol, "architectures")
    ]
    order = sorted(
        (one for one in found if one.loss is not None),
        key=lambda one: (bool(one.why_unranked), one.loss.value if one.loss else 0.0),
    )
    return [*order, *(one for one in found if one.loss is None)]


def _standing(name: str, lines: Sequence[Mapping[str, Any]]) -> Standing:
    done = [line for line in lines if line["status"] == "done"]
    failed = next((line for line in lines if line["status"] != "done"), None)
    reason = "" if failed is None else str(failed["reason"])
    if not done:
        status: Any = "missing" if failed is None else failed["status"]
        return Standing(name=name, status=status, reason=reason)
    losses = [_number(line, "quality", "loss") for line in done]
    ratios = [_number(line, "flops", "ratio") for line in done]
    first = done[0]
    layer = _record.items(_record.section(first, "config"), "layers")[-1]
    routed = bool(layer["num_experts"])
    curve = [(float(x), float(y)) for x, y in _record.items(first, "curve")]
    balance = _record.section(first, "balance")
    return Standing(
        name=name,
        status="done",
        reason=reason,
        seeds=len(done),
        loss=Spread.of(losses),
        flops=Spread.of(ratios),
        why_unranked=_why_unranked(first, ratios),
        router=layer["router"],
        experts=layer["num_experts"],
        shared=layer["shared_width"] if routed else 0,
        width=layer["width"] if routed else layer["shared_width"],
        experts_used=_spread([fmean(one["experts_used"]) for one in done if one["experts_used"]]),
        max_over_mean=_spread(_values(done, "balance", "max_over_mean")),
        entropy=_spread(_values(done, "balance", "entropy")),
        dead=_mean_of(done, "balance", "dead"),
        total_experts=balance.get("experts", 0),
        train_tokens_per_s=_mean_of(done, "speed", "train_tokens_per_s"),
        parameters=_mean_of(done, "cost", "total_parameters"),
        active_parameters=_mean_of(done, "cost", "active_parameters"),
        curve=curve,
        layers=[one["max_over_mean"] for one in _record.items(balance, "layers")],
    )


def _why_unranked(line: Mapping[str, Any], ratios: Sequence[float]) -> str:
    if line["sees_batch"]:
        return SEES_BATCH
    off = max(ratios, key=lambda ratio: abs(ratio - 1))
    if abs(off - 1) > TOLERANCE:
        return f"it costs {percent(off)} of the FLOPs"
    return ""


def _number(line: Mapping[str, Any], group: str, name: str) -> float:
    value = _record.number(_record.section(line, group), name)
    assert value is not None, "every finished cell has it"
    return value


def _values(lines: Sequence[Mapping[str, Any]], group: str, name: str) -> list[float]:
    values = (_record.number(_record.section(line, group), name) for line in lines)
    return [value for value in values if value is not None]


def _mean_of(lines: Sequence[Mapping[str, Any]], group: str, name: str) -> float | None:
    values = _values(lines, group, name)
    return fmean(values) if values else None


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread.of(values) if values else None


def board_verdicts(board: Leaderboard) -> list[str]:
    """Say who leads, by how much, and what cannot be said."""
    found = standings(board)
    ranked = [one for one in found if one.loss is not None and not one.why_unranked]
    if not ranked:
        return ["No architecture was measured at the cost that was asked for."]
    best = ranked[0]
    assert best.loss is not None
    tokens = _record.section(board.protocol, "train").get("tokens", 0)
    over = f" over {best.seeds} seeds" if best.seeds > 1 else ""
    sentences = [
        f"After {tokens:,} tokens {best.name} has the lowest loss, {best.loss.text()} nats per "
        f"token{over}, of {len(ranked)} at equal FLOPs per token."
    ]
    near = [
        one.name
        for one in ranked[1:]
        if one.loss is not None and one.seeds > 1 and one.loss.low <= best.loss.high
    ]
    if best.seeds == 1:
        sentences.append("It was one seed, so small differences mean nothing.")
    elif near:
        sentences.append(f"The seeds of {', '.join(near)} overlap with it: nothing is settled.")
    most = max(one.seeds for one in ranked)
    if fewer := [f"{one.name} {one.seeds}" for one in ranked if one.seeds < most]:
        sentences.append(f"Not all have {most} seeds: {', '.join(fewer)}.")
    even = min(
        (one for one in found if one.max_over_mean is not None and not one.why_unranked),
        key=lambda one: one.max_over_mean.value if one.max_over_mean else 0.0,
        default=None,
    )
    if even is not None and even.max_over_mean is not None:
        sentences.append(
            f"{even.name} is the most even: its busiest expert has "
            f"{even.max_over_mean.value:.2f} times the mean load."
        )
    sentences += [
        f"{one.name} is not ranked: {one.why_unranked}." for one in found if one.why_unranked
    ]
    return sentences
