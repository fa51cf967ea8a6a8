"""The conversions of a dense model into a mixture of experts, by name.

Abilities: `cut`, all experts on is the dense model, unless `refit` moves them; `fixed-k`, every
token uses exactly what was asked for; `gated-only`, networks without a gate are refused.
"""

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
            abilities=frozenset({"cut"}),
        ),
        MethodInfo(
            name="llama-moe",
            target="moesaic.conversion.llama_moe:convert_llama_moe",
            config="moesaic.conversion.llama_moe:LLaMAMoE",
            summary="FFN cut at random; noisy top-k routers, to be trained at length",
            paper="LLaMA-MoE, arXiv 2406.16554",
            abilities=frozenset({"cut", "fixed-k"}),
        ),
        MethodInfo(
            name="sparse-upcycling",
            target="moesaic.conversion.sparse_upcycling:convert_sparse_upcycling",
            config="moesaic.conversion.sparse_upcycling:SparseUpcycling",
            summary="Experts are copies of the FFN, whole or pruned, chosen by a random router",
            paper="Sparse Upcycling, arXiv 2212.05055; EvoMoE, arXiv 2112.14397",
            abilities=frozenset({"fixed-k"}),
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
