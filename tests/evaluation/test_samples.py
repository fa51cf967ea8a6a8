import pytest
import torch
from evaluation_cases import Letters, convert, dense_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moesaic.evaluation.samples import coloured_tokens, generate_text, token_texts
from moesaic.nn.layer import record_routing


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """One token per byte, as the tail of every byte-level tokenizer has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "text", ["plain words .", "caf\u00e9 \u4e2d\u6587 \U0001f600!", " a\n\tb ", "\u00e9"]
)
def test_token_texts_join_to_the_text(bytes_tokenizer, text):
    ids = bytes_tokenizer(text)["input_ids"]
    pieces = token_texts(bytes_tokenizer, ids)
    assert len(pieces) == len(ids) == len(text.encode())
    assert "".join(pieces) == text


def test_the_last_byte_of_a_character_shows_it(bytes_tokenizer):
    ids = bytes_tokenizer("a\u4e2db")["input_ids"]
    assert token_texts(bytes_tokenizer, ids) == ["a", "", "", "\u4e2d", "b"]
    # A text cut inside a character ends in what a decoder shows for that.
    assert token_texts(bytes_tokenizer, ids[:2]) == ["a", "\ufffd"]


@pytest.mark.parametrize("shared", [0, 8])
def test_tokens_have_their_mean_active_fraction(blocks, shared):
    model = convert(dense_model(), shared=shared)
    ids_S = blocks.ids_NS[0]
    tokens = coloured_tokens(model, Letters(), ids_S)
    with torch.no_grad(), record_routing(model) as routings:
        model(input_ids=torch.from_numpy(ids_S).long()[None])
    width = 4 if shared else 6
    first, second = (r.active_T() for r in routings)
    expected = (2 * shared + width * (first + second)) / 48
    assert [t["active"] for t in tokens] == pytest.approx(expected.tolist())
    assert len({t["active"] for t in tokens}) > 2
    assert "".join(t["text"] for t in tokens) == Letters().decode(ids_S)


def test_generated_text_is_greedy_and_new(dense, moe):
    texts = generate_text({"dense": dense, "moe": moe}, Letters(), "abc", 5)
    for name, model in (("dense", dense), ("moe", moe)):
        ids = torch.tensor([Letters()("abc")["input_ids"]])
        for _ in range(5):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == 2:
                break
        assert texts[name] == Letters().decode(ids[0, 3:].tolist())
    assert texts == generate_text({"dense": dense, "moe": moe}, Letters(), "abc", 5)
