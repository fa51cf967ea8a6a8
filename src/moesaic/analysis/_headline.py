"""What the numbers say in plain words: what was lost, what was gained, beside static pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.analysis import _record
from moesaic.analysis._format import multiple, percent, whole_percent

# Fractions of the FFN closer than this are called the same.
_SAME_FRACTION = 0.02
_SAME_SIZE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One sentence, and the sentences behind it; an empty text is something not measured."""

    lead: str
    lost: str = ""
    gained: str = ""
    beside_pruning: str = ""


def headline(record: Mapping[str, Any]) -> Headline:
    """Say in plain words what the conversion cost and what it brought.

    A difference inside its interval is called no measurable difference, and a loss to static
    pruning is said as plainly as a win.

    Raises:
        InputError: If the record is of another schema, has no models or holds a wrong kind.
    """
    _record.check_record(record)
    model = _record.main_model(record)
    if model is None:
        names = ", ".join(m["name"] for m in _record.entries(record, "models"))
        return Headline(lead=f"Measured without a converted model: {names}.")
    return Headline(
        lead=_lead(model),
        lost=_lost(record, model),
        gained=_gained(record, model),
        beside_pruning=_beside_pruning(record, model),
    )


def _lead(model: Mapping[str, Any]) -> str:
    fraction = _record.number(_record.section(model, "cost"), "active_ffn_fraction")
    ratio = _record.number(_record.section(model, "quality"), "ratio")
    name = model["name"]
    if fraction is None and ratio is None:
        return f"{name} was measured."
    if fraction is None:
        return f"The held-out perplexity of {name} is {multiple(ratio or 0)} that of dense."
    uses = f"{name} uses {whole_percent(fraction)} of the feed-forward weights for each token"
    if ratio is None:
        return f"{uses}."
    return f"{uses}, and its held-out perplexity is {multiple(ratio)} that of the dense model."


def _bounds(model: Mapping[str, Any]) -> tuple[float, float] | None:
    quality = _record.section(model, "quality")
    low, high = _record.number(quality, "ratio_low"), _record.number(quality, "ratio_high")
    return None if low is None or high is None else (low, high)


def _lost(record: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    ratio = _record.number(_record.section(model, "quality"), "ratio")
    if ratio is None:
        return ""
    bounds = _bounds(model)
    interval = ""
    if bounds is not None:
        interval = f" (interval {_change(bounds[0])} to {_change(bounds[1])})"
        if bounds[0] <= 1 <= bounds[1]:
            return f"No measurable loss: perplexity changes by {_change(ratio)}{interval}."
    if ratio <= 1:
        return f"Nothing: perplexity falls by {whole_percent(1 - ratio)}{interval}."
    return f"Perplexity rises by {whole_percent(ratio - 1)}{interval}{_worst(record, model)}."


def _worst(record: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Name the domain that lost most, where there are several and a parent to compare with."""
    dense = _record.dense_model(record)
    if dense is None:
        return ""
    parent = _record.section(_record.section(dense, "quality"), "domains")
    own = _record.section(_record.section(model, "quality"), "domains")
    ratios = {}
    for name in own:
        before = _record.number(_record.section(parent, name), "perplexity")
        after = _record.number(_record.section(own, name), "perplexity")
        if before and after is not None:
            ratios[name] = after / before
    if len(ratios) < 2:
        return ""
    worst = max(ratios, key=lambda name: ratios[name])
    return f", most on {worst} ({_change(ratios[worst])})"


def _change(ratio: float) -> str:
    sign = "+" if ratio >= 1 else "-"
    return f"{sign}{whole_percent(abs(ratio - 1))}"


def _gained(record: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    dense = _record.dense_model(record)
    fraction = _record.number(_record.section(model, "cost"), "active_ffn_fraction")
    parts = []
    if fraction is not None and fraction < 1:
        parts.append(f"{whole_percent(1 - fraction)} fewer active feed-forward weights")
    if dense is not None:
        for key, what in (("flops_per_token", "FLOPs per token"), ("bytes", "bytes")):
            before = _record.number(_record.section(dense, "cost"), key)
            after = _record.number(_record.section(model, "cost"), key)
            if before and after is not None and abs(after / before - 1) >= _SAME_SIZE:
                word = "fewer" if after < before else "more"
                parts.append(f"{whole_percent(abs(1 - after / before))} {word} {what}")
    saved = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    speeds = [] if dense is None else [_speed(model, dense, p) for p in ("decode", "prefill")]
    speed = " and ".join(part for part in speeds if part)
    text = ". ".join(part for part in (saved, _capital(speed)) if part)
    return f"{_capital(text)}." if text else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _speed(model: Mapping[str, Any], dense: Mapping[str, Any], phase: str) -> str:
    # In the engine if both ran there: whoever asks for speed runs it there.
    in_engine = _record.speed_median(model, phase, "engine_speed") is not None
    runtime = "engine_speed" if in_engine else "speed"
    own, parent = (_record.speed_median(m, phase, runtime) for m in (model, dense))
    if own is None or not parent:
        return ""
    what = {"prefill": "reading a prompt", "decode": "writing text"}[phase]
    times = multiple(own / parent)
    if _speeds_overlap(model, dense, phase, runtime):
        return f"{what} is about as fast as dense ({times})"
    if own < parent:
        return f"{what} is slower, {times} the speed of dense"
    return f"{what} runs at {times} the speed of dense"


def _speeds_overlap(
    model: Mapping[str, Any], dense: Mapping[str, Any], phase: str, runtime: str
) -> bool:
    key = f"{phase}_tokens_per_s"
    one = _record.section(_record.section(model, runtime), key)
    other = _record.section(_record.section(dense, runtime), key)
    low = _record.number(one, "low"), _record.number(other, "low")
    high = _record.number(one, "high"), _record.number(other, "high")
    if low[0] is None or low[1] is None or high[0] is None or high[1] is None:
        return False
    return low[0] <= high[1] and low[1] <= high[0]


def _beside_pruning(record: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    other = _record.matching_baseline(record, model)
    if other is None:
        return ""
    own = _record.number(_record.section(model, "quality"), "ratio")
    theirs = _record.number(_record.section(other, "quality"), "ratio")
    if own is None or theirs is None:
        return ""
    own_fraction = _record.number(_record.section(model, "cost"), "active_ffn_fraction")
    fraction = _record.number(_record.section(other, "cost"), "active_ffn_fraction")
    names = model["name"], other["name"]
    if own == theirs:
        verdict = "both are equal"
    else:
        verdict = f"{names[0] if own < theirs else names[1]} does better"
        bounds, their_bounds = _bounds(model), _bounds(other)
        if (
            bounds
            and their_bounds
            and max(bounds[0], their_bounds[0]) <= min(bounds[1], their_bounds[1])
        ):
            verdict += ", though the intervals overlap"
    compared = (
        f"{names[1]} has {multiple(theirs)} the perplexity of dense, {names[0]} {multiple(own)}: "
        f"{verdict}."
    )
    if fraction is None:
        return compared
    compared = f"At {whole_percent(fraction)} active, {compared}"
    if own_fraction is not None and abs(fraction - own_fraction) > _SAME_FRACTION:
        compared += f" Compare with care: {names[0]} has {percent(own_fraction)} active."
    return compared
