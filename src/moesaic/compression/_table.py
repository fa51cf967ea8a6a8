"""The compressions of a model, by name.

Abilities: `static`, the same weights serve every token; `any-architecture`, none is refused;
`mixture`, it starts from a model with experts where the others start from its dense parent, and
has no `active`, since it leaves as many experts on.
"""

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
            abilities=frozenset({"static", "any-architecture"}),
        ),
        MethodInfo(
            name="llm-pruner-block",
            target="moesaic.compression.pruning.llm_pruner_block:prune_block",
            config="moesaic.compression.pruning.llm_pruner_block:LLMPrunerBlock",
            summary="FFN neurons whose weights the loss feels least removed",
            paper="LLM-Pruner, arXiv 2305.11627",
            abilities=frozenset({"static", "any-architecture"}),
        ),
        MethodInfo(
            name="llm-pruner-channel",
            target="moesaic.compression.pruning.llm_pruner_channel:prune_channels",
            config="moesaic.compression.pruning.llm_pruner_channel:LLMPrunerChannel",
            summary="Channels of the residual stream that the loss feels least removed everywhere",
            paper="LLM-Pruner, arXiv 2305.11627",
            abilities=frozenset({"static"}),
        ),
        MethodInfo(
            name="sparsegpt",
            target="moesaic.compression.pruning.sparsegpt:prune_sparsegpt",
            config="moesaic.compression.pruning.sparsegpt:SparseGPT",
            summary="FFN weights set to zero; those that stay make up for what went",
            paper="SparseGPT, arXiv 2301.00774",
            abilities=frozenset({"static", "any-architecture"}),
        ),
        MethodInfo(
            name="wanda",
            target="moesaic.compression.pruning.wanda:prune_wanda",
            config="moesaic.compression.pruning.wanda:Wanda",
            summary="FFN weights set to zero where weight times size of input is least",
            paper="Wanda, arXiv 2306.11695",
            abilities=frozenset({"static", "any-architecture"}),
        ),
        MethodInfo(
            name="teal",
            target="moesaic.compression.sparsity.teal:sparsify_teal",
            config="moesaic.compression.sparsity.teal:TEAL",
            summary="FFN inputs and neurons of small magnitude left out, token by token",
            paper="TEAL, arXiv 2408.14690",
            abilities=frozenset({"any-architecture"}),
        ),
        MethodInfo(
            name="latent-experts",
            target="moesaic.compression.factorization.latent_experts:factorise_experts",
            config="moesaic.compression.factorization.latent_experts:LatentExperts",
            summary="Experts of a mixture in groups whose gate and up share a projection",
            paper="Mixture of Latent Experts, arXiv 2503.23100",
            abilities=frozenset({"mixture"}),
        ),
    ],
)
"""Making a model smaller for every token alike."""


def baseline_kind(name: str) -> str:
    """What an evaluation record calls a model that a compression made, by the method's name.

    `activation-sparsity` where tokens use different weights, else `static-pruning`; of a method
    that is not registered here nothing is known, and it counts as pruning.
    """
    if name in COMPRESSIONS and "static" not in COMPRESSIONS[name].abilities:
        return "activation-sparsity"
    return "static-pruning"
