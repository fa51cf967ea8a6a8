"""What evidence scripts share: a byte-level Llama of a few layers, its text, and its training.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import subprocess
from collections.abc import Callable, Sequence
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
from moesaic.nn.layer import LayerConfig, end_step, moe_layers, record_routing

VOCAB = 256


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
    config: LlamaConfig, layer: dict[str, Any] | list[dict[str, Any]], losses: dict[str, Any]
) -> Any:
    """Make a Llama whose networks are MoE layers with fresh weights, alike or one by one."""
    layers = layer if isinstance(layer, list) else [layer] * config.num_hidden_layers
    return fresh_mixture(config, [LayerConfig(**values) for values in layers], losses)


def text_bytes(num_train: int, num_held: int) -> tuple[Tensor, Tensor]:
    """Bytes of Python's documentation, split between documents."""
    documents = load_documents(DataConfig(sources=("builtin:docs",)))
    joined = "\n\n".join(document.text for document in documents).encode()
    data = torch.from_numpy(np.frombuffer(joined, dtype=np.uint8).copy()).long()
    return data[:num_train], data[-num_held:]


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
    groups = _groups(model, rate, router_rate)
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


def _groups(model: Any, rate: float, router_rate: float | None) -> list[dict[str, Any]]:
    if router_rate is None:
        return [{"params": list(model.parameters()), "lr": rate}]
    routers = [p for name, p in model.named_parameters() if ".router." in name]
    others = [p for name, p in model.named_parameters() if ".router." not in name]
    groups: list[dict[str, Any]] = [{"params": others, "lr": rate}]
    if routers:
        groups.append({"params": routers, "lr": router_rate, "weight_decay": 0.0})
    return groups


@torch.no_grad()
def validate(model: Any, data: Tensor, length: int, windows: int) -> tuple[float, list[float]]:
    """Loss in nats per byte on held-out windows, and mean active experts of every layer."""
    model.eval()
    total, layers = 0.0, np.zeros(0)
    starts = np.linspace(0, len(data) - length - 1, windows).astype(int)
    pieces = torch.stack([data[s : s + length] for s in starts]).split(16)
    for ids_BS in pieces:
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
    starts = np.linspace(0, len(data) - length - 1, windows).astype(int)
    ids_BS = torch.stack([data[s : s + length] for s in starts])
    with record_routing(model) as routings:
        model(input_ids=ids_BS, use_cache=False)
    loads = [routing.counts_E().double() for routing in routings]
    return [float(load_E.max() / load_E.mean()) for load_E in loads]


@torch.no_grad()
def skew_routers(model: Any, num_favourites: int, factor: float) -> None:
    """Scale the fresh router rows of a few experts, so that most tokens would choose among them."""
    for layer in moe_layers(model):
        assert layer.router is not None
        layer.router.weight[:num_favourites] *= factor


def arguments(name: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse `--quick` and `--out`."""
    parser = argparse.ArgumentParser(description=f"Evidence for {name}.")
    parser.add_argument("--quick", action="store_true", help="a few steps, to test the script")
    parser.add_argument("--out", type=Path, help="where the result goes")
    torch.set_num_threads(1)
    return parser.parse_args(argv)


def write_result(
    system: str,
    out: Path | None,
    config: dict[str, Any],
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
        "config": config,
        "results": results,
        "holds": holds,
        "sentence": sentence,
    }
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")
    print(sentence)
    return record
