"""The bounds that a comparison shows beside its methods, by name.

A bound is applied like a compression, `apply(model, stats, config) -> (model, results)`; it is no
method, so it is never ranked. Abilities: `tells-active`, the model's layers do not show what is
left out, so `active` of the results says it; `trains`, it can be trained as methods are.
"""

from __future__ import annotations

from moesaic._registry import MethodInfo, MethodTable

BOUNDS = MethodTable(
    "bound",
    [
        MethodInfo(
            name="block-bound",
            target="moesaic.evaluation.bounds.block_bound:bound_blocks",
            config="moesaic.evaluation.bounds.block_bound:BlockBound",
            summary="The best blocks of every token, known from the outputs of all",
            paper="ours",
        ),
        MethodInfo(
            name="dense",
            target="moesaic.evaluation.bounds.dense:keep_dense",
            config="moesaic.evaluation.bounds.dense:Dense",
            summary="The dense parent, to be trained as methods are; nothing is left out",
            paper="ours",
            abilities=frozenset({"trains"}),
        ),
        MethodInfo(
            name="neuron-bound",
            target="moesaic.evaluation.bounds.neuron_bound:bound_neurons",
            config="moesaic.evaluation.bounds.neuron_bound:NeuronBound",
            summary="The best neurons of every token, known from what they contribute",
            paper="ours; by gate after CATS, arXiv 2404.08763",
            abilities=frozenset({"tells-active"}),
        ),
    ],
)
