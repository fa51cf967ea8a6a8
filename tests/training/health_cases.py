"""Tiny mixtures of six architectures, text with padding, and a plain recount of their choices.

Shapes: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

EXPERTS, TOP_K, LENGTH = 8, 2, 12
_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
_GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_routed_experts": EXPERTS}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
# Options beside the common ones, and whether gates are sigmoids.
ARCHITECTURES: dict[str, tuple[dict[str, Any], bool]] = {
    "Mixtral": ({"num_local_experts": EXPERTS}, False),
    "Qwen3Moe": ({"num_experts": EXPERTS, "head_dim": 8, "norm_topk_prob": True}, False),
    "Olmoe": ({"num_experts": EXPERTS, "norm_topk_prob": False}, False),
    "DeepseekV3": ({**_GROUPS, **_LATENT}, True),
    "Glm4Moe": ({**_GROUPS, "head_dim": 8}, True),
    "GptOss": ({"num_local_experts": EXPERTS, "head_dim": 8, "sliding_window": 8}, False),
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """Make a model with random weights; routers prefer some experts clearly."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **ARCHITECTURES[name][0]})
    model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for router in routers(model).values():
            nn.init.normal_(router.weight, std=1.0)
            if hasattr(router, "e_score_correction_bias"):
                nn.init.normal_(router.e_score_correction_bias, std=0.1)
    return model


def routers(model: nn.Module) -> dict[str, Any]:
    """The routers by the name of the module that holds them."""
    return {
        name.rpartition(".")[0]: module
        for name, module in model.named_modules()
        if type(module).__name__.lower().endswith("topkrouter")
    }


def text(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Sequences of equal length, padded by a different number of tokens each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = torch.randint(1, 64, (LENGTH,), generator=generator)
        mask = torch.ones(LENGTH, dtype=torch.int64)
        mask[LENGTH - index % 5 :] = 0
        ids = ids * mask
        labels = ids.masked_fill(mask == 0, -100)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def choices(router: Any, logits_TE: Tensor) -> Tensor:
    """Experts of each token, [T, K], from raw logits, as the papers say."""
    if not hasattr(router, "e_score_correction_bias"):
        return logits_TE.topk(TOP_K).indices
    biased_TE = logits_TE.sigmoid() + router.e_score_correction_bias
    best = []
    for row_E in biased_TE.unflatten(1, (router.num_group, -1)):
        group = row_E.topk(2).values.sum(1).argmax()
        best.append(row_E[group].topk(TOP_K).indices + group * row_E.shape[1])
    return torch.stack(best)


class RecountTrainer(Trainer):
    """Recounts every training batch by a pass of its own, before it trains on it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.recount: dict[int, dict[str, Tensor]] = {}
        self.logits: dict[str, list[Tensor]] = {}

    def training_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Tensor:
        seen: dict[str, Tensor] = {}
        handles = [
            router.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out[0]}))
            for name, router in routers(model).items()
        ]
        with torch.no_grad():
            model(**inputs)
        for handle in handles:
            handle.remove()
        mask_T = inputs["attention_mask"].flatten().bool()
        step = self.recount.setdefault(self.state.global_step + 1, {})
        for name, router in routers(model).items():
            logits_TE = seen[name].float()[mask_T]
            counts_E = torch.bincount(choices(router, logits_TE).flatten(), minlength=EXPERTS)
            step[name] = step.get(name, 0) + counts_E
            self.logits.setdefault(name, []).append(logits_TE)
        return super().training_step(model, inputs, *args, **options)


def arguments(directory: Any, **options: Any) -> TrainingArguments:
    """Arguments of a short run on the CPU."""
    values: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return TrainingArguments(output_dir=str(directory), **{**values, **options})
