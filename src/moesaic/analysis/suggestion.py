"""Predictions in words: what to do with a model before any work, and how far predictions were off.

A prediction is a ratio of perplexities that a short trial measured (`moesaic.recipes.suggestion`).
What a sentence says of a method is about it as it is, without training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

from moesaic.analysis._format import markdown_table, multiple, whole_percent
from moesaic.analysis.comparison import BOUND, TOLERANCE, Comparison, Ratio, entries

# A loss of perplexity up to which a model can be used as it is.
USABLE = 0.1
# Above it nothing is left to use.
LOST = 1.0
# How far a prediction may be from what is measured.
CLOSE = 0.15
# DSMoE with thresholds within its blocks.
THRESHOLDS = "dsmoe-thresholds"
PREDICTION_COLUMNS = ("method", "active", "predicted", "measured", "off")
# A fraction that is off its budget by more is not compared: a trial reads less text.
_OFF_BUDGET = 2 * TOLERANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a method is predicted to lose at a budget, without training.

    Attributes:
        method: Its name.
        kind: `convert`, `compress` or `bound`.
        budget: The requested active fraction.
        static: Whether the same weights serve every token.
        ratio: Perplexity over the dense parent's; none if the method refused or broke the model.
        low: Of its 95% interval over documents.
        high: Of its 95% interval.
        active: The active fraction that was measured with it.
        blocks: Of text that it was measured on.
        reason: Why there is no ratio.
    """

    method: str
    kind: str
    budget: float
    static: bool = False
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    active: float | None = None
    blocks: int = 0
    reason: str = ""

    @property
    def loss(self) -> float:
        """Perplexity lost, as a fraction of the dense parent's; infinite without a ratio."""
        return float("inf") if self.ratio is None else self.ratio - 1

    @property
    def on_budget(self) -> bool:
        """Whether its measured fraction is near enough to the budget to be compared."""
        return self.active is not None and abs(self.active - self.budget) <= _OFF_BUDGET

    def text(self) -> str:
        """As one cell of a table."""
        if self.ratio is None or self.low is None or self.high is None:
            return "-"
        text = Ratio(self.ratio, self.low, self.high).text()
        return text if self.on_budget else f"{text} at {self.active:.2f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """What is predicted of a conversion and of what could be done instead.

    Attributes:
        conversion: The method that is asked about.
        budgets: Active fractions, highest first.
        predictions: One for each method and budget.
        seconds: What the trials took.
    """

    conversion: str
    budgets: tuple[float, ...]
    predictions: tuple[Prediction, ...]
    seconds: float = 0.0

    def at(self, budget: float) -> list[Prediction]:
        """The methods that can be compared at a budget, best first; never a bound."""
        return sorted(
            (
                p
                for p in self.predictions
                if p.budget == budget and p.ratio is not None and p.on_budget and p.kind != BOUND
            ),
            key=lambda p: p.loss,
        )

    def own(self, budget: float) -> Prediction | None:
        """What is predicted of the conversion at a budget."""
        return next((p for p in self.at(budget) if p.method == self.conversion), None)


def advice(suggestion: Suggestion) -> list[str]:
    """Say what to do, in one to four sentences.

    Which method is predicted best at each budget; what that means for the conversion; what
    thresholds within its blocks would give; and where static pruning is the better choice.
    """
    best = [order[0] for budget in suggestion.budgets if (order := suggestion.at(budget))]
    if not best:
        return [f"No method meets a budget of {_list(suggestion.budgets)} within {_OFF_BUDGET:g}."]
    sentences = [f"Without training, predicted to lose least: {_named(best)}."]
    own = [p for budget in suggestion.budgets if (p := suggestion.own(budget)) is not None]
    if own:
        sentences.append(_what_to_do(suggestion, own))
        sentences += _with_thresholds(suggestion) + _pruning(suggestion, own)
    return sentences


def _what_to_do(suggestion: Suggestion, own: Sequence[Prediction]) -> str:
    """What the predictions mean for the conversion."""
    name = suggestion.conversion
    usable = [p for p in own if p.loss <= USABLE]
    if len(usable) == len(own):
        return f"{name} can be used as it is at all of them, {_loss(own[-1])} at the lowest."
    if usable:
        least, rest = usable[-1], [p for p in own if p.loss > USABLE]
        losses = _list([f"{_loss(p)} at {p.budget:g}" for p in rest])
        return (
            f"{name} can be used as it is at {least.budget:g} ({_loss(least)}); it loses {losses}, "
            "so convert there only if you will train."
        )
    losses = _list([f"{_loss(p)} at {p.budget:g}" for p in own])
    least_loss = min(own, key=lambda p: p.loss)
    if least_loss.loss > LOST:
        return f"{name} loses {losses}: do not convert without training."
    instead = f", or take {least_loss.budget:g}" if len(own) > 1 else ""
    return f"{name} loses {losses}: convert only if you will train{instead}."


def _with_thresholds(suggestion: Suggestion) -> list[str]:
    """What thresholds within the blocks of the conversion would give."""
    found = [p for budget in suggestion.budgets for p in suggestion.at(budget)]
    losses = [f"{_loss(p)} at {p.budget:g}" for p in found if p.method == THRESHOLDS]
    if not losses:
        return []
    return [
        "With thresholds within its blocks, which save weights and on a CPU no time (--preset "
        f"thresholds), it is predicted to lose {_list(losses)}."
    ]


def _pruning(suggestion: Suggestion, own: Sequence[Prediction]) -> list[str]:
    """Where the same weights for every token lose no more than the conversion."""
    better = []
    for mine in own:
        static = next((p for p in suggestion.at(mine.budget) if p.static), None)
        if static is not None and static.loss <= mine.loss:
            better.append(static)
    if not better:
        return []
    return [f"Static pruning is predicted to lose no more, without a router: {_named(better)}."]


def _named(predictions: Sequence[Prediction]) -> str:
    """As `teal at 0.75 (2.0%) and 0.5 (25%); flap at 0.25 (80%)`."""
    return "; ".join(
        f"{method} at {_list([f'{p.budget:g} ({_loss(p)})' for p in group])}"
        for method, group in groupby(predictions, key=lambda p: p.method)
    )


def _loss(prediction: Prediction) -> str:
    """As 25%, or as a multiple where per cent says little."""
    if prediction.loss > LOST:
        assert prediction.ratio is not None
        return f"{multiple(prediction.ratio).removesuffix('x')} times the perplexity"
    return whole_percent(max(0.0, prediction.loss))


def _list(words: Sequence[object]) -> str:
    texts = [f"{word:g}" if isinstance(word, float) else str(word) for word in words]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A prediction beside what was measured."""

    method: str
    budget: float
    predicted: float
    measured: float

    @property
    def off(self) -> float:
        """How far the prediction is off, as a fraction of what was measured."""
        return self.predicted / self.measured - 1


def checks(comparison: Comparison) -> list[Check]:
    """Put every prediction beside the measured ratio of its method and budget, without training."""
    measured = _measured(comparison)
    return [
        Check(method=p.method, budget=p.budget, predicted=p.ratio, measured=measured[key])
        for p in comparison.predictions
        if (key := (p.method, p.budget)) in measured and p.ratio is not None
    ]


def _measured(comparison: Comparison) -> dict[tuple[str, float], float]:
    return {
        (entry.method, entry.budget): entry.ratio.value
        for entry in entries(comparison)
        if entry.ratio is not None and not entry.trained
    }


def forecasts(comparison: Comparison) -> list[str]:
    """Name the predicted cells that were not measured, a sentence for each budget, best first."""
    measured = _measured(comparison)
    left = [
        p
        for p in sorted(comparison.predictions, key=lambda p: p.loss)
        if p.ratio is not None and p.kind != BOUND and (p.method, p.budget) not in measured
    ]
    return [
        f"At {budget:g} active without training, predicted and not measured: "
        + ", ".join(f"{p.method} {p.text()}" for p in left if p.budget == budget)
        + "."
        for budget in sorted({p.budget for p in left}, reverse=True)
    ]


def check_sentence(found: Sequence[Check]) -> str:
    """Say how good predictions were."""
    if not found:
        return "No predicted cell was measured yet."
    close = sum(abs(check.off) <= CLOSE for check in found)
    middle = median(abs(check.off) for check in found)
    return (
        f"{close} of {len(found)} predictions were within {CLOSE:.0%} of what was measured; half "
        f"of them within {whole_percent(middle)}."
    )


def prediction_rows(comparison: Comparison) -> list[list[str]]:
    """Lay out every prediction, under `PREDICTION_COLUMNS`; `-` for what is not known."""
    found = {(check.method, check.budget): check for check in checks(comparison)}
    rows = []
    for p in comparison.predictions:
        check = found.get((p.method, p.budget))
        measured = "-" if check is None else multiple(check.measured).removesuffix("x")
        off = "-" if check is None else f"{check.off:+.1%}"
        rows.append([p.method, f"{p.budget:g}", p.text(), measured, off])
    return rows


def predictions_markdown(comparison: Comparison) -> str:
    """Write what was predicted, and beside it what was measured, for a document; or nothing.

    Raises:
        InputError: If a line holds a wrong kind of value.
    """
    if not comparison.predictions:
        return ""
    parts = [
        "\n### Predicted from short trials",
        check_sentence(checks(comparison)),
        markdown_table(PREDICTION_COLUMNS, prediction_rows(comparison)),
    ]
    if reasons := [
        f"- {p.method} at {p.budget:g}: {p.reason}" for p in comparison.predictions if p.reason
    ]:
        parts += ["Not predicted:", "\n".join(reasons)]
    return "\n\n".join(parts) + "\n"
