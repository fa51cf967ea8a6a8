"""What every registered schedule owes its router, and the count of steps that it follows."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic._errors import InputError
from moesaic.nn.schedules._base import ScheduleConfig, StepClock
from moesaic.nn.schedules._table import SCHEDULES

each_shape = pytest.mark.parametrize("shape", SCHEDULES)


@each_shape
@given(start=st.floats(1e-3, 1e3), end=st.floats(1e-3, 1e3), steps=st.integers(0, 50))
def test_goes_from_start_to_end_one_way_and_stays(shape, start, end, steps):
    schedule = ScheduleConfig(start=start, end=end, steps=steps, shape=shape)
    values = [schedule.at(step) for step in range(steps + 3)]
    assert values[0] == pytest.approx(end if steps == 0 else start)
    # Exactly, so that nothing drifts afterwards.
    assert set(values[steps:]) == {end}
    ordered = sorted(values, reverse=start > end)
    assert values == pytest.approx(ordered)
    assert all(min(start, end) * 0.999 <= value <= max(start, end) * 1.001 for value in values)


def test_shapes_by_hand():
    def values(shape):
        schedule = ScheduleConfig(start=16.0, end=1.0, steps=4, shape=shape)
        return [schedule.at(step) for step in range(6)]

    assert values("linear") == [16.0, 12.25, 8.5, 4.75, 1.0, 1.0]
    assert values("exponential") == pytest.approx([16.0, 8.0, 4.0, 2.0, 1.0, 1.0])
    assert values("switch") == [16.0, 16.0, 16.0, 16.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, r"steps must be at least 0, got -1; 0 is over at once"),
        ({"shape": "linaer"}, r"schedule 'linaer' is unknown; did you mean linear"),
        ({"end": float("inf")}, r"start and end must be finite, got 1.0 and inf"),
        (
            {"shape": "exponential", "end": 0.0},
            r"an exponential schedule must start and end above 0, got 1.0 and 0.0; use linear",
        ),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ScheduleConfig(**{"start": 1.0, "end": 2.0, "steps": 4, **options})


def test_the_clock_is_saved_and_keeps_its_kind():
    clock = StepClock()
    for _ in range(3):
        clock.end_step()
    other = StepClock()
    other.load_state_dict(clock.state_dict())
    assert other.step() == copy.deepcopy(clock).step() == 3
    # A model in half precision counts on beyond what such numbers can hold.
    half = clock.bfloat16()
    half.steps_done.fill_(256)
    half.end_step()
    assert half.step() == 257
    half.reset_parameters()
    assert half.step() == 0
