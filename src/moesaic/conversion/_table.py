"""The conversions of a dense model into a mixture of experts, by name."""

from __future__ import annotations

from moesaic._registry import MethodInfo, MethodTable

CONVERSIONS = MethodTable(
    "conversion",
    [
        MethodInfo(
            name="dsmoe",
            target="moesaic.conversion.dsmoe:convert_dsmoe",
            config="moesaic.conversion.dsmoe:DSMoE",
            summary="FFN cut into blocks, each switched on or off per token by a sigmoid gate",
            paper="DSMoE, arXiv 2502.12455",
        ),
    ],
)
