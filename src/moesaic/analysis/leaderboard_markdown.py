"""A leaderboard of architectures as Markdown, for a document."""

from __future__ import annotations

from moesaic.analysis._format import NOT_MEASURED, markdown_table, scaled, significant
from moesaic.analysis.leaderboard import (
    Leaderboard,
    Spread,
    Standing,
    board_verdicts,
    standings,
)

TITLES = (
    "architecture",
    "loss",
    "FLOPs",
    "experts used",
    "max/mean load",
    "entropy",
    "dead",
    "tokens/s",
    "parameters",
    "active",
    "seeds",
)


def leaderboard_markdown(board: Leaderboard) -> str:
    """Write a leaderboard for a document: its sentences and its table.

    Raises:
        InputError: If a line holds a wrong kind of value.
    """
    found = standings(board)
    measured = [one for one in found if one.loss is not None]
    parts = ["\n".join(f"- {sentence}" for sentence in board_verdicts(board))]
    if measured:
        parts.append(markdown_table(TITLES, [cells_of(one) for one in measured]))
        parts.append(
            "Means over seeds; in parentheses the least and the largest of a seed, where they "
            "differ. Loss on held-out text in nats per token; FLOPs per token as counted at the "
            "measured use, over those of the dense model; experts that a token used; the busiest "
            "expert's load over the mean and the entropy of loads over its largest value, means "
            "over layers; experts without a token; tokens per second of training."
        )
    if reasons := [f"- {one.name}: {one.reason}" for one in found if one.reason]:
        parts += ["Not measured:", "\n".join(reasons)]
    return "\n\n".join(parts) + "\n"


def cells_of(one: Standing) -> list[str]:
    """The cells of a row, in the order of the titles."""
    assert one.loss is not None, "it was measured"
    assert one.flops is not None
    name = f"{one.name} (not ranked)" if one.why_unranked else one.name
    used = NOT_MEASURED
    if one.experts_used is not None:
        shared = f" + {one.shared // one.width}" if one.shared else ""
        used = f"{one.experts_used.text('{:.2f}'.format)}{shared} of {one.experts}"
    dead = NOT_MEASURED if one.dead is None else f"{one.dead:.3g} of {one.total_experts}"
    return [
        name,
        one.loss.text(),
        one.flops.text(),
        used,
        _two(one.max_over_mean),
        _two(one.entropy),
        dead,
        NOT_MEASURED if one.train_tokens_per_s is None else scaled(one.train_tokens_per_s),
        NOT_MEASURED if one.parameters is None else scaled(one.parameters),
        NOT_MEASURED if one.active_parameters is None else scaled(one.active_parameters),
        str(one.seeds),
    ]


def _two(value: Spread | None) -> str:
    return NOT_MEASURED if value is None else value.text(significant)
