"""What the counts of some steps say about a layer, and what to do about it.

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moesaic.training.health.config import HealthConfig
from moesaic.training.health.watch import LayerSums

Kind = Literal["load", "dead", "entropy", "saturation"]
# Experts that a sentence names.
_NAMED = 8


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with one layer, in one sentence with its remedy."""

    kind: Kind
    layer: str
    sentence: str

    def plain(self) -> dict[str, Any]:
        """As it stands in the history."""
        return {"kind": self.kind, "layer": self.layer, "sentence": self.sentence}


def load(counts: Sequence[int]) -> float:
    """Load of the busiest expert over the mean; 1 is even, E is all on one. 0 without tokens."""
    return max(counts) * len(counts) / sum(counts) if any(counts) else 0.0


def dead(counts: Sequence[int], config: HealthConfig) -> list[int]:
    """Experts with next to no tokens; none where tokens are too few to tell."""
    mean = sum(counts) / len(counts)
    if mean < config.min_tokens:
        return []
    return [expert for expert, count in enumerate(counts) if count < config.dead_share * mean]


def join(parts: Iterable[LayerSums]) -> LayerSums:
    """Add up several stretches of one layer; means weigh by tokens."""
    parts = list(parts)
    tokens = sum(part.tokens for part in parts)

    def mean(values: Sequence[float | None]) -> float | None:
        known = [(v, p.tokens) for v, p in zip(values, parts, strict=True) if v is not None]
        weight = sum(count for _, count in known)
        return sum(value * count for value, count in known) / weight if weight else None

    return LayerSums(
        parts[-1].name,
        tokens,
        tuple(map(sum, zip(*(part.counts for part in parts), strict=True))),
        mean([part.entropy for part in parts]),
        mean([part.saturation for part in parts]),
    )


def findings(layer: LayerSums, steps: int, config: HealthConfig) -> list[Finding]:
    """Say what is wrong with a layer over a window of steps; usually nothing."""
    found = []
    num_experts = len(layer.counts)
    enough = sum(layer.counts) >= config.min_tokens * num_experts
    busiest = load(layer.counts)
    if enough and busiest > config.max_load:
        found.append(
            Finding(
                "load",
                layer.name,
                f"{layer.name}: over {steps} steps the busiest of {num_experts} experts had "
                f"{busiest:.1f} times the mean load; raise the weight of a balance loss (in "
                "transformers router_aux_loss_coef with output_router_logits) or let a choice bias "
                "follow the loads",
            )
        )
    if unused := dead(layer.counts, config):
        named = ", ".join(map(str, unused[:_NAMED]))
        more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
        found.append(
            Finding(
                "dead",
                layer.name,
                f"{layer.name}: over {steps} steps {len(unused)} of {num_experts} experts had "
                f"under {config.dead_share:.0%} of the mean load ({named}{more}); copy a busy "
                "expert and its row of the router over each, and raise the balance loss",
            )
        )
    if layer.entropy is not None and layer.entropy < config.min_entropy:
        found.append(
            Finding(
                "entropy",
                layer.name,
                f"{layer.name}: over {steps} steps the router's entropy was {layer.entropy:.3f} of "
                "its largest, so it no longer tries other experts; lower its learning rate or add "
                "a z-loss",
            )
        )
    if layer.saturation is not None and layer.saturation > config.max_saturation:
        found.append(
            Finding(
                "saturation",
                layer.name,
                f"{layer.name}: over {steps} steps {layer.saturation:.0%} of the gates were above "
                "0.99, where they hardly learn; lower the router's learning rate or add a z-loss",
            )
        )
    return found
