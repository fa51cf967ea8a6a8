"""Text comes in whole characters and ends before a stop string, however tokens cut it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_cases import byte_tokenizer

from moesaic.inference.batching import Written
from moesaic.serving.text import Detokenizer, TextStream

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def feed(stream, ids, finish="length"):
    pieces = []
    for i, token in enumerate(ids):
        end = finish if i + 1 == len(ids) else None
        written = Written(key=0, token=token, finish=end, logprob=-1.0)
        pieces.append(stream.feed(written))
        if pieces[-1].finish:
            break
    return pieces


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_pieces_join_to_the_text_of_all_tokens(ids):
    pieces = feed(TextStream(TOKENIZER), ids)
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(ids)
    assert [score.token for piece in pieces for score in piece.scores] == ids


@settings(deadline=None)
@given(st.text(max_size=30))
def test_no_piece_holds_half_a_character(text):
    detokenizer = Detokenizer(TOKENIZER)
    ids = TOKENIZER(text)["input_ids"]
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) == text
    assert detokenizer.rest() == ""


@settings(deadline=None)
@given(
    st.text("ab\u00e9", max_size=20),
    st.lists(st.text("ab\u00e9", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_first_stop_string_ends_the_text(text, stops):
    ids = TOKENIZER(text)["input_ids"]
    if not ids:
        return
    pieces = feed(TextStream(TOKENIZER, stops), ids)
    found = [text.find(stop) for stop in stops if stop in text]
    # The stop string that is complete first ends it: a longer one that began before is not yet.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    seen = text[: min(ends)] if ends else text
    starts = [seen.find(stop) for stop in stops if stop in seen]
    assert "".join(piece.text for piece in pieces) == text[: min(starts, default=len(text))]
    assert pieces[-1].finish == ("stop" if found else "length")


def test_what_may_become_a_stop_string_is_held_back():
    stream = TextStream(TOKENIZER, ["END"])
    pieces = feed(stream, TOKENIZER("an ENd and END more")["input_ids"])
    texts = [piece.text for piece in pieces]
    assert texts == [*"an ", "", "", "ENd", *" and ", "", "", ""]
    assert [score.token for p in pieces for score in p.scores] == TOKENIZER("an ENd and ")[
        "input_ids"
    ]
    assert stream.num_tokens == 14


def test_scores_say_where_their_token_begins():
    pieces = feed(TextStream(TOKENIZER), TOKENIZER("a\u00e9b")["input_ids"])
    assert [score.offset for piece in pieces for score in piece.scores] == [0, 1, 1, 2]


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_special_tokens_have_no_text_and_half_a_character_is_told_at_the_end(finish):
    half = TOKENIZER("\u00e9")["input_ids"][:1]
    pieces = feed(TextStream(TOKENIZER), [*TOKENIZER("a")["input_ids"], END, *half], finish)
    assert "".join(piece.text for piece in pieces) == "a\ufffd"
    assert pieces[-1].finish == finish
    stream = TextStream(TOKENIZER)
    stream.feed(Written(key=0, token=half[0]))
    assert stream.feed(Written(key=0, token=None, finish="stop")).text == "\ufffd"
