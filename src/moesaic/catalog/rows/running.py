"""Systems that train, place, serve and run mixtures faster."""

from moesaic.catalog._system import System

SYSTEMS = (
    System(
        id="evomoe",
        name="EvoMoE",
        title=(
            "EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate"
        ),
        arxiv="2112.14397",
        home=("training", "nn"),
        parts=("schedule", "router"),
        summary=(
            "Grows a mixture from one trained expert, then anneals its gate from dense to sparse."
        ),
        status="works",
        uses=(
            "conversion:sparse-upcycling",
            "router:dense-to-sparse",
            "schedule:linear",
            "schedule:exponential",
            "loss:load-balance",
        ),
        check="tests/nn/test_dense_to_sparse.py",
        evidence="evidence/evomoe.json",
        use_when=(
            "A trained dense model should become a mixture of one active expert, and there are "
            "steps left to train it. Not for a mixture that is to be used at once."
        ),
        cost=(
            "At first every expert runs for every token, E times the work; it falls with the "
            "temperature to one expert, as in evaluation. The networks take as much memory as "
            "there are copies."
        ),
        traps=(
            "Training mixes several experts and evaluation uses one: leave a good part of the "
            "steps after `soft_steps`.",
            "With `weight: softmax` a single expert may weigh little more than 1 / E, and outputs "
            "shrink as the gate grows sparse; the noisy weights sharpen with it.",
            "Copies that are alike, with equal scores, learn alike under a dense gate: mask them, "
            "or leave it to the noise.",
            "A training loop of your own has to call `end_step`, or the gate stays dense.",
        ),
        example=(
            "from moesaic import SparseUpcycling",
            "",
            'temperature = {"start": 2.0, "end": 0.3, "steps": 1000}',
            "SparseUpcycling(",
            "    copies=8,",
            "    top_k=1,",
            "    active=1.0,",
            '    router="dense-to-sparse",',
            '    router_options={"temperature": temperature, "soft_steps": 1000},',
            '    diversify="mask",',
            ")",
        ),
    ),
    System(
        id="expertweave",
        name="ExpertWeave and ESFT",
        title="ExpertWeave: Efficiently Serving Expert-Specialized Fine-Tuned Adapters at Scale",
        arxiv="2508.17624",
        home=("serving",),
        parts=("adapters",),
        summary=(
            "Tunes only the experts that a task uses, and serves many such tunings on one "
            "copy of the base model."
        ),
    ),
    System(
        id="modes",
        name="MoDES",
        title=(
            "MoDES: Accelerating Mixture-of-Experts Multimodal Large Language Models via "
            "Dynamic Expert Skipping"
        ),
        arxiv="2511.15690",
        home=("inference",),
        parts=("skipping",),
        summary=(
            "Skips unimportant experts per token in multimodal models, with separate "
            "thresholds for text and image."
        ),
    ),
    System(
        id="edgemoe",
        name="EdgeMoE",
        title="EdgeMoE: Fast On-Device Inference of MoE-based Large Language Models",
        arxiv="2308.14352",
        home=("inference/offload",),
        parts=("bit widths", "cache", "preload"),
        summary=(
            "Runs a mixture on a small device: experts on storage, mixed bit widths, "
            "preloading by statistics."
        ),
    ),
    System(
        id="hobbit",
        name="HOBBIT",
        title="HOBBIT: A Mixed Precision Expert Offloading System for Fast MoE Inference",
        arxiv="2411.01433",
        home=("inference/offload",),
        parts=("mixed precision", "prefetch", "cache"),
        summary=(
            "Loads a low-bit copy of less important experts on a cache miss, so an offloaded "
            "model decodes faster."
        ),
    ),
    System(
        id="hybrimoe",
        name="HybriMoE",
        title=(
            "HybriMoE: Hybrid CPU-GPU Scheduling and Cache Management for Efficient MoE Inference"
        ),
        arxiv="2504.05897",
        home=("inference/offload",),
        parts=("CPU-GPU schedule", "prefetch", "cache"),
        summary=(
            "Splits the experts of a layer between CPU and GPU as they run, with prefetch by "
            "simulated benefit."
        ),
    ),
    System(
        id="expertflow",
        name="ExpertFlow",
        title=(
            "ExpertFlow: Optimized Expert Activation and Token Allocation for Efficient "
            "Mixture-of-Experts Inference"
        ),
        arxiv="2410.17954",
        home=("inference/offload",),
        parts=("routing-path predictor", "token scheduling"),
        summary=(
            "Predicts the expert route of every token beforehand and regroups tokens so "
            "batches share experts."
        ),
    ),
    System(
        id="elasticmoe",
        name="ElasticMoE",
        title="ElasticMoE: An Efficient Auto Scaling Method for Mixture-of-Experts Models",
        arxiv="2510.02613",
        home=("serving",),
        parts=("elastic scaling",),
        summary="Grows or shrinks a serving instance by a few accelerators without stopping it.",
    ),
    System(
        id="exflow",
        name="ExFlow",
        title=(
            "Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model "
            "Inference"
        ),
        arxiv="2401.08383",
        home=("placement",),
        parts=("integer program", "context-coherent parallelism"),
        summary=(
            "Places experts so that tokens tend to stay on their device, saving one exchange "
            "per layer."
        ),
    ),
    System(
        id="moetuner",
        name="MoETuner",
        title=(
            "MoETuner: Optimized Mixture of Expert Serving with Balanced Expert Placement and "
            "Token Routing"
        ),
        arxiv="2502.06643",
        home=("placement",),
        parts=("integer programs",),
        summary=(
            "Assigns experts to devices by two integer programs: equal work first, then even "
            "and cheap traffic."
        ),
    ),
    System(
        id="scmoe",
        name="Self-contrast decoding (SCMoE)",
        title="Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast",
        arxiv="2405.14507",
        home=("inference/decoding",),
        parts=("decoding",),
        summary=(
            "Decodes by contrasting normal routing with a deliberately weak routing of the "
            "same model."
        ),
    ),
    System(
        id="rewiring-experts",
        name="Rewiring Experts on the Fly",
        title=(
            "Rewiring Experts on the Fly: Continuous Rerouting for Better Online Adaptation "
            "in Mixture-of-Expert Models"
        ),
        arxiv="2510.14853",
        home=("inference/adaptation",),
        parts=("test-time routing",),
        summary=(
            "Tunes a small additive vector on router logits during generation, from the text "
            "seen so far."
        ),
    ),
    System(
        id="se-moe",
        name="SE-MoE",
        title=(
            "SE-MoE: A Scalable and Efficient Mixture-of-Experts Distributed Training and "
            "Inference System"
        ),
        arxiv="2205.10034",
        home=("training", "inference"),
        parts=("prefetch", "ring offload"),
        summary=(
            "Trains and serves models larger than device memory with tiered storage and a "
            "ring of expert slots."
        ),
    ),
    System(
        id="hecate",
        name="Hecate (FSSDP)",
        title=(
            "Hecate: Unlocking Efficient Sparse Model Training via Fully Sharded Sparse Data "
            "Parallelism"
        ),
        arxiv="2502.02581",
        home=("training/distributed",),
        parts=("sharding", "sparse collectives"),
        summary=(
            "Shards experts fully and rebuilds the best replica placement in every training step."
        ),
    ),
    System(
        id="lsh-moe",
        name="LSH-MoE",
        title="LSH-MoE: Communication-efficient MoE Training via Locality-Sensitive Hashing",
        arxiv="2411.08446",
        home=("training/distributed",),
        parts=("compressed all-to-all",),
        summary=(
            "Sends one centroid per bucket of similar tokens in place of every token in "
            "expert-parallel training."
        ),
    ),
    System(
        id="sonicmoe",
        name="SonicMoE",
        title="SonicMoE: Accelerating MoE with IO and Tile-aware Optimizations",
        arxiv="2512.14080",
        home=("ops",),
        parts=("kernels", "token rounding"),
        summary=(
            "Keeps activation memory independent of expert granularity, and rounds routing to "
            "whole tiles."
        ),
    ),
    System(
        id="deepspeed-moe-multitask",
        name="Multitask multilingual MoE training",
        title="Scalable and Efficient MoE Training for Multitask Multilingual Models",
        arxiv="2109.10465",
        home=("training",),
        parts=("parallelism", "expert aggregation", "pruning"),
        summary=(
            "Trains with capacity, random token selection, expert aggregation and pruning "
            "under five parallelisms."
        ),
    ),
    System(
        id="amd-full-stack",
        name="ZAYA1 on a full AMD stack",
        title=(
            "Training Foundation Models on a Full-Stack AMD Platform: Compute, Networking, "
            "and System Design"
        ),
        arxiv="2511.17127",
        home=("training", "nn"),
        parts=("model", "sizing rules", "reshaping"),
        summary=(
            "Builds a mixture with an MLP router, skip expert and residual scaling, and sizes "
            "it for the machine."
        ),
    ),
)
