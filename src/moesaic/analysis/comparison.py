"""A comparison of methods in words: who is best at which budget, and how surely.

An entry is a method at a budget, over its seeds: the ratio of perplexities is their geometric mean,
and its interval reaches from the lowest to the highest end of theirs, so that it holds what both
the choice of text and the seed can change. An entry whose measured active fraction is off its
budget is shown and not ranked: at more weights any method looks better. Bounds know what no method
can know, so they stand apart and never win.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from moesaic.analysis import _record
from moesaic.analysis._format import multiple, percent, significant

if TYPE_CHECKING:
    from moesaic.analysis.suggestion import Prediction

# The questions of all files together.
ALL = "all"
NOTHING = "No cell was measured yet."
# How far a measured fraction may be from its budget.
TOLERANCE = 0.02
_ROUNDING = 1e-9
BOUND = "bound"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two methods at one budget, on the same documents.

    Attributes:
        method: The one.
        other: The other.
        budget: The requested active fraction of both.
        trained: Whether both were trained.
        low: Lower end of the 95% interval of the other's perplexity over that of the one.
    """

    method: str
    other: str
    budget: float
    trained: bool
    low: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is reported.

    Attributes:
        protocol: As plain data; its order of methods and budgets is that of the tables.
        dense: Record of the dense parent; none if it was not measured.
        predictions: Of cells without training, from short trials.
        lines: Results, one for each cell.
        pairs: Methods on the same documents.
    """

    protocol: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    pairs: Sequence[Pair] = ()
    dense: Mapping[str, Any] | None = None
    predictions: Sequence[Prediction] = ()


class Accuracy(NamedTuple):
    """Part of some questions that were answered rightly, with its interval."""

    value: float
    low: float
    high: float

    def interval(self) -> str:
        """As 40.1%-59.9%."""
        return f"{percent(self.low)}-{percent(self.high)}"

    def text(self) -> str:
        """As 50.0% (40.1%-59.9%)."""
        return f"{percent(self.value)} ({self.interval()})"


class Ratio(NamedTuple):
    """Perplexity over the dense parent's, with its interval."""

    value: float
    low: float
    high: float

    def interval(self) -> str:
        """As 1.20-1.26."""
        return f"{_bare(self.low)}-{_bare(self.high)}"

    def text(self) -> str:
        """As 1.23 (1.20-1.26)."""
        return f"{_bare(self.value)} ({self.interval()})"


def _bare(ratio: float) -> str:
    return multiple(ratio).removesuffix("x")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A method at a budget, trained or not, over its seeds.

    Attributes:
        method: Its name.
        kind: `convert`, `compress` or `bound`.
        static: Whether the same weights serve every token.
        budget: The requested active fraction.
        trained: Whether it was trained.
        status: `done` if a seed is; else `refused`, `error` or `missing`.
        reason: Of a seed that was refused or failed.
        seeds: How many are done.
        ratio: Over the dense parent.
        active: The measured active fraction, mean over seeds.
        on_budget: Whether every seed met its budget.
        domains: Perplexities.
        active_parameters: What one token uses of the whole model, mean over seeds.
        seconds: Of conversion, training and evaluation, mean over seeds.
        peak_bytes: The largest of the seeds.
        accuracy: By file of questions: the mean over seeds, and the widest interval of theirs.
        beats: By method that was paired with it, whether it is ahead on the same documents.
    """

    method: str
    kind: str
    static: bool
    budget: float
    trained: bool
    status: Literal["done", "refused", "error", "missing"]
    reason: str = ""
    seeds: int = 0
    ratio: Ratio | None = None
    active: float | None = None
    on_budget: bool = False
    domains: Mapping[str, float] | None = None
    active_parameters: float | None = None
    seconds: Mapping[str, float] | None = None
    peak_bytes: float | None = None
    accuracy: Mapping[str, Accuracy] | None = None
    beats: Mapping[str, bool] = field(default_factory=dict)


def entries(comparison: Comparison) -> list[Entry]:
    """Put the lines of a comparison together, in the order of the protocol.

    Returns:
        What was asked for, those without training first, whether or not it has a line.

    Raises:
        InputError: If a line holds a wrong kind of value.
    """
    protocol = comparison.protocol
    methods = _record.section(protocol, "methods")
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    # Whether a method is static, any line of it tells.
    static: dict[str, bool] = {}
    for line in comparison.lines:
        key = (line["method"], line["active"], line["trained"])
        groups.setdefault(key, []).append(line)
        static.setdefault(line["method"], bool(line["static"]))
    beats: dict[tuple[Any, ...], dict[str, bool]] = {}
    for pair in comparison.pairs:
        key = (pair.method, pair.budget, pair.trained)
        beats.setdefault(key, {})[pair.other] = pair.low > 1.0
    found = []
    for trained in (False, True):
        for name in methods:
            method = _record.section(methods, name)
            # Its own, or those of the protocol.
            states = _record.items(method, "trained") or _record.items(protocol, "trained")
            budgets = _record.numbers(method, "budgets") or _record.numbers(protocol, "budgets")
            for budget in budgets if trained in states else ():
                key = (name, budget, trained)
                about = (_kind(method), static.get(name, False))
                entry = _entry(str(name), *about, budget, trained, groups.get(key, []))
                found.append(replace(entry, beats=beats.get(key, {})))
    return found


def states(found: Sequence[Entry]) -> list[bool]:
    """Of without training and with it, in which anything was measured or failed."""
    return sorted({entry.trained for entry in found if entry.ratio is not None or entry.reason})


def columns(shown: Sequence[Entry], protocol: Mapping[str, Any]) -> list[float]:
    """Budgets of some entries: those of the protocol in its order, then what methods add."""
    asked = {entry.budget for entry in shown}
    common = [budget for budget in _record.numbers(protocol, "budgets") if budget in asked]
    return [*common, *sorted(asked - set(common), reverse=True)]


def _kind(method: Mapping[str, Any]) -> str:
    """The key under which a protocol names what it compares."""
    return next((kind for kind in ("convert", "compress", BOUND) if kind in method), "")


def _entry(
    method: str,
    kind: str,
    static: bool,
    budget: float,
    trained: bool,
    lines: Sequence[Mapping[str, Any]],
) -> Entry:
    first = lines[0] if lines else {}
    done = [line for line in lines if line["status"] == "done"]
    failed = [line for line in lines if line["status"] != "done"]
    reason = _record.text(failed[0], "reason") if failed else ""
    if not done:
        return Entry(
            method=method,
            kind=kind,
            static=static,
            budget=budget,
            trained=trained,
            status=first.get("status", "missing"),
            reason=reason,
        )
    qualities = [_record.section(line, "quality") for line in done]
    costs = [_record.section(line, "cost") for line in done]
    active = _needed(costs, "active_ffn_fraction")
    return Entry(
        method=method,
        kind=kind,
        static=static,
        budget=budget,
        trained=trained,
        status="done",
        reason=reason,
        seeds=len(done),
        ratio=Ratio(
            geometric_mean(_needed(qualities, "ratio")),
            min(_needed(qualities, "ratio_low")),
            max(_needed(qualities, "ratio_high")),
        ),
        active=fmean(active),
        on_budget=all(abs(value - budget) <= TOLERANCE + _ROUNDING for value in active),
        domains=_means(
            [
                {
                    name: _record.section(_record.section(q, "domains"), name)["perplexity"]
                    for name in _record.section(q, "domains")
                }
                for q in qualities
            ],
            geometric_mean,
        ),
        active_parameters=fmean(_needed(costs, "active_parameters")),
        seconds=_means([_record.section(line, "seconds") for line in done], fmean),
        peak_bytes=max((line.get("peak_bytes", 0) for line in done), default=0) or None,
        accuracy=_over_seeds([accuracies(line) for line in done]),
    )


def _needed(sections: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [_record.as_number(section.get(key), key) for section in sections]


def _means(tables: Sequence[Mapping[str, Any]], mean: Any) -> dict[str, float]:
    """Mean of every number that all tables have."""
    names = [name for name in tables[0] if all(name in table for table in tables)]
    return {name: mean([table[name] for table in tables]) for name in names}


def _over_seeds(scores: Sequence[Mapping[str, Accuracy]]) -> dict[str, Accuracy]:
    """What every seed has."""
    return {
        name: Accuracy(
            fmean(score[name].value for score in scores),
            min(score[name].low for score in scores),
            max(score[name].high for score in scores),
        )
        for name in scores[0]
        if all(name in score for score in scores)
    }


def accuracies(line: Mapping[str, Any]) -> dict[str, Accuracy]:
    """What a model scored, by file of questions; first on all of them, if they are counted."""
    found = _record.section(line, "accuracy")
    files = {str(name): _record.section(found, name) for name in found}
    ends = ("acc", "acc_low", "acc_high")
    scores = {
        name: Accuracy(*(_record.as_number(file.get(end), end) for end in ends))
        for name, file in files.items()
    }
    if len(files) < 2 or not all("questions" in file for file in files.values()):
        return scores
    counts = {name: int(file["questions"]) for name, file in files.items()}
    right = sum(round(scores[name].value * count) for name, count in counts.items())
    total = sum(counts.values())
    # Seconds to import.
    from scipy.stats import binomtest

    interval = binomtest(right, total).proportion_ci(0.95, method="wilson")
    return {ALL: Accuracy(right / total, float(interval.low), float(interval.high)), **scores}


def questions(found: Sequence[Entry]) -> list[str]:
    """Files of questions that some method was asked."""
    return list(dict.fromkeys(name for entry in found for name in entry.accuracy or {}))


def ranked(found: Sequence[Entry], budget: float, trained: bool) -> list[Entry]:
    """The entries of a budget that can be compared, best first; never a bound."""
    return sorted(
        (
            entry
            for entry in found
            if (entry.budget, entry.trained) == (budget, trained)
            and entry.ratio is not None
            and entry.on_budget
            and entry.kind != BOUND
        ),
        key=lambda entry: _ratio(entry).value,
    )


def verdicts(comparison: Comparison) -> list[str]:
    """One sentence for every budget, without training and with it."""
    found = entries(comparison)
    return [
        sentence
        for trained in states(found)
        for sentence in verdicts_of(found, trained, comparison.protocol)
    ] or [NOTHING]


def verdicts_of(found: Sequence[Entry], trained: bool, protocol: Mapping[str, Any]) -> list[str]:
    """One sentence for every budget that a method was asked to meet."""
    methods = [e for e in found if e.trained == trained and e.kind != BOUND]
    return [verdict(found, budget, trained, protocol) for budget in columns(methods, protocol)]


def verdict(
    found: Sequence[Entry], budget: float, trained: bool, protocol: Mapping[str, Any]
) -> str:
    """Name the best method at a budget, or say that none can be told to be it."""
    where = f"At {budget:g} active {training_text(trained, protocol)}"
    order = ranked(found, budget, trained)
    if not order:
        return f"{where} no method was measured within {TOLERANCE:g} of the budget."
    best, ratio = order[0], _ratio(order[0])
    if len(order) == 1:
        return f"{where}, only {best.method} was measured: {ratio.text()}."
    close = [entry for entry in order[1:] if not _settled(best, entry)]
    if close:
        others = _and([f"{entry.method} {_ratio(entry).text()}" for entry in close])
        text = (
            f"{where}, {best.method} is ahead, {ratio.text()}, but not on enough documents for it "
            f"to be settled against {others}"
        )
    else:
        text = f"{where}, {best.method} is best: {ratio.text()}"
    if best.static:
        return f"{text}; it is static, the same weights serve every token."
    static = next((entry for entry in order if entry.static), None)
    if static is None:
        return f"{text}; no static method was measured there."
    if static in close:
        return f"{text}; the best static method is {static.method}."
    return f"{text}; the best static method is {static.method}: {_ratio(static).text()}."


def _settled(best: Entry, entry: Entry) -> bool:
    """Whether one is better than the other for sure.

    On the same documents where they were paired; else by intervals that are apart, which takes a
    larger lead.
    """
    if entry.method in best.beats:
        return best.beats[entry.method]
    return _ratio(entry).low > _ratio(best).high


def _ratio(entry: Entry) -> Ratio:
    assert entry.ratio is not None
    return entry.ratio


def training_text(trained: bool, protocol: Mapping[str, Any]) -> str:
    """Say how a method was trained, for a sentence."""
    if not trained:
        return "without training"
    tokens = _record.number(_record.section(protocol, "train"), "tokens")
    return f"after training on {tokens:,} tokens" if tokens else "after training"


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def pareto(found: Sequence[Entry], trained: bool) -> list[Entry]:
    """The entries that no other beats in both ratio and measured fraction, by fraction."""
    points = sorted(
        (e for e in found if e.trained == trained and e.ratio and e.kind != BOUND),
        key=lambda e: (e.active or 0.0, _ratio(e).value),
    )
    front: list[Entry] = []
    least = math.inf
    for entry in points:
        if _ratio(entry).value < least:
            least = _ratio(entry).value
            front.append(entry)
    return front


def cell_text(entry: Entry | None) -> str:
    """Write an entry as one cell of a table; what nobody asked for is empty."""
    if entry is None:
        return ""
    if entry.ratio is None:
        return {"refused": "refused", "error": "failed"}.get(entry.status, "-")
    if entry.on_budget or entry.active is None:
        return entry.ratio.text()
    return f"{entry.ratio.text()} at {significant(entry.active)}, not ranked"


def leaders(found: Sequence[Entry], budget: float, trained: bool) -> list[Entry]:
    """The best of a budget, and those that may be as good."""
    order = ranked(found, budget, trained)
    return [entry for entry in order if not _settled(order[0], entry)]
