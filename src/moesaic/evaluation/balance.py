"""How evenly a model uses its experts, from the counts of one reading of text.

Shapes: E experts of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moesaic.evaluation.activity import Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBalance:
    """Loads of the experts of one layer.

    Attributes:
        max_over_mean: Load of the busiest expert over the mean; 1 is even, E is one for all.
        entropy: Of the loads as shares, over its largest value log E: 1 is even, 0 is one for all.
        dead: Experts that no token used.
        experts: E.
    """

    max_over_mean: float
    entropy: float
    dead: int
    experts: int


def layer_balance(load_E: Sequence[float]) -> LayerBalance:
    """Measure one layer.

    Args:
        load_E: Tokens that used each expert, or shares of the tokens; none used counts as even
            nowhere: a ratio of 1, an entropy of 0 and all experts dead.
    """
    loads = np.asarray(load_E, np.float64)
    total = loads.sum()
    if total == 0:
        return LayerBalance(max_over_mean=1.0, entropy=0.0, dead=loads.size, experts=loads.size)
    shares = loads / total
    used = shares[shares > 0]
    # One expert is as even as it can be.
    entropy = 1.0 if loads.size == 1 else float(-(used * np.log(used)).sum() / np.log(loads.size))
    return LayerBalance(
        max_over_mean=float(shares.max() * loads.size),
        entropy=entropy,
        dead=int((loads == 0).sum()),
        experts=loads.size,
    )


def balance_section(activation: Activation) -> dict[str, Any] | None:
    """Measure every layer with a router, as plain data; none where there is none.

    Returns:
        Means over layers of `max_over_mean` and `entropy`, the sum of `dead` of all `experts`, and
        under `layers` what each has.
    """
    layers = [layer_balance(load_E) for load_E in activation.experts_per_layer() if load_E]
    if not layers:
        return None
    return {
        "max_over_mean": float(np.mean([layer.max_over_mean for layer in layers])),
        "entropy": float(np.mean([layer.entropy for layer in layers])),
        "dead": sum(layer.dead for layer in layers),
        "experts": sum(layer.experts for layer in layers),
        "layers": [asdict(layer) for layer in layers],
    }
