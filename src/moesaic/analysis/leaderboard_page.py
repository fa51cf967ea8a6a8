"""A leaderboard of architectures as one HTML page that needs no network and no script."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.analysis import _charts, _format, _history
from moesaic.analysis._page import clean, environment
from moesaic.analysis.leaderboard import Leaderboard, Standing, board_verdicts, standings
from moesaic.analysis.leaderboard_markdown import TITLES, cells_of

# The first part of training, whose losses would squeeze the rest.
_SKIPPED = 0.1


def render_leaderboard(board: Leaderboard) -> str:
    """Render a leaderboard as HTML.

    Every text is escaped, and the page forbids scripts and outside content.

    Raises:
        InputError: If a line holds a wrong kind of value.
    """
    found = standings(board)
    measured = [one for one in found if one.loss is not None]
    page = (
        environment()
        .get_template("leaderboard.html.j2")
        .render(
            verdicts=board_verdicts(board),
            titles=TITLES,
            rows=[(one, cells_of(one)) for one in measured],
            curves=learning_curves(measured),
            loads=load_chart(measured),
            missing=[one for one in found if one.reason],
            protocol=_history.raw_json(board.protocol),
            machines=_history.machines(board.lines),
            versions=_history.versions(board.lines),
            levels=[],
        )
    )
    return clean(page)


def learning_curves(measured: Sequence[Standing]) -> _charts.Chart | None:
    """Lay out training loss against tokens, one line for each architecture; the first seed."""
    series = []
    for one in measured:
        start = _SKIPPED * max((x for x, _ in one.curve), default=0.0)
        kept = [(x, y) for x, y in one.curve if x >= start]
        series.append(
            _charts.Points(
                name=one.name,
                x=[x for x, _ in kept],
                y=[y for _, y in kept],
                titles=[f"{one.name}: {y:.3f} after {_format.integer(x)} tokens" for x, y in kept],
            )
        )
    return _charts.line_chart(
        series,
        title="Learning curves",
        x_title="tokens",
        y_title="training loss in nats per token",
        write_x=_format.tick,
        write_y=_format.tick,
    )


def load_chart(measured: Sequence[Standing]) -> _charts.Chart | None:
    """Lay out the busiest expert's load over the mean, layer by layer; the first seed."""
    series = [
        _charts.Points(
            name=one.name,
            x=[float(index + 1) for index in range(len(one.layers))],
            y=list(one.layers),
            titles=[
                f"{one.name}, layer {index + 1}: {value:.2f} times the mean"
                for index, value in enumerate(one.layers)
            ],
            style=style,
        )
        # The colour of its learning curve.
        for style, one in enumerate(measured)
        if one.layers
    ]
    if not series:
        return None
    count = max(len(points.x) for points in series)
    axis = _charts.Axis(low=0.8, high=count + 0.2)
    return _charts.line_chart(
        series,
        title="Load of the busiest expert",
        x_title="layer",
        y_title="load over the mean",
        write_x=_format.tick,
        write_y=_format.tick,
        x_axis=axis,
        x_ticks=[_charts.Tick(at=axis.at(n), label=str(n)) for n in range(1, count + 1)],
        allow_log=True,
        reference=1.0,
    )
