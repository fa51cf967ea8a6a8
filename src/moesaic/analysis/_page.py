"""What pages have in common: how templates are read, and what may stand in a page."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from moesaic.analysis import _format

_CONTROLS = {code: "\ufffd" for code in (*range(32), 127) if chr(code) not in "\t\n\r"}


@cache
def environment() -> Environment:
    """Give the environment of all templates."""
    environment = Environment(
        loader=PackageLoader("moesaic.analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # repr keeps every digit, so a reader of the page gets the stored number back.
    environment.filters.update(
        exact=repr,
        significant=_format.significant,
        percent=_format.percent,
        multiple=_format.multiple,
        scaled=_format.scaled,
        bytes=_format.byte_size,
    )
    return environment


def clean(page: str) -> str:
    """Replace what no page may hold.

    A lone surrogate, which JSON can carry, has no UTF-8 form; HTML allows no control characters.
    """
    return page.translate(_CONTROLS).encode("utf-8", "replace").decode("utf-8")
