import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.data import Document, DuplicateConfig
from moesaic.data.documents import draw, excerpt, sections
from moesaic.data.duplicates import NearDuplicates, shingles

TEXT = st.text(alphabet="ab \n", max_size=120)


@given(TEXT, st.integers(16, 60), st.floats(0, 1, exclude_max=True))
def test_excerpt_is_a_bounded_part(text, num_characters, place):
    part = excerpt(text, num_characters, place)
    assert part in text
    assert len(part) <= num_characters
    if len(text) <= num_characters:
        assert part == text
    else:
        # A quarter may be lost at each end while a line or word break is looked for.
        assert len(part) >= num_characters // 2 - 1


def test_excerpt_stands_between_lines():
    text = "\n".join(f"line {number:03}" for number in range(200))
    for place in (0.0, 0.3, 0.77, 0.999):
        lines = excerpt(text, 100, place).split("\n")
        assert set(lines) <= set(text.split("\n"))
    assert excerpt(text, None, 0.5) == text
    assert excerpt(text, 100, 0.0).startswith("line 000")


@given(TEXT, st.integers(16, 40))
def test_sections_give_the_text_back(text, num_characters):
    document = Document(text=text, domain="d", source="s", name="n")
    parts = list(sections(document, num_characters))
    assert "".join("".join(p.text for p in parts).split()) == "".join(text.split())
    assert all(p.text.strip() for p in parts) or parts == [document]
    assert len({p.name for p in parts}) == len(parts)


def test_draw_depends_on_text_and_seed_only():
    assert draw("a", 0) == draw("a", 0)
    assert draw("a", 0) != draw("a", 1)
    sides = [draw(f"text {number}", 0).side for number in range(2000)]
    assert min(sides) >= 0.0
    assert max(sides) < 1.0
    assert sum(side < 0.2 for side in sides) == pytest.approx(400, abs=60)


WORDS = [f"w{number}" for number in range(100)]
TALE = " ".join(WORDS)


@pytest.mark.parametrize(
    ("text", "containment"),
    [
        # 100 words make 96 shingles of 5; one changed word in the middle spoils 5 of them.
        pytest.param(TALE, 1.0, id="same"),
        pytest.param(TALE.upper().replace(" ", ",\n\n  "), 1.0, id="case-and-space"),
        pytest.param(" ".join([*WORDS[:50], "changed", *WORDS[51:]]), 91 / 96, id="one-word"),
        pytest.param(" ".join(WORDS[:29]), 1.0, id="quote"),
        pytest.param("new " * 5000 + TALE + " end" * 5000, 1.0, id="held-out-inside-long-text"),
        pytest.param(" ".join([*WORDS[:52], *(f"n{i}" for i in range(48))]), 0.5, id="half"),
        pytest.param(" ".join(reversed(WORDS)), 0.0, id="reversed"),
        pytest.param(" ".join(WORDS[::2]), 0.0, id="every-other-word"),
        pytest.param("w1 w2", 0.0, id="shorter-than-a-shingle"),
        pytest.param("!", 0.0, id="no-words"),
    ],
)
def test_containment_by_hand(text, containment):
    guard = NearDuplicates(["something else entirely, of six words", TALE], DuplicateConfig())
    assert guard.containment(text) == pytest.approx(containment)
    assert guard.matches(text) == (containment >= 0.5)


def test_containment_takes_the_closest_document_where_shingles_are_shared():
    # Both held-out texts share their first half, so each shingle there has two owners.
    first = " ".join(WORDS[:60])
    second = " ".join([*WORDS[:30], *(f"s{i}" for i in range(30))])
    guard = NearDuplicates([first, second], DuplicateConfig())
    assert guard.containment(" ".join(WORDS[:30])) == 1.0
    assert guard.containment(first) == 1.0
    # 60 words make 56 shingles, 26 of them inside the first 30 words.
    other = " ".join([*WORDS[:30], *(f"o{i}" for i in range(30))])
    assert guard.containment(other) == pytest.approx(26 / 56)


def test_short_and_empty_sides():
    assert NearDuplicates([], DuplicateConfig()).containment("any text") == 0.0
    guard = NearDuplicates(["two words", "..."], DuplicateConfig())
    assert guard.matches("Two words!")
    assert guard.matches(" ... ")
    assert not guard.matches("two words and then some more of them")


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 6))
def test_shingles_are_the_distinct_runs(words, num_words):
    runs = {tuple(words[i : i + num_words]) for i in range(max(len(words) - num_words, 0) + 1)}
    assert len(shingles(" ".join(words), num_words)) == len(runs)
