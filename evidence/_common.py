"""What evidence scripts share: a byte-level Llama of a few layers, its text, its training.

A script holds what is its own: its ways, what it measures of one seed, and its claims. `Frame`
makes and trains its models, `Seeds` and `verdict` help to judge, and `run` does the rest.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from moesaic.data import DataConfig, load_documents
from moesaic.evaluation import machine_info
from moesaic.models.mixture import fresh_mixture
from moesaic.nn.groups import parameter_groups
from moesaic.nn.layer import LayerConfig, end_step, moe_layers, record_routing

VOCAB = 256
# Numbers of steps, windows of held-out text and the like.
Sizes = Mapping[str, int]
Judge = Callable[[dict[str, Any]], tuple[dict[str, bool], str]]


def tiny_llama(seed: int, *, layers: int = 4, dim: int = 128, width: int = 512) -> PreTrainedModel:
    """Make a dense Llama that reads bytes."""
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(tiny_config(layers=layers, dim=dim, width=width))


def tiny_config(*, layers: int = 4, dim: int = 128, width: int = 512) -> LlamaConfig:
    """Config of a Llama that reads bytes."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=dim,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def tiny_mixture(
    config: LlamaConfig, layer: LayerConfig | Sequence[LayerConfig], losses: Mapping[str, Any]
) -> Any:
    """Make a Llama whose networks are MoE layers with fresh weights, alike or one by one."""
    layers = [layer] * config.num_hidden_layers if isinstance(layer, LayerConfig) else layer
    return fresh_mixture(config, layers, losses)


def text_bytes(num_train: int = 400_000, num_held: int = 60_000) -> tuple[Tensor, Tensor]:
    """Bytes of Python's documentation, split between documents."""
    documents = load_documents(DataConfig(sources=("builtin:docs",)))
    joined = "\n\n".join(document.text for document in documents).encode()
    data = torch.from_numpy(np.frombuffer(joined, dtype=np.uint8).copy()).long()
    return data[:num_train], data[-num_held:]


def alike_bytes(block: int = 2400, every: int = 8) -> tuple[Tensor, Tensor]:
    """The same text with every eighth block held out, so that both parts are of all documents.

    What `text_bytes` holds out is the last document, in which other bytes are frequent: right for a
    loss, and wrong for how even experts are, which follows from the text.
    """
    joined = torch.cat(text_bytes())
    blocks = joined[: len(joined) // block * block].unflatten(0, (-1, block))
    held = torch.arange(len(blocks)) % every == every - 1
    return blocks[~held].flatten(), blocks[held].flatten()


def batch(data: Tensor, size: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw windows of text, [B, S]."""
    starts = torch.randint(len(data) - length, (size,), generator=generator)
    return torch.stack([data[start : start + length] for start in starts.tolist()])


def optimise(
    model: Any,
    draw: Callable[[], Tensor],
    steps: int,
    rate: float,
    after: Callable[[int, list[Any]], None] | None = None,
    router_rate: float | None = None,
) -> None:
    """Train all weights with AdamW along a cosine; `after` sees the routing of every step.

    With `router_rate` the routers learn at a rate of their own and without weight decay.
    """
    model.train()
    groups = parameter_groups(model, rate, router_rate)
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(steps):
        factor = min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group, full in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = full * factor
        ids_BS = draw()
        with record_routing(model) as routings:
            loss = model(input_ids=ids_BS, labels=ids_BS).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        end_step(model)
        if after is not None:
            after(step, routings)
    model.eval()


def held_windows(length: int, windows: int) -> Tensor:
    """Evenly spread windows of held-out text, [B, S]."""
    return _windows(text_bytes()[1], length, windows)


def _windows(data: Tensor, length: int, windows: int) -> Tensor:
    starts = np.linspace(0, len(data) - length - 1, windows).astype(int)
    return torch.stack([data[s : s + length] for s in starts])


@torch.no_grad()
def validate(model: Any, data: Tensor, length: int, windows: int) -> tuple[float, list[float]]:
    """Loss in nats per byte on held-out windows, and mean active experts of every layer."""
    model.eval()
    total, layers = 0.0, np.zeros(0)
    for ids_BS in _windows(data, length, windows).split(16):
        with record_routing(model) as routings:
            logits = model(input_ids=ids_BS, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids_BS[:, 1:].flatten()
        )
        total += float(loss) * len(ids_BS)
        counts = np.array([float(r.active_TE().sum(1).float().mean()) for r in routings])
        layers = counts * len(ids_BS) + (layers if layers.size else 0.0)
    return total / windows, (layers / windows).tolist()


@torch.no_grad()
def max_over_mean(model: Any, data: Tensor, length: int, windows: int) -> list[float]:
    """Load of the busiest expert over the mean load, for every layer, on evenly spread windows."""
    ids_BS = _windows(data, length, windows)
    with record_routing(model) as routings:
        model(input_ids=ids_BS, use_cache=False)
    loads = [routing.counts_E().double() for routing in routings]
    return [float(load_E.max() / load_E.mean()) for load_E in loads]


def load_by_chance(num_choices: int, num_experts: int) -> float:
    """Load of the busiest expert over the mean to expect where all are as likely to be chosen."""
    draw = np.random.default_rng(0).multinomial(
        num_choices, np.full(num_experts, 1 / num_experts), size=2000
    )
    return float(draw.max(1).mean() * num_experts / num_choices)


@torch.no_grad()
def skew_routers(model: Any, num_favourites: int, factor: float) -> None:
    """Scale the fresh router rows of a few experts, so that most tokens would choose among them."""
    for layer in moe_layers(model):
        assert layer.router is not None
        layer.router.weight[:num_favourites] *= factor


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Sizes of the small Llama that most scripts train on text, and that training.

    Attributes:
        layers: Decoder layers.
        dim: Model width.
        length: S, bytes in a window of text.
        batch: B, windows in a step.
        rate: Largest learning rate of the cosine.
    """

    layers: int = 2
    dim: int = 32
    length: int = 48
    batch: int = 12
    rate: float = 3e-3

    def config(self) -> dict[str, Any]:
        """The sizes, for the result."""
        return asdict(self)

    def mixture(
        self,
        seed: int,
        layer: LayerConfig | Sequence[LayerConfig],
        losses: Mapping[str, Any] | None = None,
        width: int | None = None,
    ) -> Any:
        """Make a Llama of MoE layers with fresh weights, alike or one by one.

        `width` is the intermediate size in the config, that of the first layer's experts unless
        given. No weight has it, but the draw of the weights depends on it.
        """
        torch.manual_seed(seed)
        first = layer if isinstance(layer, LayerConfig) else layer[0]
        config = tiny_config(layers=self.layers, dim=self.dim, width=width or first.width)
        return tiny_mixture(config, layer, losses or {})

    def train(
        self,
        model: Any,
        seed: int,
        steps: int,
        after: Callable[[int, list[Any]], None] | None = None,
        text: Tensor | None = None,
    ) -> None:
        """Train on windows of the text, which are the same for the same seed."""
        data = text_bytes()[0] if text is None else text
        generator = torch.Generator().manual_seed(seed)

        def draw() -> Tensor:
            return batch(data, self.batch, self.length, generator)

        optimise(model, draw, steps, self.rate, after)

    def validate(
        self, model: Any, windows: int, text: Tensor | None = None
    ) -> tuple[float, list[float]]:
        """Loss in nats per byte of held-out text, and mean active experts of every layer."""
        held = text_bytes()[1] if text is None else text
        return validate(model, held, self.length, windows)

    def loads(self, model: Any, windows: int, text: Tensor | None = None) -> list[float]:
        """Load of the busiest expert over the mean on held-out text, for every layer."""
        held = text_bytes()[1] if text is None else text
        return max_over_mean(model, held, self.length, windows)


class Seeds:
    """Results of all seeds, read by way and measure; what is given by layer counts as its mean."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.all = results["seeds"]

    def values(self, way: str, measure: str) -> list[float]:
        """One number a seed."""
        return [float(np.mean(seed[way][measure])) for seed in self.all]

    def mean(self, way: str, measure: str) -> float:
        """Mean over seeds."""
        return float(np.mean(self.values(way, measure)))


def verdict(holds: Mapping[str, bool]) -> str:
    """How a sentence begins: which claims did not come out."""
    missed = [claim for claim, true in holds.items() if not true]
    found = f"not at this scale: {'; '.join(missed)}" if missed else "all came out at this scale"
    return f"The card's predictions: {found}"


def run(
    system: str,
    argv: Sequence[str] | None,
    one_seed: Callable[[int, Sizes], dict[str, Any]],
    judge: Judge,
    *,
    config: Mapping[str, Any],
    sizes: Sizes,
    num_seeds: int = 3,
) -> dict[str, Any]:
    """Measure every seed, judge, and write the result; with `--quick` one seed of a few steps.

    Args:
        system: Id in the catalog.
        argv: Arguments, those of the process if None.
        one_seed: From a seed and the sizes to what was measured, by way.
        judge: From all results to the claims and the sentence.
        config: What the result says of the setting, beside the sizes.
        sizes: What `--quick` makes small: steps, and `windows` of held-out text.
        num_seeds: Seeds, from 0 on.
    """
    options = arguments(system, argv)
    if options.quick:
        sizes = {name: 8 if name == "windows" else 3 for name in sizes}
        num_seeds = 1
    seeds = [{"seed": seed, **one_seed(seed, sizes)} for seed in range(num_seeds)]
    results = {"seeds": seeds}
    return write_result(system, options.out, {**config, **sizes}, results, *judge(results))


def arguments(system: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse `--quick` and `--out`."""
    parser = argparse.ArgumentParser(description=f"Evidence for {system}.")
    parser.add_argument("--quick", action="store_true", help="a few steps, to test the script")
    parser.add_argument("--out", type=Path, help="where the result goes")
    torch.set_num_threads(1)
    return parser.parse_args(argv)


def write_result(
    system: str,
    out: Path | None,
    config: Mapping[str, Any],
    results: dict[str, Any],
    holds: dict[str, bool],
    sentence: str,
) -> dict[str, Any]:
    """Write the result of a script and print its sentence."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    record = {
        "system": system,
        "ran": True,
        "date": datetime.date.today().isoformat(),
        "machine": machine_info(),
        "commit": head.stdout.strip(),
        "config": dict(config),
        "results": results,
        "holds": holds,
        "sentence": sentence,
    }
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")
    print(sentence)
    return record
