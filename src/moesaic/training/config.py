"""Settings of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesaic._errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of a training.

    Attributes:
        tokens: Tokens to train on, rounded down to whole steps; text repeats if it is shorter.
        batch_blocks: Blocks of a step.
        accumulate: Forward passes that a step is split into, to save memory.
        mixed_precision: Arithmetic of the products, of the teacher's too: `bfloat16` takes half the
            memory and, where the machine has instructions for it, less time; weights, sums and
            routers keep their dtype. `none` computes in the dtype of the weights.
        trains: `routers`, `ffn` (routers and experts), `everything`, or `lora` (routers, and
            low-rank adapters of the attention, merged at the end).
        learning_rate: Peak rate of experts and the rest.
        router_learning_rate: Peak rate of routers.
        warmup: Part of the steps that the rates rise; then they fall along a cosine.
        distill: Weight of the Kullback-Leibler divergence from the dense parent.
        match: Weight of the difference from the dense parent's hidden states: its square after
            each layer over the square of the parent's, mean over layers and tokens.
        language: Weight of the language model loss on the text itself.
        active: Active FFN fraction to reach, in (0, 1]; 0 leaves the level to `sparse_coef` of the
            conversion, as the paper does.
        budget_rate: How fast the sparsity coefficient follows the distance to `active`.
        lora_rank: Rank of the adapters.
        checkpoint_every: Steps between checkpoints; an interrupted run goes on from the last.
        tensorboard: Also write TensorBoard logs.
        seed: Order of the text.
    """

    tokens: int = 32768
    batch_blocks: int = 1
    accumulate: int = 1
    mixed_precision: Literal["none", "bfloat16"] = "none"
    trains: Literal["routers", "ffn", "everything", "lora"] = "ffn"
    learning_rate: float = 1e-4
    router_learning_rate: float = 1e-4
    warmup: float = 0.05
    distill: float = 1.0
    match: float = 0.0
    language: float = 0.0
    active: float = 0.7
    budget_rate: float = 2.0
    lora_rank: int = 8
    checkpoint_every: int = 25
    tensorboard: bool = False
    seed: int = 0

    @property
    def needs_teacher(self) -> bool:
        """Whether the dense parent is asked."""
        return self.distill + self.match > 0

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_blocks", "accumulate", "lora_rank", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "router_learning_rate", "budget_rate", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        weights = (self.distill, self.match, self.language)
        if min(weights) < 0 or sum(weights) == 0:
            raise InputError(
                "distill, match and language must be at least 0 and not all 0, got "
                f"{self.distill}, {self.match} and {self.language}; 1, 0 and 0 distils from the "
                "dense parent alone"
            )
        if not 0.0 <= self.active <= 1.0:
            raise InputError(
                f"active must be in (0, 1], or 0 for no budget, got {self.active}; 0.7 keeps 70%"
            )
        if not 0.0 <= self.warmup < 1.0:
            raise InputError(f"warmup must be in [0, 1), got {self.warmup}; 0.05 is usual")
        if self.batch_blocks % self.accumulate:
            raise InputError(
                f"accumulate must divide batch_blocks={self.batch_blocks}, got {self.accumulate}"
            )
