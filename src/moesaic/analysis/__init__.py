"""Seeing what a conversion did: the main table, its headline and the HTML report."""

from moesaic.analysis._headline import Headline, headline
from moesaic.analysis.report import render_report, write_report
from moesaic.analysis.table import summary_rows, summary_table

__all__ = [
    "Headline",
    "headline",
    "render_report",
    "summary_rows",
    "summary_table",
    "write_report",
]
