"""The partitions, by name; importing this loads neither torch nor any method.

An ability `needs:<collector>` tells the caller which statistics to collect for the defaults, and
`package:<name>` which optional package the method uses.
"""

from __future__ import annotations

from moesaic._registry import MethodInfo, MethodTable

PARTITIONS = MethodTable(
    "partition",
    [
        MethodInfo(
            name="coactivation",
            target="moesaic.conversion.partition.coactivation:coactivation",
            config="moesaic.conversion.partition.coactivation:CoactivationConfig",
            summary="Neurons that are strong for the same tokens share a block",
            paper="ours, after MoEfication, arXiv:2110.01786",
            abilities=frozenset({"needs:neurons"}),
        ),
        MethodInfo(
            name="coactivation-graph",
            target="moesaic.conversion.partition.coactivation_graph:coactivation_graph",
            config="moesaic.conversion.partition.coactivation_graph:CoactivationGraphConfig",
            summary="A graph of co-activation cut by METIS, as in MoEfication",
            paper="MoEfication, arXiv:2110.01786",
            abilities=frozenset({"needs:adjacency", "package:pymetis"}),
        ),
        MethodInfo(
            name="contiguous",
            target="moesaic.conversion.partition.contiguous:contiguous",
            config="moesaic.conversion.partition.contiguous:ContiguousConfig",
            summary="Blocks of neighbours in the given order, as in the DSMoE paper",
            paper="DSMoE, arXiv:2502.12455",
        ),
        MethodInfo(
            name="importance",
            target="moesaic.conversion.partition.importance:importance",
            config="moesaic.conversion.partition.importance:ImportanceConfig",
            summary="Neurons sorted by the energy they add; block 0 holds the strongest",
            paper="ours",
            abilities=frozenset({"needs:neurons"}),
        ),
        MethodInfo(
            name="importance-by-domain",
            target="moesaic.conversion.partition.importance_by_domain:importance_by_domain",
            config="moesaic.conversion.partition.importance_by_domain:ImportanceByDomainConfig",
            summary="Each expert takes the neurons whose gradients matter to one domain",
            paper="LLaMA-MoE, arXiv:2406.16554",
            abilities=frozenset({"needs:gradients"}),
        ),
        MethodInfo(
            name="learned",
            target="moesaic.conversion.partition.learned:learned",
            config="moesaic.conversion.partition.learned:LearnedConfig",
            summary="Blocks trained with a router on the error of the output, as in DOT-MoE",
            paper="DOT-MoE, arXiv:2606.01666",
            abilities=frozenset({"needs:inputs", "needs:neurons"}),
        ),
        MethodInfo(
            name="random",
            target="moesaic.conversion.partition.random:random",
            config="moesaic.conversion.partition.random:RandomConfig",
            summary="Neurons dealt at random, as in LLaMA-MoE",
            paper="LLaMA-MoE, arXiv:2406.16554",
            abilities=frozenset({"seeded"}),
        ),
        MethodInfo(
            name="weights",
            target="moesaic.conversion.partition.weights:weights",
            config="moesaic.conversion.partition.weights:WeightsConfig",
            summary="Balanced k-means on the weight rows; needs no text",
            paper="MoEfication, arXiv:2110.01786",
            abilities=frozenset({"needs:weights"}),
        ),
    ],
)
