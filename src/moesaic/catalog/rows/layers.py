"""Systems whose main part is a layer: routers, experts, losses and schedules (floor `nn`)."""

from moesaic.catalog._system import System

SYSTEMS = (
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
