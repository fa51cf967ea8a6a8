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
        status="works",
        uses=("router:growing-top-k", "schedule:linear"),
        check="tests/nn/test_rexmoe.py",
        evidence="evidence/rexmoe.json",
        use_when=(
            "A model is trained from scratch and memory for more experts is short: every router "
            "gets a choice 2 to 4 times as large for its own rows alone."
        ),
        cost=(
            "The work of a top-k layer for a token, and (r - 1) N D router weights more in each of "
            "the layers. Batches touch more experts in a layer, so that more weights are read, and "
            "experts are computed in r calls."
        ),
        traps=(
            "The paper's formula for groups, taken literally, gives windows that overlap and drift "
            "away from the layer; its text, and this, mean groups of layers in a row.",
            "Most of the published gain is the growing pool's, and large groups collapse onto few "
            "experts: stay at 2 to 4 layers.",
            "Masking after the softmax shrinks the weights while the pool is small; masking before "
            "it does not. The first is the paper's.",
            "A group has to stay on one stage of a pipeline, and an expert is trained by inputs "
            "from several depths.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "from moesaic.nn.layer import link_layers",
            "",
            'options = {"top_k": 2, "initial": 8, "start_step": 100, "end_step": 300}',
            "config = LayerConfig(",
            '    num_experts=8, width=32, reuse=2, router="growing-top-k", router_options=options',
            ")",
            "layers = torch.nn.Sequential(MoELayer(64, config), MoELayer(64, config))",
            "link_layers(layers)",
            "layers(torch.randn(2, 5, 64))",
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
        status="works",
        uses=("router:recurrent-top-k", "loss:load-balance"),
        check="tests/nn/test_recurrent_top_k.py",
        evidence="evidence/rmoe.json",
        use_when=(
            "A deep mixture is trained from scratch for long and layers should decide with the "
            "layers before in view. It needs every layer in one pass, with gradients between them."
        ),
        cost=(
            "Router weights L P D + 6 P^2 + L E P in the place of L E D, at P = 128 usually more; "
            "the cell runs once for a token and layer. Nothing is cached between tokens."
        ),
        traps=(
            "Without the gradient through the state (detached, or gradient checkpointing, which is "
            "refused here) the published gain turns into a loss.",
            "Two small maps follow each other: fresh weights that suit a wide model leave a narrow "
            "one with scores close to zero, and it learns late.",
            "The released cell does not run as it is, and renormalises the weights where the "
            "paper does not; both ways are settings here.",
            "Stages of a pipeline have to send the state along with the hidden states.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "from moesaic.nn.layer import link_layers, pass_state",
            "",
            "configs = [",
            "    LayerConfig(",
            '        num_experts=8, width=32, router="recurrent-top-k",',
            '        router_options={"size": 16, "first": index == 0},',
            "    )",
            "    for index in range(2)",
            "]",
            "layers = torch.nn.Sequential(*(MoELayer(64, config) for config in configs))",
            "link_layers(layers)",
            "with pass_state(layers):",
            "    layers(torch.randn(2, 5, 64))",
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
        status="works",
        uses=("router:topk-softmax", "loss:load-balance"),
        check="tests/nn/test_chain_of_experts.py",
        evidence="evidence/chain_of_experts.json",
        use_when=(
            "A sparse mixture is trained from scratch and depth is worth more than latency: the "
            "same experts, fewer at a time, build on each other's output. It gives nothing where "
            "all experts are chosen anyway."
        ),
        cost=(
            "Iterations times k experts for a token, and as many runs of what is shared; one more "
            "router, N D weights, for each iteration. The iterations wait for each other, and "
            "with expert parallelism each has its own exchange."
        ),
        traps=(
            "K is the total in the paper's formula and that of one iteration in its code; here "
            "top_k is that of one iteration.",
            "A shared expert runs in every iteration: compare calls of experts and not only k.",
            "The released code replaces the residual stream by its normalised copy in every "
            "layer, which hurts deep models. Here the decoder's residual stays.",
            "With one router for all iterations the published gain turns into a loss.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "",
            "config = LayerConfig(",
            '    num_experts=16, width=32, router="topk-softmax",',
            '    router_options={"top_k": 2, "renormalize": False},',
            '    iterations=2, iteration_residual="change",',
            ")",
            "MoELayer(64, config)(torch.randn(2, 5, 64))",
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
        status="works",
        uses=(
            "experts:gru",
            "experts:plain",
            "router:straight-through-top-k",
            "loss:entropy",
            "loss:diversity",
        ),
        check="tests/nn/test_mixed_experts.py",
        evidence="evidence/hecto.json",
        use_when=(
            "Whole inputs differ in what decides them, order in some and content in others, and it "
            "should be seen which was used. It routes inputs, not the tokens of a language model."
        ),
        cost=(
            "One expert runs for each input. The recurrent one reads its sequence position after "
            "position and takes far longer than the feed-forward one, so a mean over both hides "
            "the cost of a route."
        ),
        traps=(
            "The gate hears only of the expert that ran, so it may keep a wrong choice for good: "
            "`soft_steps`, which the paper has not, let it compare first.",
            "Collapse onto the recurrent expert, which can do everything, is the natural failure; "
            "keep the diversity loss on and watch the mean probabilities.",
            "The entropy of single inputs should be small and that of the batch mean large; with a "
            "batch of one input the two losses work against each other.",
            "Padding has to stand behind a sequence: the last valid state is what counts.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "from moesaic.nn.routers._base import RouterState",
            "from moesaic.nn.sequences import Sequences",
            "",
            "config = LayerConfig(",
            "    num_experts=2,",
            "    width=32,",
            '    router="straight-through-top-k",',
            '    experts=("plain", "gru"),',
            '    activation="tanh",',
            "    bias=True,",
            "    expert_bias=True,",
            ")",
            "sequences = Sequences(torch.randn(3, 7, 64), torch.tensor([7, 4, 2]))",
            "layer = MoELayer(64, config)",
            "pooled = sequences.values_TSD[:, 0]",
            "layer(pooled, RouterState(sequences=sequences))",
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
        status="works",
        uses=("router:progressive-top-k", "schedule:switch", "loss:load-balance"),
        check="tests/nn/test_progressive_top_k.py",
        evidence="evidence/sigma_moe_tiny.json",
        use_when=(
            "One or two of very many experts are active, and the lowest layers stay uneven under a "
            "balance loss that looks satisfied. Not where k is a fair part of the experts."
        ),
        cost=(
            "More experts per token in a few layers for most of the training, nothing in "
            "evaluation and no weights. The loss and the loads of those layers jump for a while at "
            "the switch."
        ),
        traps=(
            "With k = 1 a softmax after the choice gives a weight of one and teaches the router "
            "nothing: weights here are probabilities among all experts, in both stages.",
            "Count the loads of the balance loss as a share of choices (`share_of: choices`), or "
            "its scale changes at the switch.",
            "A z-loss keeps scores small, which is also how a balance loss is met without balance.",
            "A training loop of your own has to call `end_step`, or the early stage never ends.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "",
            'options = {"top_k": 1, "early_top_k": 8, "early_steps": 900}',
            "config = LayerConfig(",
            '    num_experts=96, width=32, router="progressive-top-k", router_options=options',
            ")",
            "MoELayer(64, config)(torch.randn(2, 5, 64))",
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
        status="works",
        uses=("router:soft-trees", "router:permutation-search", "schedule:exponential"),
        check="tests/nn/test_soft_trees.py",
        evidence="evidence/comet.json",
        use_when=(
            "Few experts, short training and a gate that should be differentiable until it has "
            "decided: recommenders, small classifiers. The search suits any sparse router that "
            "starts badly."
        ),
        cost=(
            "Training begins dense: every expert runs until the splits have decided, and during "
            "the search whatever the router. The search adds up to 150 rounds over an E x E matrix "
            "and an assignment of E cubed steps to every step."
        ),
        traps=(
            "Too large an entropy coefficient freezes trees before they are good; a decided split "
            "has no gradient, and all inputs may end in one leaf.",
            "The softmax runs over the leaves of all trees together; one for each tree would be "
            "another method.",
            "At the last temperature float32 is too coarse for the search, which is done in "
            "float64.",
            "A training loop of your own has to call `end_step`, or the search never ends.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "",
            'trees = {"router": "soft-trees", "options": {"num_trees": 2}, "search_steps": 100}',
            "config = LayerConfig(",
            '    num_experts=9, width=32, router="permutation-search", router_options=trees',
            ")",
            "MoELayer(64, config)(torch.randn(2, 5, 64))",
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
        status="works",
        uses=("router:stochastic", "loss:consistency"),
        check="tests/nn/test_thor.py",
        evidence="evidence/thor.json",
        use_when=(
            "Routing must cost and learn nothing and load must be even by chance: one expert for a "
            "token, any of which will do, or their mean. Not where experts should specialise."
        ),
        cost=(
            "Two passes in each training step, each at the work of the dense model, whatever the "
            "number of experts; one expert for a token afterwards. No router weights."
        ),
        traps=(
            "The released code draws by position where it means by sentence, and computes all "
            "experts in evaluation; here a sequence keeps its draw and only drawn experts run.",
            "The consistency is a mean over tokens, as the language loss is: a coefficient of sums "
            "over one of the two does not carry over.",
            "Draws by token come from torch's global generator: evaluation repeats only when it is "
            "seeded.",
            "In training the loss of the model holds the language loss of both passes.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "",
            "config = LayerConfig(",
            '    num_experts=4, width=32, router="stochastic",',
            '    router_options={"evaluation": "sequence"},',
            ")",
            "MoELayer(64, config).eval()(torch.randn(2, 5, 64))",
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
        status="works",
        uses=("experts:latent-gated", "compression:latent-experts"),
        check="tests/nn/test_latent_experts.py",
        evidence="evidence/mole_latent_experts.json",
        use_when=(
            "Many narrow experts in a wide model, whose weights are to shrink. Not where an expert "
            "is as wide as the model, nor for blocks cut from one dense network, which have little "
            "in common."
        ),
        cost=(
            "Groups of N experts have fewer weights where the model is wider than an expert by "
            "more than N / (N - 1). One more product per token and group; the decode engine and "
            "stock formats take the factors multiplied out."
        ),
        traps=(
            "A factorisation that is best for the weights is not best for outputs: measure those.",
            "Errors of gate and up multiply, since one passes through the activation.",
            "Cutting the rank first changes the model even where the common projection is exact.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "",
            "config = LayerConfig(",
            '    num_experts=8, width=16, router="topk-softmax", experts="latent-gated",',
            '    experts_options={"group_size": 4},',
            ")",
            "MoELayer(64, config)(torch.randn(2, 5, 64))",
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
        status="works",
        uses=("experts:subspace", "router:task-top-k"),
        check="tests/nn/test_subspace.py",
        evidence="evidence/cdsp_moe.json",
        use_when=(
            "Several tasks share one model, it is known in training which is which, and it should "
            "be seen in weights who shares with whom. Not where tasks look alike and only their "
            "labels differ: blind, no router tells them apart."
        ),
        cost=(
            "sqrt(E) times fewer weights than separate experts of the same width, at the same work "
            "for a token, and a gather of all experts' rows in each pass. A training step compares "
            "every two experts: E x B x D numbers for a while, for a backbone of B dimensions."
        ),
        traps=(
            "At the paper's weight of conflicts nearly all links fall, those of experts that "
            "co-operate too; what is left is a small difference. Lower it to keep sharing.",
            "An expert is wider than its own block, so it borrows about sqrt(E) - 1 others even "
            "where no link is left: pruning decides whose, and not whether.",
            "A conflict over a third expert's block lowers the link between the two, and not "
            "theirs to that block.",
            "Conflicts are those of the step before. They are in no checkpoint and forgotten at "
            "evaluation, at loading and after skipped steps: the next step then has none.",
            "A training loop of your own has to call `end_step`, or there is never a conflict, and "
            "has to take `parameter_groups`, or links move ten times too slowly and decay.",
            "With raw links and a cut-off, as in the released code, no link falls below one half.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "from moesaic.nn.groups import parameter_groups",
            "from moesaic.nn.layer import end_step, pass_state, record_routing",
            "",
            "config = LayerConfig(",
            '    num_experts=8, width=90, experts="subspace",',
            '    router="task-top-k", router_options={"num_tasks": 3},',
            ")",
            "layer = MoELayer(64, config)",
            "optimizer = torch.optim.AdamW(parameter_groups(layer, 5e-3), weight_decay=0.01)",
            "tasks = torch.tensor([0, 2])  # of two sequences",
            "with pass_state(layer, tasks=tasks), record_routing(layer) as routings:",
            "    out = layer(torch.randn(2, 5, 64))",
            "loss = out.square().mean() + sum(routings[0].aux.values())",
            "loss.backward()",
            "optimizer.step()",
            "end_step(layer)",
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
