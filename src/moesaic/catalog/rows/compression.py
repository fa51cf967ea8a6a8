"""Systems that make a mixture smaller (floor `compression`) or say what to protect (`analysis`)."""

from moesaic.catalog._system import System

SYSTEMS = (
    System(
        id="compressed-experts",
        name="Compressed Experts",
        title="Efficiently Editing Mixture-of-Experts Models with Compressed Experts",
        arxiv="2503.00634",
        home=("compression",),
        parts=("experts", "editing"),
        summary="Replaces the weaker half of a token's experts by one learned vector each.",
    ),
    System(
        id="mc-moe",
        name="MC-MoE",
        title="Mixture Compressor for Mixture-of-Experts LLMs Gains More",
        arxiv="2410.06270",
        home=("compression",),
        parts=("mixed-precision", "skipping"),
        summary=(
            "Gives each expert its own bit width and skips second experts that add little, "
            "without training."
        ),
    ),
    System(
        id="mc-sharp",
        name="MC#",
        title="MC#: Mixture Compressor for Mixture-of-Experts Large Models",
        arxiv="2510.10962",
        home=("compression",),
        parts=("mixed-precision", "learned skipping"),
        summary=(
            "Combines mixed-precision experts with a learned per-token mask, for language and "
            "vision models."
        ),
    ),
    System(
        id="quantmoe-bench",
        name="QuantMoE-Bench",
        title="QuantMoE-Bench: Examining Post-Training Quantization for Mixture-of-Experts",
        arxiv="2406.08155",
        home=("compression",),
        parts=("bit allocation",),
        summary=(
            "Measures which parts of a mixture deserve more bits, with two data-driven "
            "scorers that choose them."
        ),
    ),
    System(
        id="eaquant",
        name="EAQuant",
        title=(
            "EAQuant: Enhancing Post-Training Quantization for MoE Models via Expert-Aware "
            "Optimization"
        ),
        arxiv="2506.13329",
        home=("compression",),
        parts=("quantisation",),
        summary=(
            "Quantises weights and activations while keeping the router's choices and "
            "calibrating rarely used experts."
        ),
    ),
    System(
        id="d2moe",
        name="D2MoE",
        title=(
            "D2MoE: Dual Routing and Dynamic Scheduling for Efficient On-Device MoE-based LLM "
            "Serving"
        ),
        arxiv="2504.15299",
        home=("compression", "inference"),
        parts=("nested quantisation", "bit router", "scheduling"),
        summary=(
            "Chooses per token both the expert and how many of its bits to load, for serving "
            "on small devices."
        ),
    ),
    System(
        id="heapr",
        name="HEAPr",
        title="HEAPr: Hessian-based Efficient Atomic Expert Pruning in Output Space",
        arxiv="2509.22299",
        home=("compression",),
        parts=("pruning",),
        summary="Prunes single neurons of experts by a second-order score in output space.",
    ),
    System(
        id="mc-smoe",
        name="M-SMoE and MC-SMoE",
        title="Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy",
        arxiv="2310.01334",
        home=("compression",),
        parts=("merging", "low rank"),
        summary=(
            "Merges similar experts by routing statistics, then makes the merged ones low "
            "rank plus sparse."
        ),
    ),
    System(
        id="sub-moe",
        name="Sub-MoE",
        title="Sub-MoE: Efficient Mixture-of-Expert LLMs Compression via Subspace Expert Merging",
        arxiv="2506.23266",
        home=("compression",),
        parts=("merging",),
        summary="Merges experts of a trained mixture inside a shared SVD subspace.",
    ),
    System(
        id="stun",
        name="STUN",
        title="STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning",
        arxiv="2409.06211",
        home=("compression",),
        parts=("pruning",),
        summary=(
            "Removes redundant experts without running them, then prunes weights inside those "
            "that stay."
        ),
    ),
    System(
        id="easy-ep",
        name="EASY-EP",
        title=(
            "Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot "
            "Demonstrations"
        ),
        arxiv="2504.06792",
        home=("compression",),
        parts=("pruning",),
        summary=(
            "Keeps only the experts a domain needs, found in one forward pass over a few "
            "example dialogues."
        ),
    ),
    System(
        id="premoe",
        name="PreMoe",
        title="PreMoe: Lightening MoEs on Constrained Memory by Expert Pruning and Retrieval",
        arxiv="2505.17639",
        home=("compression", "inference"),
        parts=("pruning", "retrieval"),
        summary=(
            "Stores which experts each task uses, recognises the task from the prompt and "
            "loads only those."
        ),
    ),
    System(
        id="super-experts",
        name="Super Experts",
        title="Unveiling Super Experts in Mixture-of-Experts Large Language Models",
        arxiv="2507.23279",
        home=("analysis",),
        parts=("profiling", "protect list"),
        summary=(
            "Finds the few experts whose removal destroys a model, so every compressor can "
            "protect them."
        ),
    ),
    System(
        id="moe-lrc",
        name="Local routing consistency",
        title=(
            "Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture- "
            "of-Expert Models"
        ),
        arxiv="2505.16056",
        home=("analysis",),
        parts=("metrics",),
        summary=(
            "Tells from a routing trace whether a model gains from expert offloading, and how "
            "large a cache it needs."
        ),
    ),
)
