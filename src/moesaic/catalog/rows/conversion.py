"""Systems that make a mixture out of a dense model (floor `conversion`)."""

from moesaic.catalog._system import System

SYSTEMS = (
    System(
        id="dsmoe",
        name="DSMoE",
        title=(
            "DSMoE: Matrix-Partitioned Experts with Dynamic Routing for Computation-Efficient "
            "Dense LLMs"
        ),
        arxiv="2502.12455",
        home=("conversion",),
        parts=("conversion", "router", "loss"),
        summary=(
            "Cuts each dense FFN into blocks that every token switches on or off through its "
            "own sigmoid gates."
        ),
        status="works",
        uses=("conversion:dsmoe", "router:sigmoid-threshold", "experts:gated", "loss:sparsity"),
        check="tests/conversion/test_dsmoe.py",
        evidence="evidence/dsmoe.json",
        use_when=(
            "A dense model exists, its compute is too much, and some training is possible: blocks "
            "are cut out of its own networks and each token switches them on by itself. --preset "
            "paper is the paper; the defaults are what measured better."
        ),
        cost=(
            "A router of D by n weights a layer. A training step costs what the dense one costs, "
            "because a block that is off still teaches its gate; the saving is at inference, and "
            "small models gain little from it."
        ),
        traps=(
            "The start is not the dense model with random gates: expect a loss that training has "
            "to repair. Routers fitted to block outputs start near it.",
            "How much is on comes out of training; a comparison at unequal activity means nothing. "
            "A requested fraction is held by a controller.",
            "Skipping blocks that are off in training drops the straight-through gradient, which "
            "is the method; that is the estimator hard-skip, under its own name.",
            "A gate near the threshold flips the scale n / c; gates are computed in float32.",
            "Padding belongs in no statistic and in no loss.",
            "A later, unrelated method, Domain Steering MoE, has the same short name.",
        ),
        example=("examples/paper.yaml",),
    ),
    System(
        id="union-of-experts",
        name="Union of Experts",
        title=(
            "Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer"
        ),
        arxiv="2503.02495",
        home=("conversion", "nn"),
        parts=("attention and FFN decomposition", "routers"),
        summary=(
            "Decomposes attention and FFN into equal experts, each of which sees only its "
            "share of the tokens."
        ),
        status="works",
        uses=("router:data-selection", "experts:plain"),
        check="tests/nn/test_union_of_experts.py",
        evidence="evidence/union_of_experts.json",
        use_when=(
            "Experts should each see their share of every sequence, attention heads among them. "
            "Not for decoding token by token: a share below one looks at later tokens."
        ),
        cost=(
            "With a capacity of 1 that of top-k. Attention whose heads are experts computes and "
            "masks every head here, so it saves nothing yet."
        ),
        traps=(
            "With `capacity` below 1 a token's experts depend on later tokens of its sequence: "
            "causal models are measured with what they will not have when they write.",
            "Scores divided by their sum over a batch would make a token depend on other "
            "sequences; here they are not.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "",
            'options = {"top_k": 2, "capacity": 1.0}',
            "config = LayerConfig(",
            '    num_experts=8, width=16, router="data-selection", router_options=options',
            ")",
            "MoELayer(64, config)(torch.randn(2, 5, 64))",
        ),
    ),
    System(
        id="read-me",
        name="Read-ME",
        title=(
            "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System "
            "Co-Design"
        ),
        arxiv="2410.19123",
        home=("conversion", "inference"),
        parts=("conversion", "pre-gating router", "scheduling"),
        summary=(
            "Cuts a dense model into domain experts and routes each token once, before the "
            "model runs."
        ),
    ),
    System(
        id="bam",
        name="BAM",
        title=(
            "BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts"
        ),
        arxiv="2408.08274",
        home=("conversion",),
        parts=("attention experts", "upcycling"),
        summary=(
            "Upcycles several fine-tuned copies of a dense model, keeping the attention of "
            "each as well as its FFN."
        ),
    ),
    System(
        id="mote",
        name="MoTE",
        title="MoTE: Mixture of Ternary Experts for Memory-efficient Large Multimodal Models",
        arxiv="2506.14435",
        home=("conversion", "nn"),
        parts=("ternary experts", "upcycling"),
        summary="Upcycles a dense model with added experts that store ternary weights.",
    ),
)
