"""A whole layer for the native code: its router, its experts and what is always on, in one call.

Shapes: T tokens, E experts, S scores, D model width, R rank of the bypass.
"""

from __future__ import annotations

import ctypes
from typing import get_args

from torch import Tensor

from moesaic._errors import InputError
from moesaic.ops.choice import Choice, Gate, Normalize, Rule, ScoreMap
from moesaic.ops.cpu import library, operators, structs
from moesaic.ops.cpu.packed import PackedExperts, PackedLinear, exact_format_of, pointer
from moesaic.ops.cpu.run import run_layer

# In the orders of the enums in routing.h.
_RULES = ("above", "highest", "highest-of-each", "cumulated")
_GATES = ("sigmoid", "softmax", "one")
_NORMALIZE = ("none", "sum", "count")
assert set(_RULES) == set(get_args(Rule))
assert set(_GATES) == set(get_args(Gate))
assert set(_NORMALIZE) == set(get_args(Normalize))


class PackedRouter:
    """A router of linear scores, packed.

    Args:
        score_map: Its tensors; the map is not kept.
        choice: How it decides.

    Attributes:
        choice: How it decides.
    """

    def __init__(self, score_map: ScoreMap, choice: Choice) -> None:
        # Scores decide, so nothing is rounded.
        weight_SD = score_map.weight
        scores = PackedLinear(weight_SD, score_map.bias, exact_format_of(weight_SD.dtype))
        kept = [
            None if x is None else x.detach().float().contiguous()
            for x in (score_map.choice_bias, score_map.factor)
        ]
        self.parts = [*scores.parts, *kept]
        self.struct = structs.Router(
            scores=scores.struct,
            choice_bias=pointer(kept[0]),
            factor=pointer(kept[1]),
            num_scores=scores.num_outputs,
        )
        self.choice = choice
        set_choice(self.struct, choice)


def set_choice(struct: structs.Router, choice: Choice) -> None:
    """Let a router decide so from now on."""
    struct.rule = _RULES.index(choice.rule)
    struct.gate = _GATES.index(choice.gate)
    struct.normalize = _NORMALIZE.index(choice.normalize)
    struct.threshold, struct.scale = choice.threshold, choice.scale
    struct.by_gate, struct.lowest_first = choice.by_gate, choice.lowest_first
    struct.top_k, struct.groups = choice.top_k, choice.num_groups
    struct.top_groups = choice.top_groups


class PackedFfn:
    """A layer, packed. What it lacks is none.

    Args:
        router: Of the experts; without one, whoever calls the experts routes.
        experts: The routed ones.
        shared: Those that are always on.
        output_bias_D: [D].
        bypass: Its maps from D to R and back.

    Raises:
        InputError: If experts and a router do not go together.
    """

    def __init__(
        self,
        *,
        router: PackedRouter | None = None,
        experts: PackedExperts | None = None,
        shared: PackedExperts | None = None,
        output_bias_D: Tensor | None = None,
        bypass: tuple[PackedLinear, PackedLinear] | None = None,
    ) -> None:
        if router is not None and (
            experts is None or experts.num_experts > router.struct.num_scores
        ):
            raise InputError(
                f"a router of {router.struct.num_scores} scores needs as many experts or fewer, "
                f"got {0 if experts is None else experts.num_experts}; give it its own"
            )
        bias_D = None if output_bias_D is None else output_bias_D.detach().float().contiguous()
        down, up = bypass or (None, None)
        self.struct = structs.Ffn(output_bias=pointer(bias_D))
        self.parts: list[Tensor | None] = [bias_D]
        for name, kind, part in (
            ("router", structs.Router, router),
            ("experts", structs.Experts, experts),
            ("shared", structs.Experts, shared),
            ("bypass_down", structs.Linear, down),
            ("bypass_up", structs.Linear, up),
        ):
            if part is not None:
                setattr(self.struct, name, part.struct)
            self.parts += [None] * structs.num_pointers(kind) if part is None else part.parts
        self.choice = None if router is None else router.choice

        self.width = structs.width_of(self.struct)
        self._taken = operators.take_apart(self.struct, self.parts)
        self._reference = ctypes.byref(self.struct)
        self._function = library.library().moesaic_layer

    def __call__(self, h: Tensor, sources: operators.Sources = operators.NO_SOURCES) -> Tensor:
        """Apply the layer to tokens. Inference only; sums are in float32.

        What a token gets does not depend, to the last bit, on the tokens beside it.

        Args:
            h: Inputs on the CPU, [..., D].
            sources: The weights that must be unchanged when a compiled graph runs.

        Returns:
            Outputs, in the shape and dtype of h.
        """
        if h.shape[-1] != self.width or not h.is_cpu:
            raise InputError(
                f"native code needs inputs of shape [..., {self.width}] on the CPU, got "
                f"{tuple(h.shape)} on {h.device}"
            )
        if operators.traced(h):
            return operators.layer(self._taken, h, sources)
        return run_layer(self._function, self._reference, self.width, h)

    def decide_by(self, choice: Choice) -> None:
        """Let its router decide so from now on."""
        self.choice = choice
        set_choice(self.struct.router, choice)
        self._taken = operators.take_apart(self.struct, self.parts)
