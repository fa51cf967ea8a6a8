"""Every published system moesaic covers, and every method it is made of, as plain data.

Importing this package and listing the systems needs neither torch nor transformers.
"""

from __future__ import annotations

from moesaic._errors import UnknownNameError
from moesaic._registry import unknown_name
from moesaic.catalog._system import Status, System
from moesaic.catalog._tables import method, tables
from moesaic.catalog.rows import applications, compression, conversion, layers, routing, running

__all__ = ["Status", "System", "get", "method", "systems", "tables"]

_SYSTEMS = (
    *conversion.SYSTEMS,
    *routing.SYSTEMS,
    *layers.SYSTEMS,
    *compression.SYSTEMS,
    *running.SYSTEMS,
    *applications.SYSTEMS,
)
_BY_ID = {system.id: system for system in _SYSTEMS}


def systems() -> tuple[System, ...]:
    """Give every published system, those of one floor beside each other."""
    return _SYSTEMS


def get(id: str) -> System:
    """Give one published system by its id.

    Raises:
        UnknownNameError: If no system has this id; carries the closest ids.
    """
    try:
        return _BY_ID[id]
    except KeyError:
        raise UnknownNameError(unknown_name("system", id, _BY_ID)) from None
