"""The losses, by name."""

from __future__ import annotations

from moesaic._registry import MethodInfo, MethodTable

LOSSES = MethodTable(
    "loss",
    [
        MethodInfo(
            name="consistency",
            target="moesaic.nn.losses.consistency:consistency_loss",
            config="moesaic.nn.losses._base:LossConfig",
            summary="Divergence of two passes with other experts: makes them interchangeable",
            paper="THOR, arXiv 2110.04260",
            abilities=frozenset({"two-passes"}),
        ),
        MethodInfo(
            name="diversity",
            target="moesaic.nn.losses.diversity:diversity_loss",
            config="moesaic.nn.losses._base:LossConfig",
            summary="Divergence of the mean probability from the same for all experts",
            paper="Hecto, arXiv 2506.22919",
            abilities=frozenset({"softmax"}),
        ),
        MethodInfo(
            name="entropy",
            target="moesaic.nn.losses.entropy:entropy_loss",
            config="moesaic.nn.losses._base:LossConfig",
            summary="Entropy of the router's softmax: keeps a variable count from growing",
            paper="Dynamic routing, arXiv 2403.07652",
            abilities=frozenset({"softmax"}),
        ),
        MethodInfo(
            name="group-balance",
            target="moesaic.nn.losses.group_balance:group_balance_loss",
            config="moesaic.nn.losses.group_balance:GroupBalanceConfig",
            summary="Load balance between groups of experts, as between devices",
            paper="DeepSeekMoE, arXiv 2401.06066",
            abilities=frozenset({"softmax"}),
        ),
        MethodInfo(
            name="heterogeneous-balance",
            target="moesaic.nn.losses.heterogeneous_balance:heterogeneous_balance_loss",
            config="moesaic.nn.losses.heterogeneous_balance:HeterogeneousBalanceConfig",
            summary="Load balance in which free experts count less and get more tokens",
            paper="MoE++, arXiv 2410.07348",
            abilities=frozenset({"softmax", "free-experts"}),
        ),
        MethodInfo(
            name="importance",
            target="moesaic.nn.losses.importance:importance_loss",
            config="moesaic.nn.losses._base:LossConfig",
            summary="Squared variation of the sum of weights over experts",
            paper="Sparsely-gated MoE, arXiv 1701.06538",
        ),
        MethodInfo(
            name="load",
            target="moesaic.nn.losses.load:load_loss",
            config="moesaic.nn.losses._base:LossConfig",
            summary="Squared variation of the expected number of tokens over experts",
            paper="Sparsely-gated MoE, arXiv 1701.06538",
            abilities=frozenset({"chances"}),
        ),
        MethodInfo(
            name="load-balance",
            target="moesaic.nn.losses.load_balance:load_balance_loss",
            config="moesaic.nn.losses.load_balance:LoadBalanceConfig",
            summary="E * sum of load times probability, over the batch or per sequence",
            paper="Switch Transformer, arXiv 2101.03961; per sequence: DeepSeek-V3, 2412.19437",
            abilities=frozenset({"softmax"}),
        ),
        MethodInfo(
            name="null-balance",
            target="moesaic.nn.losses.null_balance:null_balance_loss",
            config="moesaic.nn.losses._base:LossConfig",
            summary="Load balance in which all null experts share one averaged load",
            paper="AdaMoE, arXiv 2406.13233",
            abilities=frozenset({"softmax"}),
        ),
        MethodInfo(
            name="sparsity",
            target="moesaic.nn.losses.sparsity:sparsity_loss",
            config="moesaic.nn.losses.sparsity:SparsityConfig",
            summary="Mean of the gates that are on: pushes active experts off",
            paper="DSMoE, arXiv 2502.12455",
            abilities=frozenset({"sigmoid"}),
        ),
        MethodInfo(
            name="z-loss",
            target="moesaic.nn.losses.z_loss:z_loss",
            config="moesaic.nn.losses._base:LossConfig",
            summary="Squared log-sum-exp of the scores: keeps logits small",
            paper="ST-MoE, arXiv 2202.08906",
            abilities=frozenset({"softmax"}),
        ),
    ],
)
