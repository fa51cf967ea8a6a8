"""A requested fraction as a number of blocks, or a refusal that names the nearest."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic._errors import InputError
from moesaic.conversion._active import routed_blocks


@given(st.data())
def test_every_number_of_blocks_is_found(data):
    num_blocks = data.draw(st.integers(1, 256))
    num_shared = data.draw(st.integers(0, num_blocks - 1))
    k = data.draw(st.integers(1, num_blocks - num_shared))
    active = (num_shared + k) / num_blocks
    assert routed_blocks(active, num_blocks, num_shared) == k
    # As it is written by hand.
    assert routed_blocks(round(active, 8), num_blocks, num_shared) == k


@given(st.floats(0.0, 1.0, exclude_min=True), st.integers(1, 64), st.integers(0, 63))
def test_what_is_refused_names_what_works(active, num_blocks, num_shared):
    num_shared = min(num_shared, num_blocks - 1)
    try:
        routed_blocks(active, num_blocks, num_shared)
    except InputError as error:
        named = re.search(r"works is (\S+)(?: or (\S+))?$", str(error)).groups()
        works = [(num_shared + k) / num_blocks for k in range(1, num_blocks - num_shared + 1)]
        closest = min(works, key=lambda fraction: abs(fraction - active))
        assert pytest.approx(closest, rel=1e-5) in [float(x) for x in named if x]


def test_shared_blocks_count():
    # 2 of 8 shared: 0.5 is 4 blocks, 2 of them routed.
    assert routed_blocks(0.5, 8, 2) == 2
    with pytest.raises(InputError, match=r"out of 8, 2 of them shared; .* works is 0.375 or 0.5$"):
        routed_blocks(0.25, 8, 2)
