"""Tiny models that each export format can hold, a tokenizer that GGUF can, and plain readers."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import torch
from model_cases import Case, converted, random_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moesaic.conversion.fix_k import FixK, fix_k
from moesaic.models.export import FORMATS
from moesaic.models.export._base import FormatConfig
from moesaic.models.export.check import make_format

ONES = {"value": "one", "normalize": "none", "bias": True}
# Blocks of 32 neurons: what quantised weights group.
WIDE: dict[str, Any] = {"intermediate_size": 128}
PARENTS = {"qwen3_moe": "qwen3"}


def dsmoe(model_type: str = "llama", dtype: torch.dtype = torch.float32, **options: Any):
    """A DSMoE whose gates weigh one."""
    case = Case(model_type, {**WIDE, **options})
    return converted(case, dtype, router_options=ONES, losses={"sparsity": {"coef": 0.5}})


def export_format(name: str, weights: str = "auto"):
    return make_format(name, FormatConfig(weights=weights))


def fitting(name: str, model_type: str = "", **options: Any) -> PreTrainedModel:
    """A model that a format writes as it is."""
    model = dsmoe(model_type or PARENTS.get(name, "llama"), **options)
    layout = export_format(name).layout
    return model if layout is None else fix_k(model, random_ids(6), layout, FixK(k=2))[0]


def softmax(**options: Any) -> PreTrainedModel:
    """A Mixtral of ours: the weights of two of four blocks sum to one."""
    case = Case("llama", {**WIDE, **options})
    return converted(case, router="topk-softmax", router_options={"top_k": 2})


def stock_formats() -> list[str]:
    return [name for name, info in FORMATS.items() if "stock" in info.abilities]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and one for `th`, an end of text, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "th", "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"
    return made


# Runs where `import moesaic` fails.
_ELSEWHERE = """
import sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "moesaic":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
root = Path(sys.argv[1])
for name in sys.argv[2:]:
    ids = torch.load(root / "ids.pt")
    model = AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits
    text = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
    )
    out = {"class": type(model).__module__, "logits": logits, "text": text}
    torch.save(out, root / f"{name}.pt")
assert "moesaic" not in sys.modules
"""


def read_elsewhere(root, names: list[str]) -> dict[str, Any]:
    """Load directories in a process without moesaic; gives what it computed, by name."""
    torch.save(random_ids(), root / "ids.pt")
    run = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, str(root), *names],
        env={**os.environ, "HF_MODULES_CACHE": str(root / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return {name: torch.load(root / f"{name}.pt") for name in names}
