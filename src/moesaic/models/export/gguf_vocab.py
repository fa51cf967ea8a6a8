"""A tokenizer in the words of GGUF: byte-level BPE, its special tokens and its chat template.

llama.cpp knows ways to cut text before the merges by name alone, so the cut of a tokenizer has to
be one of those below.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

from transformers import PreTrainedTokenizerBase

# Before the merges of Llama 3 and Qwen 2; `{digits}` is what they take of a number at a time.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|{digits}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    _WORDS.replace("{digits}", r"\p{N}{1,3}"): "llama-bpe",
    _WORDS.replace("{digits}", r"\p{N}"): "qwen2",
}


def pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give llama.cpp's name for how a tokenizer cuts text; empty if it has none."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    whole = json.loads(backend.to_str())
    # llama.cpp reads no file without merges.
    if whole["model"]["type"] != "BPE" or not whole["model"]["merges"]:
        return ""
    if whole["normalizer"] not in (None, {"type": "NFC"}):
        return ""
    step = whole["pre_tokenizer"] or {}
    steps = step.get("pretokenizers", [step])
    kinds = [each.get("type") for each in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1]["add_prefix_space"]:
        return ""
    by_regex = steps[-1]["use_regex"]
    if kinds == ["ByteLevel"] and by_regex:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and by_regex and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not by_regex:
        return _SPLITS.get(steps[0]["pattern"].get("Regex", ""), "")
    return ""


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Write a tokenizer for which `pre_tokenizer` has a name.

    Args:
        writer: A `gguf.GGUFWriter` before its header is written.
        tokenizer: Of the model.
        vocab_size: Rows of the embedding; tokens beyond those of the tokenizer are unused.
    """
    import gguf

    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(vocab_size):
        if number not in names:
            tokens.append(f"[PAD{number}]")
            types.append(gguf.TokenType.UNUSED)
            continue
        tokens.append(names[number])
        if number not in added:
            types.append(gguf.TokenType.NORMAL)
        elif added[number].special:
            types.append(gguf.TokenType.CONTROL)
        else:
            types.append(gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        special = gguf.SpecialVocab(directory, load_merges=True, n_vocab=vocab_size)
    # What is added to a text is what the tokenizer adds, whatever its template looks like.
    ids = tokenizer("a")["input_ids"]
    special.add_special_token = {
        "bos": bool(ids) and ids[0] == tokenizer.bos_token_id,
        "eos": bool(ids) and ids[-1] == tokenizer.eos_token_id,
    }
    special.chat_template = tokenizer.chat_template
    special.add_to_gguf(writer, quiet=True)
