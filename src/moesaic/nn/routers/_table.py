"""The routers, by name."""

from __future__ import annotations

from moesaic._registry import MethodInfo, MethodTable

ROUTERS = MethodTable(
    "router",
    [
        MethodInfo(
            name="cmoe",
            target="moesaic.nn.routers.cmoe:CMoERouter",
            config="moesaic.nn.routers.cmoe:CMoERouterConfig",
            summary="Scores by one neuron of each expert; a bias that training moves balances them",
            paper="CMoE, arXiv 2502.04416",
            abilities=frozenset({"softmax", "top-k"}),
        ),
        MethodInfo(
            name="linear-top-k",
            target="moesaic.nn.routers.linear_top_k:LinearTopK",
            config="moesaic.nn.routers._base:TopKConfig",
            summary="The k highest linear scores, each expert weighing one",
            paper="ours, for ExpertWeaver, arXiv 2602.15521",
            abilities=frozenset({"top-k"}),
        ),
        MethodInfo(
            name="mlp-top-k",
            target="moesaic.nn.routers.mlp_top_k:MlpTopK",
            config="moesaic.nn.routers._base:TopKConfig",
            summary="A small network scores the experts; the k highest weigh one",
            paper="MoEfication, arXiv 2110.01786",
            abilities=frozenset({"top-k"}),
        ),
        MethodInfo(
            name="nearest-top-k",
            target="moesaic.nn.routers.nearest_top_k:NearestTopK",
            config="moesaic.nn.routers._base:TopKConfig",
            summary="The k experts whose centres are nearest, each weighing one",
            paper="MoEfication, arXiv 2110.01786",
            abilities=frozenset({"top-k"}),
        ),
        MethodInfo(
            name="null-experts",
            target="moesaic.nn.routers.null_experts:NullExperts",
            config="moesaic.nn.routers.null_experts:NullExpertsConfig",
            summary="Top-k over real and null experts; a null one costs nothing",
            paper="AdaMoE, arXiv 2406.13233",
            abilities=frozenset({"softmax", "top-k", "variable"}),
        ),
        MethodInfo(
            name="noisy-top-k",
            target="moesaic.nn.routers.noisy_top_k:NoisyTopK",
            config="moesaic.nn.routers.noisy_top_k:NoisyTopKConfig",
            summary="Top-k, in training of noisy scores; weights are a softmax of those kept",
            paper="LLaMA-MoE, arXiv 2406.16554; Sparsely-gated MoE, arXiv 1701.06538",
            abilities=frozenset({"top-k", "noise-in-training"}),
        ),
        MethodInfo(
            name="selective-sinkhorn",
            target="moesaic.nn.routers.selective_sinkhorn:SelectiveSinkhorn",
            config="moesaic.nn.routers.selective_sinkhorn:SelectiveSinkhornConfig",
            summary="Top-k; now and then in training by a transport plan that evens the load",
            paper="Selective Sinkhorn Routing, arXiv 2511.08972",
            abilities=frozenset({"softmax", "top-k", "batch-in-training"}),
        ),
        MethodInfo(
            name="sigmoid-threshold",
            target="moesaic.nn.routers.sigmoid_threshold:SigmoidThreshold",
            config="moesaic.nn.routers.sigmoid_threshold:SigmoidThresholdConfig",
            summary="One sigmoid gate per expert, on above a threshold; straight-through",
            paper="DSMoE, arXiv 2502.12455",
            abilities=frozenset({"sigmoid", "variable", "may-choose-none"}),
        ),
        MethodInfo(
            name="sigmoid-top-k",
            target="moesaic.nn.routers.sigmoid_top_k:SigmoidTopK",
            config="moesaic.nn.routers.sigmoid_top_k:SigmoidTopKConfig",
            summary="The k highest sigmoid gates; a bias decides with them and weighs nothing",
            paper="DeepSeek-V3, arXiv 2412.19437; loss-free balancing, arXiv 2408.15664",
            abilities=frozenset({"sigmoid", "top-k"}),
        ),
        MethodInfo(
            name="token-rounding",
            target="moesaic.nn.routers.token_rounding:TokenRounding",
            config="moesaic.nn.routers.token_rounding:TokenRoundingConfig",
            summary="Top-k; in training each expert's count is rounded to whole tiles",
            paper="SonicMoE, arXiv 2512.14080",
            abilities=frozenset({"softmax", "variable", "may-choose-none", "batch-in-training"}),
        ),
        MethodInfo(
            name="top-p",
            target="moesaic.nn.routers.top_p:TopP",
            config="moesaic.nn.routers.top_p:TopPConfig",
            summary="Adds experts until their probability reaches a threshold",
            paper="Dynamic routing, arXiv 2403.07652",
            abilities=frozenset({"softmax", "variable"}),
        ),
        MethodInfo(
            name="topk-softmax",
            target="moesaic.nn.routers.topk_softmax:TopKSoftmax",
            config="moesaic.nn.routers.topk_softmax:TopKSoftmaxConfig",
            summary="The k most probable experts, renormalised or not",
            paper="Sparsely-gated MoE, arXiv 1701.06538; Mixtral, arXiv 2401.04088",
            abilities=frozenset({"softmax", "top-k"}),
        ),
    ],
)
