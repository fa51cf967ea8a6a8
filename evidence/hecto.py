"""Hecto: does a gate send each input to the kind of expert that can read it (arXiv 2506.22919)?

Made-up inputs of 16 vectors are of two types, which the first vector of the encoding tells: of type
A the label depends on their mean, of type B on which of two markers comes first. A layer of a
feed-forward expert, which sees that first vector alone, and a recurrent one, which sees all of them
in order, is trained from the labels; so are layers of two feed-forward and of two recurrent
experts. The mixed pair should solve both types and send B to the recurrent expert; two feed-forward
experts should guess on B. All mix their experts softly in the first steps, since with the winner
alone from the start, which is trained too, the gate may settle on the wrong expert for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evidence._common import Seeds, Sizes, run, verdict
from moesaic.nn.layer import LayerConfig, MoELayer, end_step, record_routing
from moesaic.nn.losses._base import LossConfig
from moesaic.nn.losses.diversity import diversity_loss
from moesaic.nn.losses.entropy import entropy_loss
from moesaic.nn.routers._base import RouterState
from moesaic.nn.sequences import Sequences

VECTORS, FEATURES, DIM, WIDTH, CLASSES = 16, 8, 32, 16, 2
BATCH, RATE, ENTROPY, DIVERSITY = 64, 5e-3, 0.01, 0.05
MARKER = 3.0
WAYS = {
    "mixed": ("plain", "gru"),
    "networks": ("plain", "plain"),
    "recurrent": ("gru", "gru"),
    "winner alone": ("plain", "gru"),
}


class Inputs(NamedTuple):
    """What an encoder would give of a batch: [B, 1 + 16, 1 + 8], the first vector pooled."""

    values: Tensor
    labels: Tensor
    ordered: Tensor


def draw(size: int, generator: torch.Generator) -> Inputs:
    """Draw a batch; both types hold the markers, so that only their order tells."""
    x = torch.randn(size, VECTORS, FEATURES, generator=generator)
    places = torch.rand(size, VECTORS, generator=generator).argsort(1)[:, :2]
    rows = torch.arange(size)
    x[rows, places[:, 0], 1] += MARKER
    x[rows, places[:, 1], 2] += MARKER
    ordered = torch.rand(size, generator=generator) < 0.5
    labels = torch.where(ordered, places[:, 0] < places[:, 1], x[:, :, 0].mean(1) > 0)
    flag = ordered.float().mul(2).sub(1).reshape(-1, 1, 1)
    pooled = torch.cat([flag, x.mean(1, keepdim=True)], dim=2)
    rest = torch.cat([torch.zeros(size, VECTORS, 1), x], dim=2)
    return Inputs(torch.cat([pooled, rest], dim=1), labels.long(), ordered)


class Head(nn.Module):
    """A projection for each view, then the layer; the first outputs are the logits."""

    def __init__(self, kinds: tuple[str, ...], soft_steps: int) -> None:
        super().__init__()
        self.pooled = nn.Linear(1 + FEATURES, DIM)
        self.sequence = nn.Linear(1 + FEATURES, DIM)
        config = LayerConfig(
            num_experts=2,
            width=WIDTH,
            router="straight-through-top-k",
            router_options={"soft_steps": soft_steps},
            experts=kinds,
            activation="tanh",
            bias=True,
            expert_bias=True,
        )
        self.layer = MoELayer(DIM, config)

    def forward(self, values: Tensor) -> Tensor:
        """Classify a batch."""
        lengths = torch.full((len(values),), values.shape[1])
        state = RouterState(sequences=Sequences(self.sequence(values), lengths))
        logits: Tensor = self.layer(self.pooled(values[:, 0]), state)[:, :CLASSES]
        return logits


def train(way: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Train one pair; accuracy and route of both types on fresh inputs."""
    torch.manual_seed(seed)
    model = Head(WAYS[way], 0 if way == "winner alone" else sizes["soft_steps"])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    mask = torch.ones(1, BATCH, dtype=torch.bool)
    for _ in range(sizes["steps"]):
        batch = draw(BATCH, generator)
        with record_routing(model) as routings:
            loss = F.cross_entropy(model(batch.values), batch.labels)
        loss = loss + ENTROPY * entropy_loss(routings[0], mask, LossConfig())
        loss = loss + DIVERSITY * diversity_loss(routings[0], mask, LossConfig())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        end_step(model)
    return measure(model, sizes)


@torch.no_grad()
def measure(model: Head, sizes: Sizes) -> dict[str, Any]:
    """Accuracy and share of the second expert by type; weights of each expert."""
    test = draw(64 * sizes["windows"], torch.Generator().manual_seed(1000))
    with record_routing(model) as routings:
        right = model(test.values).argmax(1) == test.labels
    second = routings[0].ids_TK[:, 0] == 1
    experts = model.layer.experts
    assert experts is not None
    parts = list(experts.parameters())
    return {
        "accuracy_mean": float(right[~test.ordered].double().mean()),
        "accuracy_order": float(right[test.ordered].double().mean()),
        "second_mean": float(second[~test.ordered].double().mean()),
        "second_order": float(second[test.ordered].double().mean()),
        "agreement": float((second == test.ordered).double().mean()),
        "parameters": sum(parameter.numel() for parameter in parts),
    }


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the seeds."""
    seeds = Seeds(results)
    mixed = {key: seeds.mean("mixed", key) for key in results["seeds"][0]["mixed"]}
    holds = {
        "the mixed pair solves both types (over 0.9), on every seed": min(
            *seeds.values("mixed", "accuracy_mean"), *seeds.values("mixed", "accuracy_order")
        )
        > 0.9,
        "the mixed pair routes over 0.75 of inputs by their type, on every seed": min(
            seeds.values("mixed", "agreement")
        )
        > 0.75,
        "two feed-forward experts guess on order (under 0.55), on every seed": max(
            seeds.values("networks", "accuracy_order")
        )
        < 0.55,
    }
    others = "; ".join(
        f"{name}: {seeds.mean(way, 'accuracy_mean'):.3f} and "
        f"{seeds.mean(way, 'accuracy_order'):.3f}"
        for way, name in (("networks", "two feed-forward"), ("recurrent", "two recurrent"))
    )
    return holds, (
        f"{verdict(holds)}. Where the mean and where the order decides, the mixed pair is right in "
        f"{mixed['accuracy_mean']:.3f} and {mixed['accuracy_order']:.3f} of inputs ({others}); it "
        f"sends {mixed['second_order']:.2f} of the second type and {mixed['second_mean']:.2f} of "
        "the first to the recurrent expert. Without soft steps its route agrees with the type in "
        f"{', '.join(f'{value:.2f}' for value in seeds.values('winner alone', 'agreement'))} of "
        "inputs on the seeds."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "hecto",
        argv,
        lambda seed, sizes: {way: train(way, seed, sizes) for way in WAYS},
        judge,
        config={
            "vectors": VECTORS,
            "features": FEATURES,
            "dim": DIM,
            "width": WIDTH,
            "batch": BATCH,
            "rate": RATE,
            "entropy": ENTROPY,
            "diversity": DIVERSITY,
        },
        sizes={"steps": 1000, "soft_steps": 300, "windows": 32},
    )


if __name__ == "__main__":
    main()
