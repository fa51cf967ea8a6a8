"""Systems that decide which experts a token gets, and how many."""

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
        use_when=(
            "Tokens differ in how hard they are, and the mean number of experts matters while that "
            "of one token may vary: training, evaluation, batches large enough to average."
        ),
        cost=(
            "From one expert to all of them for a token; the mean follows the threshold and the "
            "entropy loss. No weights beside those of a top-k router. It saves nothing before "
            "training has made the probabilities sharp."
        ),
        traps=(
            "The weights are not divided by their sum: a token with a single expert would weigh it "
            "by exactly 1, and the router would learn nothing from it.",
            "Without the entropy loss nothing keeps the router from spreading its probability, and "
            "tokens then take more experts.",
            "Nothing bounds the experts of one token; the worst case of a server is all of them.",
            "Probabilities are added up in float32; in bfloat16 the sum passes the threshold "
            "elsewhere.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "",
            'options = {"threshold": 0.4}',
            "config = LayerConfig(",
            '    num_experts=8, width=32, router="top-p", router_options=options',
            ")",
            "MoELayer(64, config)(torch.randn(2, 5, 64))",
        ),
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
        use_when=(
            "Many tokens need little work, and less compute matters more than an exact number of "
            "experts: a smaller tau gives more choices to experts that cost nothing."
        ),
        cost=(
            "Up to top_k networks for a token, fewer where a free expert is chosen; three vectors "
            "of the model's width for each constant expert, and N by N weights a layer for the "
            "residual between the routers' N choices. How many networks run follows tau only "
            "roughly."
        ),
        traps=(
            "The released code differs from the paper in three ways: it renormalises without the "
            "zero expert, doubles the input of the experts and has a router of two layers. This is "
            "the paper's layer and does not load the released weights.",
            "More constant experts help up to a number and then take room from the networks.",
            "The scores of the layer before must be those of the same pass; a model of several "
            "layers gives them to its routers with pass_state.",
            "The balance loss has no factor N / K, so a coefficient tuned for another one does not "
            "carry over.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "",
            'options = {"top_k": 2, "num_constant": 2}',
            "config = LayerConfig(",
            '    num_experts=8, width=32, router="zero-computation", router_options=options',
            ")",
            "MoELayer(64, config)(torch.randn(2, 5, 64))",
        ),
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
        use_when=(
            "A new mixture is trained from scratch: at the same weights and the same work, many "
            "narrow experts and a few that are always on learn more than a few wide ones."
        ),
        cost=(
            "The networks of a top-k layer, cut finer: smaller products, which small hardware "
            "batches less well, and a router with as many more outputs. Shared neurons run for "
            "every token and count as active."
        ),
        traps=(
            "top_k counts the routed experts alone; a comparison has to count the shared ones as "
            "active too.",
            "Gates are not divided by their sum, which later models of the family do.",
            "The width of an expert is a part of a standard network's, 4 by 1408 in the 16B model, "
            "not of its dense first layer, which is wider.",
            "The released code balances each sequence by itself, the paper the batch; the loss "
            "here has a setting for either.",
            "The shared expert cannot be taken out again: the loss rises far more than without any "
            "routed one.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "",
            'options = {"top_k": 3, "renormalize": False}',
            "config = LayerConfig(",
            "    num_experts=8,",
            "    width=32,",
            "    shared_width=32,",
            '    router="topk-softmax",',
            "    router_options=options,",
            ")",
            "MoELayer(64, config)(torch.randn(2, 5, 64))",
        ),
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
        use_when=(
            "An existing mixture is tuned to use fewer experts where a token needs fewer, without "
            "a change to its experts."
        ),
        cost=(
            "At balance a token uses top_k * E / (E + M) of the E experts with M null ones: the "
            "two numbers are the knob. A null expert costs its row of the router and nothing else."
        ),
        traps=(
            "Null experts learn from the balance loss alone; its coefficient, strong at first and "
            "weak later, sets the load.",
            "The released code for Mixtral means to average over null experts and, by slicing the "
            "wrong axis, does not; the loss here is the paper's.",
            "Null rows copied from real ones tie with them, and the number of real experts then "
            "hangs on how a kernel breaks ties.",
            "Below about 1.3 experts a token the published quality falls apart.",
            "A token that chose null experts only passes the layer by its residual alone.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "",
            'options = {"top_k": 3, "num_null": 8}',
            "config = LayerConfig(",
            '    num_experts=8, width=32, router="null-experts", router_options=options',
            ")",
            "MoELayer(64, config)(torch.randn(2, 5, 64))",
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
        use_when=(
            "Experts are spread over devices and the slowest device sets the pace: every token "
            "gives every device the same number of experts."
        ),
        cost=(
            "That of top-k. The choice is bounded, so the probability it gathers is at most that "
            "of plain top-k, never more."
        ),
        traps=(
            "Equal work between devices says nothing about experts within one; the balance loss is "
            "still needed.",
            "The order of the experts is the grouping: pruning, merging or moving one changes the "
            "model unless groups stay whole.",
            "The softmax is over all experts before the choice; one per device gives other "
            "weights.",
            "Choosing a few groups first and experts inside them, as DeepSeek-V3 does, is the "
            "opposite bound.",
            "A published port takes k for the size of a group, which is right only where both are "
            "8.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "",
            'options = {"num_groups": 4, "per_group": 1}',
            "config = LayerConfig(",
            '    num_experts=8, width=32, router="grouped-top-k", router_options=options',
            ")",
            "MoELayer(64, config)(torch.randn(2, 5, 64))",
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
        use_when=(
            "Nothing here speaks for it yet: at our scale no setting balanced plain top-k, and "
            "plans cost loss. It is there to be tried at a larger scale, in place of a balance "
            "loss."
        ),
        cost=(
            "That of top-k, and in passes with a plan up to max_rounds rounds over a matrix of "
            "tokens by experts. At 0.01 of the passes that is not felt."
        ),
        traps=(
            "A plan balances mass; after the choice of the top k the counts are only roughly even.",
            "A plan looks at the whole batch, so evaluation and decoding never use one and what a "
            "token gets there is not balanced.",
            "Every local batch is balanced by itself; with fewer tokens than experts a plan forces "
            "bad choices.",
            "Equal gains tie, and a tie breaks by index, which is the worst balance of all; noise "
            "is what breaks it.",
            "Other balance losses are to be off.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "",
            'options = {"top_k": 2, "probability": 0.01}',
            "config = LayerConfig(",
            '    num_experts=8, width=32, router="selective-sinkhorn", router_options=options',
            ")",
            "MoELayer(64, config)(torch.randn(2, 5, 64))",
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
        use_when=(
            "Experts are to be evenly loaded without a loss that pulls at the model: the bias "
            "moves the choice alone and never a weight."
        ),
        cost=(
            "One number for each expert and one count of its tokens a step; nothing at inference, "
            "where the bias stands still."
        ),
        traps=(
            "The bias moves when an optimiser step ends, by all of its passes: a loop of one's own "
            "calls end_step.",
            "The step is in units of gates, 0.001 for sigmoids; it means something else for raw "
            "scores.",
            "The bias stays in float32: bfloat16 drops a step of 0.001 from 0.5 on.",
            "It balances batches, not sequences.",
            "A router that starts at zero ties everywhere, and the bias then swings the whole "
            "batch from side to side.",
        ),
        example=(
            "import torch",
            "from moesaic import LayerConfig, MoELayer",
            "from moesaic.nn.layer import end_step",
            "",
            'options = {"top_k": 2, "bias_step": 0.001}',
            "config = LayerConfig(",
            '    num_experts=8, width=32, router="sigmoid-top-k", router_options=options',
            ")",
            "layer = MoELayer(64, config)",
            "layer(torch.randn(2, 5, 64)).sum().backward()",
            "end_step(layer)  # after optimizer.step()",
        ),
    ),
)
