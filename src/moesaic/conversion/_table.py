"""The conversions of a dense model into a mixture of experts, by name."""

from __future__ import annotations

from moesaic._registry import MethodInfo, MethodTable

CONVERSIONS = MethodTable(
    "conversion",
    [
        MethodInfo(
            name="cmoe",
            target="moesaic.conversion.cmoe:convert_cmoe",
            config="moesaic.conversion.cmoe:CMoE",
            summary="Shares the neurons that most tokens use, clusters the rest; no training",
            paper="CMoE, arXiv 2502.04416",
            abilities=frozenset({"cut", "fixed-k", "gated-only"}),
        ),
        MethodInfo(
            name="dsmoe",
            target="moesaic.conversion.dsmoe:convert_dsmoe",
            config="moesaic.conversion.dsmoe:DSMoE",
            summary="FFN cut into blocks, each switched on or off per token by a sigmoid gate",
            paper="DSMoE, arXiv 2502.12455",
        ),
        MethodInfo(
            name="expertweaver",
            target="moesaic.conversion.expertweaver:convert_expertweaver",
            config="moesaic.conversion.expertweaver:ExpertWeaver",
            summary="ExpertWeaver-style: shares what is active in all text, by layer; no training",
            paper="after ExpertWeaver, arXiv 2602.15521",
            status="preview",
            abilities=frozenset({"cut", "fixed-k", "gated-only"}),
        ),
        MethodInfo(
            name="moefication",
            target="moesaic.conversion.moefication:convert_moefication",
            config="moesaic.conversion.moefication:MoEfication",
            summary="Small experts of related neurons and a router fitted to their activations",
            paper="MoEfication, arXiv 2110.01786",
            abilities=frozenset({"cut", "fixed-k"}),
        ),
    ],
)
