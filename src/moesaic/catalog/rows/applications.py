"""Systems of one domain, ensembles of whole models, and the surveys that serve as checklists."""

from moesaic.catalog._system import System

SYSTEMS = (
    System(
        id="dynamic-dino",
        name="Dynamic-DINO",
        title=(
            "Dynamic-DINO: Fine-Grained Mixture of Experts Tuning for Real-time Open- "
            "Vocabulary Object Detection"
        ),
        arxiv="2507.17436",
        home=("domains/vision",),
        parts=("conversion",),
        summary=(
            "Adds fine-grained experts to a small open-vocabulary detector without changing "
            "its first output."
        ),
    ),
    System(
        id="sparse-unified-model",
        name="Sparse Unified Model",
        title="Understanding and Harnessing Sparsity in Unified Multimodal Models",
        arxiv="2512.02351",
        home=("domains/multimodal",),
        parts=("probing", "conversion"),
        summary=(
            "Finds which half of a unified multimodal model can be cut and makes the fragile "
            "FFNs a sparse mixture."
        ),
    ),
    System(
        id="uni-moe",
        name="Uni-MoE",
        title="Uni-MoE: Scaling Unified Multimodal LLMs with Mixture of Experts",
        arxiv="2405.11273",
        home=("domains/multimodal",),
        parts=("training stages",),
        summary=(
            "Joins FFN experts trained per modality with a sparse router and light LoRA tuning."
        ),
    ),
    System(
        id="open-knowledge-moe",
        name="Open-Knowledge MoE",
        title="Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models",
        arxiv="2408.15915",
        home=("ensembles",),
        parts=("selection", "LoRA experts"),
        summary=(
            "Chooses public LoRAs and data from a few labelled examples and tunes them into a "
            "token-routed system."
        ),
    ),
    System(
        id="meta-dmoe",
        name="Meta-DMoE",
        title="Meta-DMoE: Adapting to Domain Shift by Meta-Distillation from Mixture-of-Experts",
        arxiv="2210.03885",
        home=("domains/vision",),
        parts=("test-time adaptation",),
        summary=(
            "Adapts a small student to an unlabelled domain in one step, distilling from "
            "domain experts."
        ),
    ),
    System(
        id="llava-dymoe",
        name="LLaVA-DyMoE",
        title=(
            "On Token's Dilemma: Dynamic MoE with Drift-Aware Token Assignment for Continual "
            "Learning of Large Vision Language Models"
        ),
        arxiv="2603.27481",
        home=("domains/continual",),
        parts=("router growth", "losses"),
        summary=(
            "Adds experts per task in continual tuning and keeps tokens that do not belong to "
            "the task away from them."
        ),
    ),
    System(
        id="moe-cl-theory",
        name="Theory on MoE in continual learning",
        title="Theory on Mixture-of-Experts in Continual Learning",
        arxiv="2406.16437",
        home=("domains/continual",),
        parts=("analysis", "training rule"),
        summary=(
            "Shows on a small exact model when experts stop forgetting, and when to freeze "
            "the router."
        ),
    ),
    System(
        id="hdee",
        name="HDEE",
        title="HDEE: Heterogeneous Domain Expert Ensemble",
        arxiv="2502.19385",
        home=("ensembles",),
        parts=("domain ensembles",),
        summary=(
            "Trains small domain models independently, with size or steps matched to how hard "
            "each domain is."
        ),
    ),
    System(
        id="composition-of-experts",
        name="Composition of Experts",
        title=(
            "Composition of Experts: A Modular Compound AI System Leveraging Large Language Models"
        ),
        arxiv="2412.01868",
        home=("ensembles",),
        parts=("two-step model router", "memory tiers"),
        summary=(
            "Answers each prompt with one whole expert model chosen by category, under a "
            "parameter limit."
        ),
    ),
    System(
        id="symbolic-moe",
        name="Symbolic-MoE",
        title=(
            "Symbolic Mixture-of-Experts: Adaptive Skill-based Routing for Heterogeneous Reasoning"
        ),
        arxiv="2503.05641",
        home=("ensembles",),
        parts=("skill recruiting", "batch strategy"),
        summary=(
            "Recruits for each question the models good at its skills, runs each once per "
            "batch, merges the answers."
        ),
    ),
    System(
        id="mixture-of-thoughts",
        name="Mixture of Thoughts",
        title=(
            "Mixture of Thoughts: Learning to Aggregate What Experts Think, Not Just What They Say"
        ),
        arxiv="2509.21164",
        home=("ensembles",),
        parts=("latent interaction",),
        summary=(
            "Lets frozen models answer together: small cross-attention layers read the hidden "
            "states of peers."
        ),
    ),
    System(
        id="mofme",
        name="MoFME",
        title=(
            "Efficient Deweather Mixture-of-Experts with Uncertainty-aware Feature-wise "
            "Linear Modulation"
        ),
        arxiv="2312.16610",
        home=("domains/vision",),
        parts=("feature-modulated experts", "router"),
        summary=(
            "Makes experts per-channel modulations of one shared block, weighted by an "
            "uncertainty-aware router."
        ),
    ),
    System(
        id="home",
        name="HoME",
        title="HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou",
        arxiv="2408.05430",
        home=("domains/recsys",),
        parts=("layer",),
        summary="Ranks many user behaviours with normalised experts in a hierarchy of gates.",
    ),
    System(
        id="gmope",
        name="GMoPE",
        title="GMoPE: A Prompt-Expert Mixture Framework for Graph Foundation Models",
        arxiv="2511.03251",
        home=("domains/graph",),
        parts=("prompt experts",),
        summary=(
            "Adapts a graph model to a new graph by tuning only the prompts its experts carry."
        ),
    ),
    System(
        id="switch-dit",
        name="Switch-DiT",
        title=(
            "Switch Diffusion Transformer: Synergizing Denoising Tasks with Sparse Mixture- "
            "of-Experts"
        ),
        arxiv="2403.09176",
        home=("domains/diffusion",),
        parts=("layer", "loss"),
        summary=(
            "Gives each noise level of a diffusion transformer its own sparse mixture of "
            "small experts."
        ),
    ),
    System(
        id="promoe",
        name="ProMoE",
        title=(
            "Routing Matters in MoE: Scaling Diffusion Transformers with Explicit Routing Guidance"
        ),
        arxiv="2510.24711",
        home=("domains/diffusion",),
        parts=("router", "loss"),
        summary=(
            "Separates conditional from unconditional tokens of a diffusion model, then "
            "routes by learned prototypes."
        ),
    ),
    System(
        id="switch-nerf-plus-plus",
        name="Switch-NeRF++",
        title=(
            "Learning Heterogeneous Mixture of Scene Experts for Large-scale Neural Radiance Fields"
        ),
        arxiv="2505.02005",
        home=("domains/nerf",),
        parts=("hash experts", "gate"),
        summary=(
            "Sends each 3D point of a large scene to one of several hash-grid experts of "
            "different resolution."
        ),
    ),
    System(
        id="psod",
        name="Pluralistic Salient Object Detection",
        title="Pluralistic Salient Object Detection",
        arxiv="2409.02368",
        home=("domains/vision",),
        parts=("task experts",),
        summary=(
            "Predicts several plausible masks per image and a score of each, with experts per task."
        ),
    ),
    System(
        id="unihgkr",
        name="UniHGKR",
        title="UniHGKR: Unified Instruction-aware Heterogeneous Knowledge Retrievers",
        arxiv="2410.20163",
        home=("domains/retrieval",),
        parts=("retriever",),
        summary=(
            "Retrieves text, tables, infoboxes and graph triples with one retriever that "
            "follows instructions."
        ),
    ),
    System(
        id="functional-hashing",
        name="Unified Functional Hashing",
        title="Unified Functional Hashing in Automatic Machine Learning",
        arxiv="2302.05433",
        home=("domains/retrieval",),
        parts=("functional hash", "equivalence cache"),
        summary=(
            "Recognises candidate models that compute the same function, so a search "
            "evaluates each once."
        ),
    ),
    System(
        id="graphhash",
        name="GraphHash",
        title="GraphHash: Graph Clustering Enables Parameter Efficiency in Recommender Systems",
        arxiv="2412.17245",
        home=("domains/recsys",),
        parts=("embedding tables",),
        summary=(
            "Shrinks embedding tables by sharing rows inside communities of the interaction graph."
        ),
    ),
    System(
        id="prompthash",
        name="PromptHash",
        title=(
            "PromptHash: Affinity-Prompted Collaborative Cross-Modal Learning for Adaptive "
            "Hashing Retrieval"
        ),
        arxiv="2503.16064",
        home=("domains/retrieval",),
        parts=("cross-modal hashing",),
        summary=(
            "Learns hash codes common to image and text with learned prompts and contrastive "
            "alignment."
        ),
    ),
    System(
        id="nlshblock",
        name="NLSHBlock",
        title="Neural Locality Sensitive Hashing for Entity Blocking",
        arxiv="2401.18064",
        home=("domains/retrieval",),
        parts=("learned hashing",),
        summary=(
            "Trains a language model to be the hash function that groups records of the same "
            "entity."
        ),
    ),
    System(
        id="survey-moe-inference",
        name="Survey: inference optimisation",
        title="A Survey on Inference Optimization Techniques for Mixture of Experts Models",
        arxiv="2412.14219",
        home=("catalog",),
        parts=("checklist",),
        summary="Checklist of technique classes that make inference of mixtures cheaper.",
    ),
    System(
        id="survey-moe",
        name="Survey: Mixture of Experts",
        title="A Survey on Mixture of Experts",
        arxiv="2407.06204",
        home=("catalog",),
        parts=("checklist",),
        summary=(
            "Checklist of algorithms, systems and applications of mixtures in language models."
        ),
    ),
    System(
        id="survey-moe-comprehensive",
        name="Survey: algorithms, theory, applications",
        title="A Comprehensive Survey of Mixture-of-Experts: Algorithms, Theory, and Applications",
        arxiv="2503.07137",
        home=("catalog",),
        parts=("checklist",),
        summary=(
            "Checklist of the paradigms other surveys leave out: continual, meta, multi-task, "
            "reinforcement, theory."
        ),
    ),
)
