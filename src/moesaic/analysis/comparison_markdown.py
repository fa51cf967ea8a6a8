"""A comparison of methods as Markdown, for a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.analysis._format import markdown_table
from moesaic.analysis.comparison import (
    BOUND,
    NOTHING,
    Accuracy,
    Comparison,
    Entry,
    accuracies,
    cell_text,
    columns,
    entries,
    leaders,
    questions,
    states,
    training_text,
    verdicts_of,
)


def comparison_markdown(comparison: Comparison) -> str:
    """Write a comparison for a document: its sentences, a table each without and with training.

    The best ratio of a budget is bold, with those that may be as good.

    Raises:
        InputError: If a line holds a wrong kind of value.
    """
    found = entries(comparison)
    protocol = comparison.protocol
    parts = []
    for trained in states(found):
        of_state = [entry for entry in found if entry.trained == trained]
        heading = training_text(trained, protocol)
        parts.append(f"### {heading[0].upper()}{heading[1:]}")
        if methods := [entry for entry in of_state if entry.kind != BOUND]:
            sentences = verdicts_of(found, trained, protocol)
            parts.append("\n".join(f"- {sentence}" for sentence in sentences))
            parts.append(_table(methods, protocol, "method", found))
        if bounds := [entry for entry in of_state if entry.kind == BOUND]:
            parts.append("Bounds, which compute everything and are not ranked:")
            parts.append(_table(bounds, protocol, "bound", found))
    if not parts:
        return f"{NOTHING}\n"
    parts.append(
        "Perplexity over the dense parent's: the geometric mean over domains and seeds, and in "
        "parentheses the 95% interval over documents, the widest that the seeds give."
    )
    if names := questions(found):
        parts.append("### Accuracy on questions")
        parts.append(_accuracy_table(comparison, found, names))
        parts.append(
            "Beside the perplexity ratio, the part of the questions answered rightly: the mean "
            "over seeds, and Wilson's 95% interval, the widest that they give."
        )
    reasons = dict.fromkeys(
        f"- {entry.method} at {entry.budget:g}: {entry.reason}" for entry in found if entry.reason
    )
    if reasons:
        parts.append("Not measured:")
        parts.append("\n".join(reasons))
    return "\n\n".join(parts) + "\n"


def _table(
    shown: Sequence[Entry], protocol: Mapping[str, Any], title: str, found: Sequence[Entry]
) -> str:
    budgets = columns(shown, protocol)
    best = {id(e) for budget in budgets for e in leaders(found, budget, shown[0].trained)}
    rows = []
    for name in dict.fromkeys(entry.method for entry in shown):
        own = {entry.budget: entry for entry in shown if entry.method == name}
        label = f"{name} (static)" if any(entry.static for entry in own.values()) else name
        texts = [
            f"**{cell_text(entry)}**" if id(entry) in best else cell_text(entry)
            for entry in map(own.get, budgets)
        ]
        rows.append([label, *texts])
    return markdown_table([title, *(f"{budget:g} active" for budget in budgets)], rows)


def _accuracy_table(comparison: Comparison, found: Sequence[Entry], names: Sequence[str]) -> str:
    """Lay out what was scored beside the perplexity ratio, the dense parent first."""
    rows = []
    if comparison.dense is not None:
        dense = accuracies(comparison.dense)
        rows.append(["dense parent", "1", "", "1.00", *(_score(dense, name) for name in names)])
    for entry in found:
        if entry.accuracy:
            trained = "trained" if entry.trained else ""
            scores = [_score(entry.accuracy, name) for name in names]
            rows.append(
                [_label(entry), f"{entry.budget:g}", trained, cell_text(entry), *scores],
            )
    return markdown_table(["method", "active", "", "perplexity ratio", *names], rows)


def _score(scores: Mapping[str, Accuracy], name: str) -> str:
    return scores[name].text() if name in scores else "-"


def _label(entry: Entry) -> str:
    marks = {"static": entry.static, BOUND: entry.kind == BOUND}
    return " ".join([entry.method, *(f"({mark})" for mark, holds in marks.items() if holds)])
