"""CDSP-MoE: does conflict cut the links between experts of conflicting tasks (arXiv 2512.20291)?

The 8 x 8 digits that scikit-learn carries make three tasks with one head: digits as they are; the
same in fainter print with noise, which is the same function of the image; and digits with their
pixels permuted and their labels inverted (9 - y), which pull common weights elsewhere. A model of
two layers learns all three: with the experts of the paper, with the same at conflict weight 0, and
with as many weights in separate experts and a load loss, all with the same router. Experts of
conflicting tasks should be linked less than those of one side, and less than without conflict;
without task ids the model should lose no more than the one with separate experts.

Links are means over pairs of experts, weighted by how often both serve: the product of the shares
of two sides' choices that go to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from evidence._common import Seeds, Sizes, run, verdict
from moesaic.nn.experts.subspace import SubspaceExperts
from moesaic.nn.groups import parameter_groups
from moesaic.nn.layer import LayerConfig, MoELayer, end_step, moe_layers, pass_state, record_routing
from moesaic.nn.losses._base import LossConfig
from moesaic.nn.losses.importance import importance_loss

SIDE, PATCH, CLASSES, TASKS = 8, 2, 10, 3
# Tasks 0 and 1 are on one side, task 2 on the other.
SIDES = ((0, 1), (2,))
DIM, LAYERS, HEADS, EXPERTS, TOP_K = 64, 2, 4, 8, 2
WIDTH, BLOCK, SEPARATE_WIDTH = 90, 32, 32
BATCH, RATE, TEST, LOAD = 64, 5e-3, 500, 0.01
PATCHES = (SIDE // PATCH) ** 2
WAYS = ("cdsp", "no conflict", "separate")


class Images(NamedTuple):
    """Images as patches, [N, 16, 4], with their labels and tasks, [N]."""

    patches: Tensor
    labels: Tensor
    tasks: Tensor

    def take(self, rows: Tensor) -> Images:
        """Some of them."""
        return Images(self.patches[rows], self.labels[rows], self.tasks[rows])


def images() -> tuple[Images, Images]:
    """Every image in all three tasks, split between images: those to train on, and others."""
    pixels, classes = load_digits(return_X_y=True)
    plain = torch.from_numpy(pixels).float() / 16
    labels = torch.from_numpy(classes).long()
    generator = torch.Generator().manual_seed(0)
    faint = 0.5 * plain + 0.05 * torch.randn(plain.shape, generator=generator)
    permuted = plain[:, torch.randperm(SIDE * SIDE, generator=generator)]
    each = (plain, faint, permuted)
    given = (labels, labels, CLASSES - 1 - labels)
    train, test = [], []
    for task, (values, answers) in enumerate(zip(each, given, strict=True)):
        tasks = torch.full_like(answers, task)
        made = Images(cut(values), answers, tasks)
        train.append(made.take(torch.arange(len(plain) - TEST)))
        test.append(made.take(torch.arange(len(plain) - TEST, len(plain))))
    return join(train), join(test)


def cut(pixels: Tensor) -> Tensor:
    """Cut images into patches."""
    count = SIDE // PATCH
    grid = pixels.reshape(-1, count, PATCH, count, PATCH).transpose(2, 3)
    return grid.reshape(-1, PATCHES, PATCH * PATCH)


def join(parts: Sequence[Images]) -> Images:
    """Put images of several tasks together."""
    return Images(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class Block(nn.Module):
    """Attention, then the layer, each beside a residual."""

    def __init__(self, layer: LayerConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(2))
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.layer = MoELayer(DIM, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the patches, [B, 16, D]."""
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = x + self.layer(self.norms[1](x))
        return out


class Classifier(nn.Module):
    """Patches to the mean of their logits."""

    def __init__(self, layer: LayerConfig) -> None:
        super().__init__()
        self.read = nn.Linear(PATCH * PATCH, DIM)
        self.places = nn.Parameter(0.02 * torch.randn(PATCHES, DIM))
        self.blocks = nn.Sequential(*(Block(layer) for _ in range(LAYERS)))
        self.norm = nn.RMSNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, patches: Tensor) -> Tensor:
        """Classify images."""
        x = self.blocks(self.read(patches) + self.places)
        logits: Tensor = self.head(self.norm(x)).mean(1)
        return logits


def layer_of(way: str) -> LayerConfig:
    """The layer of one way; separate experts have the weights of the backbone."""
    router = {"top_k": TOP_K, "num_tasks": TASKS}
    common = {"num_experts": EXPERTS, "router": "task-top-k", "router_options": router}
    if way == "separate":
        return LayerConfig(**common, width=SEPARATE_WIDTH, experts="plain")
    options: dict[str, Any] = {"block": BLOCK}
    if way == "no conflict":
        options["conflict_coef"] = 0.0
    return LayerConfig(**common, width=WIDTH, experts="subspace", experts_options=options)


def train(way: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Train one way; accuracies with and without tasks, and how experts of the sides are linked."""
    torch.manual_seed(seed)
    model = Classifier(layer_of(way))
    seen, unseen = images()
    generator = torch.Generator().manual_seed(seed)
    groups = parameter_groups(model, RATE)
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.01)
    mask = torch.ones(1, BATCH * PATCHES, dtype=torch.bool)
    for _ in range(sizes["steps"]):
        batch = seen.take(torch.randint(len(seen.labels), (BATCH,), generator=generator))
        with pass_state(model, tasks=batch.tasks), record_routing(model) as routings:
            loss = F.cross_entropy(model(batch.patches), batch.labels)
        for routing in routings:
            loss = loss + sum(routing.aux.values())
            if way == "separate":
                loss = loss + LOAD * importance_loss(routing, mask, LossConfig())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        end_step(model)
    return measure(model.eval(), unseen)


@torch.no_grad()
def measure(model: Classifier, test: Images) -> dict[str, Any]:
    """Accuracy with and without task ids, and the links of experts by the sides they serve."""
    with pass_state(model, tasks=test.tasks), record_routing(model) as routings:
        right = model(test.patches).argmax(1) == test.labels
    blind = model(test.patches).argmax(1) == test.labels
    result = {
        "accuracy": float(right.double().mean()),
        "blind": float(blind.double().mean()),
        "drop": float(right.double().mean() - blind.double().mean()),
    }
    by_layer: list[dict[str, float]] = []
    for layer, routing in zip(moe_layers(model), routings, strict=True):
        choices_NE = routing.active_TE().unflatten(0, (-1, PATCHES)).double().sum(1)
        of_sides = [choices_NE[torch.isin(test.tasks, torch.tensor(side))].sum(0) for side in SIDES]
        first_E, second_E = (choices_E / choices_E.sum() for choices_E in of_sides)
        found = {"overlap": float(torch.minimum(first_E, second_E).sum())}
        if isinstance(layer.experts, SubspaceExperts):
            links_EE = layer.experts.links().double()
            across_EE = torch.outer(first_E, second_E) + torch.outer(second_E, first_E)
            within_EE = torch.outer(first_E, first_E) + torch.outer(second_E, second_E)
            found["conflicting"] = between(links_EE, across_EE)
            found["cooperating"] = between(links_EE, within_EE)
        by_layer.append(found)
    means = {name: float(np.mean([found[name] for found in by_layer])) for name in by_layer[0]}
    return {**result, **means}


def between(links_EE: Tensor, weight_EE: Tensor) -> float:
    """Weighted mean of the links of two different experts."""
    weight_EE = weight_EE * (1 - torch.eye(len(weight_EE), dtype=weight_EE.dtype))
    return float((links_EE * weight_EE).sum() / weight_EE.sum())


def judge(results: dict[str, Any]) -> tuple[dict[str, bool], str]:
    """Hold the card's predictions to the seeds."""
    seeds = Seeds(results)
    across, within, free = (
        seeds.values(*key)
        for key in (
            ("cdsp", "conflicting"),
            ("cdsp", "cooperating"),
            ("no conflict", "conflicting"),
        )
    )
    kept = seeds.mean("cdsp", "cooperating"), seeds.mean("no conflict", "cooperating")
    holds = {
        "experts of conflicting tasks are linked less than those of one side, on every seed": all(
            low < high for low, high in zip(across, within, strict=True)
        ),
        "they are linked less than without conflict, on every seed": all(
            low < high for low, high in zip(across, free, strict=True)
        ),
        "experts of one side keep over half of their links": kept[0] > 0.5 * kept[1],
        "without task ids no more is lost than with separate experts": (
            seeds.mean("cdsp", "drop") <= seeds.mean("separate", "drop")
        ),
    }
    ways = "; ".join(
        f"{name}: {seeds.mean(way, 'accuracy'):.3f} and {seeds.mean(way, 'blind'):.3f}"
        for way, name in (
            ("cdsp", "in the backbone"),
            ("no conflict", "in it without conflict"),
            ("separate", "separate"),
        )
    )
    return holds, (
        f"{verdict(holds)}. Links of experts of conflicting tasks are "
        f"{', '.join(f'{value:.3f}' for value in across)} on the seeds, of one side "
        f"{', '.join(f'{value:.3f}' for value in within)}; without conflict their means are "
        f"{seeds.mean('no conflict', 'conflicting'):.3f} and {kept[1]:.3f}. Accuracy with and "
        f"without task ids ({ways}). The sides share {seeds.mean('cdsp', 'overlap'):.2f} of their "
        f"choices of experts with conflict, {seeds.mean('no conflict', 'overlap'):.2f} without."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    return run(
        "cdsp-moe",
        argv,
        lambda seed, sizes: {way: train(way, seed, sizes) for way in WAYS},
        judge,
        config={
            "dim": DIM,
            "layers": LAYERS,
            "experts": EXPERTS,
            "top_k": TOP_K,
            "width": WIDTH,
            "block": BLOCK,
            "separate_width": SEPARATE_WIDTH,
            "batch": BATCH,
            "rate": RATE,
            "load": LOAD,
        },
        sizes={"steps": 600},
    )


if __name__ == "__main__":
    main()
