"""The experts, by name.

Abilities: `factors`, what `weights` gives is computed from parameters of other shapes;
`orthogonal`, fresh matrices are orthogonal and not small; `step-losses`, its losses come from the
step before.
"""

from __future__ import annotations

from moesaic._registry import MethodInfo, MethodTable

EXPERTS = MethodTable(
    "experts",
    [
        MethodInfo(
            name="gated",
            target="moesaic.nn.experts.gated:GatedExperts",
            config="moesaic.nn.experts._base:ExpertsConfig",
            summary="down(act(gate h) * (up h)): Llama, Mistral, Qwen, Gemma, Phi, OLMo",
            paper="GLU variants, arXiv 2002.05202",
            abilities=frozenset({"feed-forward"}),
        ),
        MethodInfo(
            name="gru",
            target="moesaic.nn.experts.gru:GruExperts",
            config="moesaic.nn.experts._base:ExpertsConfig",
            summary="A GRU over the sequence behind the token; its last state, mapped",
            paper="Hecto, arXiv 2506.22919",
            abilities=frozenset({"sequences"}),
        ),
        MethodInfo(
            name="latent-gated",
            target="moesaic.nn.experts.latent:LatentGatedExperts",
            config="moesaic.nn.experts.latent:LatentExpertsConfig",
            summary="Gated experts whose groups share a projection into a latent space",
            paper="Mixture of Latent Experts, arXiv 2503.23100",
            abilities=frozenset({"factors", "feed-forward"}),
        ),
        MethodInfo(
            name="plain",
            target="moesaic.nn.experts.plain:PlainExperts",
            config="moesaic.nn.experts._base:ExpertsConfig",
            summary="down(act(up h)): GPT-2, OPT, GPT-NeoX",
            paper="Transformer, arXiv 1706.03762, section 3.3",
            abilities=frozenset({"feed-forward"}),
        ),
        MethodInfo(
            name="subspace",
            target="moesaic.nn.experts.subspace:SubspaceExperts",
            config="moesaic.nn.experts.subspace:SubspaceExpertsConfig",
            summary="Parts of one backbone; gradients in conflict cut who borrows whose part",
            paper="CDSP-MoE, arXiv 2512.20291",
            abilities=frozenset({"factors", "feed-forward", "orthogonal", "step-losses"}),
        ),
        MethodInfo(
            name="thresholded-gated",
            target="moesaic.nn.experts.thresholded:ThresholdedGatedExperts",
            config="moesaic.nn.experts.thresholded:ThresholdedConfig",
            summary="Gated experts that leave out inputs, gates and neurons under a threshold",
            paper="TEAL, arXiv 2408.14690",
            abilities=frozenset({"feed-forward"}),
        ),
        MethodInfo(
            name="thresholded-plain",
            target="moesaic.nn.experts.thresholded:ThresholdedPlainExperts",
            config="moesaic.nn.experts.thresholded:ThresholdedConfig",
            summary="Plain experts that leave out inputs and neurons under a threshold",
            paper="TEAL, arXiv 2408.14690",
            abilities=frozenset({"feed-forward"}),
        ),
    ],
)
