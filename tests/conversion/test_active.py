"""An active fraction is a whole number of experts, or the nearest are named."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic._errors import InputError
from moesaic.conversion._active import whole_experts


@pytest.mark.parametrize(
    ("active", "num_experts", "count"),
    [(0.25, 16, 4), (1.0, 7, 7), (1 / 3, 3, 1), (0.333333, 3, 1), (0.0416667, 24, 1), (1, 1, 1)],
)
def test_whole(active, num_experts, count):
    assert whole_experts(active, num_experts) == count


@pytest.mark.parametrize(
    ("active", "num_experts", "message"),
    [
        (0.7, 16, r"whole number of 16 experts, got 0.7; the nearest that work: 0.6875 and 0.75$"),
        (0.01, 16, r"the nearest that work: 0.0625$"),
        (0.999, 3, r"the nearest that work: 0.666667 and 1$"),
        (0.0, 4, r"active must be in \(0, 1\], got 0.0"),
        (float("nan"), 4, r"active must be in \(0, 1\], got nan"),
        (1.01, 4, r"active must be in \(0, 1\], got 1.01"),
    ],
)
def test_refused(active, num_experts, message):
    with pytest.raises(InputError, match=message):
        whole_experts(active, num_experts)


@given(active=st.floats(1e-6, 1.0), num_experts=st.integers(1, 400))
def test_what_is_named_works(active, num_experts):
    try:
        assert whole_experts(active, num_experts) == pytest.approx(active * num_experts, abs=1e-3)
    except InputError as error:
        named = re.findall(r"[\d.e-]+", str(error).rpartition("work: ")[2])
        counts = [whole_experts(float(value), num_experts) for value in named]
        assert 1 <= len(counts) <= 2
        # Below and above what was asked for.
        assert counts[-1] - active * num_experts <= 1
        assert len(counts) == 1 or counts == [counts[0], counts[0] + 1]


def test_some_may_be_needed():
    # 2 of 8 always on and one at least to be chosen.
    assert whole_experts(0.375, 8, least=3) == 3
    message = r"of 8 experts, at least 3, got 0.25; the nearest that work: 0.375$"
    with pytest.raises(InputError, match=message):
        whole_experts(0.25, 8, least=3)
