"""Systems whose main part is a layer: routers, experts, losses and schedules (floor `nn`)."""

from moesaic.catalog._system import System

SYSTEMS = (
    System(
        id="dynamic-routing-top-p",
        name="Dynamic routing (top-p)",
        title="Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
        arxiv="2403.07652",
        home=("nn",),
        parts=("router", "loss"),
        summary=(
            "Adds experts to a token until their summed probability passes a threshold, so "
            "hard tokens get more."
        ),
        status="works",
        uses=("router:top-p", "loss:load-balance", "loss:entropy"),
        check="tests/nn/test_top_p.py",
        evidence="evidence/dynamic_routing_top_p.json",
    ),
    System(
        id="moe-plus-plus",
        name="MoE++",
        title="MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts",
        arxiv="2410.07348",
        home=("nn",),
        parts=("router", "experts", "loss"),
        summary=(
            "Puts discard, copy and constant experts, which cost nothing, beside FFN experts; "
            "routers see earlier scores."
        ),
        status="works",
        uses=("router:zero-computation", "loss:heterogeneous-balance"),
        check="tests/nn/test_zero_computation.py",
        evidence="evidence/moe_plus_plus.json",
    ),
    System(
        id="deepseekmoe",
        name="DeepSeekMoE",
        title=(
            "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts "
            "Language Models"
        ),
        arxiv="2401.06066",
        home=("nn",),
        parts=("router", "shared experts", "losses"),
        summary=(
            "Splits experts finely and keeps a few shared ones always on, for specialisation "
            "at equal compute."
        ),
        status="works",
        uses=("router:topk-softmax", "loss:load-balance", "loss:group-balance"),
        check="tests/nn/test_deepseekmoe.py",
        evidence="evidence/deepseekmoe.json",
    ),
    System(
        id="adamoe",
        name="AdaMoE",
        title=(
            "AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language "
            "Models"
        ),
        arxiv="2406.13233",
        home=("nn",),
        parts=("router (null experts)", "loss"),
        summary=(
            "Adds null experts to the router's choices and raises k, so each token uses its "
            "own number of real experts."
        ),
        status="works",
        uses=("router:null-experts", "loss:null-balance"),
        check="tests/nn/test_null_experts.py",
        evidence="evidence/adamoe.json",
    ),
    System(
        id="rexmoe",
        name="ReXMoE",
        title="ReXMoE: Reusing Experts with Minimal Overhead in Mixture-of-Experts",
        arxiv="2510.17483",
        home=("nn",),
        parts=("experts shared across layers", "schedule"),
        summary=(
            "Lets a layer route to the experts of neighbouring layers, for more choice "
            "without more experts."
        ),
    ),
    System(
        id="rmoe",
        name="RMoE",
        title="Layerwise Recurrent Router for Mixture-of-Experts",
        arxiv="2408.06793",
        home=("nn",),
        parts=("router with state",),
        summary=(
            "Carries routing decisions of a token from layer to layer in a small recurrent state."
        ),
    ),
    System(
        id="moge",
        name="Pangu Pro MoE (MoGE)",
        title="Pangu Pro MoE: Mixture of Grouped Experts for Efficient Sparsity",
        arxiv="2505.21411",
        home=("nn",),
        parts=("router", "loss"),
        summary=(
            "Picks equally many experts from every device's group, so all devices carry the "
            "same load."
        ),
        status="works",
        uses=("router:grouped-top-k", "loss:load-balance"),
        check="tests/nn/test_grouped_top_k.py",
        evidence="evidence/moge.json",
    ),
    System(
        id="chain-of-experts",
        name="Chain-of-Experts",
        title="Chain-of-Experts: Unlocking the Communication Power of Mixture-of-Experts Models",
        arxiv="2506.18945",
        home=("nn",),
        parts=("layer",),
        summary=(
            "Runs the experts of one layer several times in a row, routing anew before each pass."
        ),
    ),
    System(
        id="hecto",
        name="Hecto",
        title="Hecto: Modular Sparse Experts for Adaptive and Interpretable Reasoning",
        arxiv="2506.22919",
        home=("nn",),
        parts=("heterogeneous experts",),
        summary=(
            "Chooses between two experts of different kind, one recurrent and one feed- "
            "forward, for each input."
        ),
    ),
    System(
        id="sigma-moe-tiny",
        name="Sigma-MoE-Tiny",
        title="Sigma-MoE-Tiny Technical Report",
        arxiv="2512.16248",
        home=("nn",),
        parts=("schedule", "loss"),
        summary=(
            "Trains one active expert of many by starting with more in low layers and "
            "sparsifying step by step."
        ),
    ),
    System(
        id="selective-sinkhorn",
        name="Selective Sinkhorn Routing",
        title="Selective Sinkhorn Routing for Improved Sparse Mixture of Experts",
        arxiv="2511.08972",
        home=("nn",),
        parts=("router",),
        summary=(
            "Balances a top-k router by solving a small transport problem now and then, "
            "without an auxiliary loss."
        ),
        status="works",
        uses=("router:selective-sinkhorn",),
        check="tests/nn/test_selective_sinkhorn.py",
        evidence="evidence/selective_sinkhorn.json",
    ),
    System(
        id="comet",
        name="COMET",
        title=(
            "COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search"
        ),
        arxiv="2306.02824",
        home=("nn",),
        parts=("router (trees)", "local search"),
        summary=(
            "Gates through soft decision trees that never exceed k experts, with a learned "
            "permutation of the experts."
        ),
    ),
    System(
        id="alf-lb",
        name="Auxiliary-loss-free load balancing",
        title=(
            "A Theoretical Framework for Auxiliary-Loss-Free Load Balancing of Sparse MoE in "
            "Large-Scale AI Models"
        ),
        arxiv="2512.03915",
        home=("nn", "analysis"),
        parts=("balancing", "analysis"),
        summary=(
            "Keeps experts evenly loaded by nudging one selection bias per expert, with a "
            "theory that audits it."
        ),
        status="works",
        uses=("router:sigmoid-top-k",),
        check="tests/nn/test_sigmoid_top_k.py",
        evidence="evidence/alf_lb.json",
    ),
    System(
        id="thor",
        name="THOR",
        title="Taming Sparsely Activated Transformer with Stochastic Experts",
        arxiv="2110.04260",
        home=("nn",),
        parts=("router", "loss"),
        summary=(
            "Picks experts at random and makes them interchangeable with a consistency loss; "
            "there is no router."
        ),
    ),
    System(
        id="dynmole",
        name="DynMoLE",
        title=(
            "DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing Mechanism"
        ),
        arxiv="2504.00661",
        home=("nn",),
        parts=("LoRA experts", "router", "loss"),
        summary=(
            "Routes LoRA experts by the router's certainty: few for sure tokens, all of them "
            "for unsure ones."
        ),
    ),
    System(
        id="mole-latent-experts",
        name="Mixture of Latent Experts",
        title=(
            "Beyond Standard MoE: Mixture of Latent Experts for Resource-Efficient Language Models"
        ),
        arxiv="2503.23100",
        home=("nn", "compression"),
        parts=("experts", "factorisation"),
        summary=(
            "Gives groups of experts a common projection into a latent space; trained models "
            "convert by SVD."
        ),
    ),
    System(
        id="cdsp-moe",
        name="CDSP-MoE",
        title=(
            "Mixture-of-Experts with Gradient Conflict-Driven Subspace Topology Pruning for "
            "Emergent Modularity"
        ),
        arxiv="2512.20291",
        home=("nn",),
        parts=("experts in a shared subspace", "training rule"),
        summary=(
            "Makes experts soft masks over one weight block and cuts links whose gradients "
            "conflict."
        ),
    ),
    System(
        id="mos",
        name="Mixture of Shards",
        title="MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards",
        arxiv="2410.00938",
        home=("nn", "training"),
        parts=("PEFT",),
        summary=(
            "Assembles LoRA matrices from a shared pool of shards, so fewer trained "
            "parameters give equal quality."
        ),
    ),
)
