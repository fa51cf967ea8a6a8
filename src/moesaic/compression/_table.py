"""The compressions of a model, by name."""

from __future__ import annotations

from moesaic._registry import MethodInfo, MethodTable

COMPRESSIONS = MethodTable(
    "compression",
    [
        MethodInfo(
            name="flap",
            target="moesaic.compression.pruning.flap:prune_flap",
            config="moesaic.compression.pruning.flap:FLAP",
            summary="FFN neurons that vary least removed; a bias keeps their mean contribution",
            paper="FLAP, arXiv 2312.11983",
            abilities=frozenset({"static"}),
        ),
    ],
)
