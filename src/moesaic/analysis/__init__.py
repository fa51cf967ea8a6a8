"""Seeing what a conversion did: the main table, its headline and the HTML report."""

from moesaic.analysis._headline import Headline, headline
from moesaic.analysis.comparison import Comparison, Pair, verdicts
from moesaic.analysis.comparison_markdown import comparison_markdown
from moesaic.analysis.comparison_page import render_comparison
from moesaic.analysis.health import health_summary, read_health, render_health, write_health
from moesaic.analysis.leaderboard import Leaderboard, board_verdicts
from moesaic.analysis.leaderboard_markdown import leaderboard_markdown
from moesaic.analysis.leaderboard_page import render_leaderboard
from moesaic.analysis.report import render_report, write_report
from moesaic.analysis.suggestion import (
    Prediction,
    Suggestion,
    advice,
    check_sentence,
    checks,
    forecasts,
    predictions_markdown,
)
from moesaic.analysis.table import summary_rows, summary_table

__all__ = [
    "Comparison",
    "Headline",
    "Leaderboard",
    "Pair",
    "Prediction",
    "Suggestion",
    "advice",
    "board_verdicts",
    "check_sentence",
    "checks",
    "comparison_markdown",
    "forecasts",
    "headline",
    "health_summary",
    "leaderboard_markdown",
    "predictions_markdown",
    "read_health",
    "render_comparison",
    "render_health",
    "render_leaderboard",
    "render_report",
    "summary_rows",
    "summary_table",
    "verdicts",
    "write_health",
    "write_report",
]
