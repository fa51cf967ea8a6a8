"""Times of several calls in turns, on a clock that only the calls move."""

import gc

import pytest

from moesaic._errors import InputError
from moesaic.evaluation.bench.timing import in_turns, measure


class Clock:
    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def takes(self, name, *seconds):
        remaining = list(seconds)

        def call():
            self.calls.append(name)
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return call


def test_median_and_quartiles():
    clock = Clock()
    # The first times are the warm-up's and that of the call that sizes a sample.
    call = clock.takes("a", 9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    timing = measure({"a": call}, seconds=1.0, warmup=1, min_rounds=5, clock=clock)["a"]
    assert (timing.median_s, timing.low_s, timing.high_s) == (3.0, 2.0, 4.0)
    assert (timing.samples, timing.calls) == (5, 1)


def test_rounds_begin_with_another_call_each_time():
    clock = Clock()
    calls = {name: clock.takes(name, 1.0) for name in "abc"}
    measure(calls, seconds=0.5, warmup=0, min_rounds=3, clock=clock)
    # One call of each sizes its sample.
    assert "".join(clock.calls) == "abc" + "abc" + "bca" + "cab"


def test_rounds_end_with_the_budget_but_not_before_the_least():
    clock = Clock()
    timing = measure({"a": clock.takes("a", 1.0)}, seconds=7.5, min_rounds=2, clock=clock)
    assert timing["a"].samples == 8
    timing = measure({"a": clock.takes("a", 1.0)}, seconds=99, max_rounds=4, clock=clock)
    assert timing["a"].samples == 4


def test_short_calls_are_timed_together():
    clock = Clock()
    call = clock.takes("a", 2.0**-14)
    timing = measure({"a": call}, seconds=0.01, warmup=0, min_rounds=3, clock=clock)["a"]
    assert timing.calls == 17
    assert timing.median_s == 2.0**-14


def test_garbage_is_not_collected_meanwhile():
    clock, states = Clock(), []

    def call():
        states.append(gc.isenabled())
        clock.now += 1.0

    measure({"a": call}, seconds=1.0, warmup=0, min_rounds=2, clock=clock)
    assert states[1:] == [False, False]
    assert gc.isenabled()


def test_copies_run_in_turn():
    seen = []
    call = in_turns([lambda: seen.append(0), lambda: seen.append(1)])
    for _ in range(3):
        call()
    assert seen == [0, 1, 0]


@pytest.mark.parametrize(("calls", "seconds"), [({}, 1.0), ({"a": print}, 0.0)])
def test_nothing_to_time(calls, seconds):
    with pytest.raises(InputError, match="seconds above 0"):
        measure(calls, seconds=seconds)
