"""Which tokenizers have a name in llama.cpp."""

import pytest
from export_cases import merging_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from moesaic.models.export.gguf_vocab import pre_tokenizer

# As Llama 3 and Qwen 2 publish theirs.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level(use_regex=True, add_prefix_space=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def cut_by(*steps):
    tokenizer = merging_tokenizer()
    made = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(list(steps))
    tokenizer.backend_tokenizer.pre_tokenizer = made
    return tokenizer


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ((byte_level(),), "gpt-2"),
        ((pre_tokenizers.Digits(individual_digits=True), byte_level()), "smollm"),
        ((split(LLAMA3), byte_level(use_regex=False)), "llama-bpe"),
        ((split(QWEN2), byte_level(use_regex=False)), "qwen2"),
        ((split(r"\w+"), byte_level(use_regex=False)), ""),
        ((pre_tokenizers.Digits(individual_digits=False), byte_level()), ""),
        ((byte_level(use_regex=False),), ""),
        ((byte_level(add_prefix_space=True),), ""),
        ((pre_tokenizers.Whitespace(),), ""),
    ],
)
def test_the_cut_before_the_merges(steps, name):
    assert pre_tokenizer(cut_by(*steps)) == name


def test_what_else_llama_cpp_does_otherwise():
    tokenizer = merging_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert pre_tokenizer(tokenizer) == "gpt-2"
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert pre_tokenizer(tokenizer) == ""
    tokenizer = merging_tokenizer()
    tokenizer.backend_tokenizer.model = WordLevel({"th": 0}, unk_token="th")
    assert pre_tokenizer(tokenizer) == ""
    assert pre_tokenizer(object()) == ""
