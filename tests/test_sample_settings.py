"""Sample as a user writes it: shares, phases, clip; what is refused, and in which words."""

import json
import math
import re

import numpy as np
import pytest

from sparse_compile import Sample, Schedule


def refused(*parts: str):
    """Expects a ValueError whose sentence contains all `parts`, in order."""
    return pytest.raises(ValueError, match=".*".join(map(re.escape, parts)))


@pytest.mark.parametrize("keep", [1, 1.0, 0.5, 1e-9, np.float64(0.25)])
def test_single_keep_is_accepted(keep):
    assert Sample(keep).keep == keep
    assert Sample(keep).phases == ((keep, 0.0),)
    assert not Sample(keep).needs_total_steps


@pytest.mark.parametrize("keep", [True, 0, -0.1, 1.1, math.nan, math.inf, "0.5", "2:4", None, {}])
def test_keep_outside_its_range_is_refused(keep):
    with refused(f"Sample.keep is {keep!r}; allowed is a number in (0, 1], ", "(keep, start) pairs."):
        Sample(keep)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([], "a list of at least one (keep, start) pair"),
        ([0.5], "Sample.keep[0] is 0.5; allowed is a (keep, start) pair"),
        ([(0.5, 0.0), (0.0, 0.5)], "The keep in Sample.keep[1] is 0.0"),
        ([(0.5, 0.0), (0.1, 2.0)], "The start in Sample.keep[1] is 2.0"),
        ([(0.5, 0.0), (0.1, 0.0)], "unsorted or overlapping phases"),
        ([(0.5, 0.1)], "the first phase must start at 0.0 (add (1.0, 0.0) for a dense start)"),
    ],
)
def test_wrong_phases_are_refused(keep, message):
    with refused(message):
        Sample(keep)


@pytest.mark.parametrize("clip", [0.99, 0, -1, math.nan, "2", True])
def test_clip_below_one_is_refused(clip):
    with refused(f"Sample.clip is {clip!r}; allowed is None or a number >= 1"):
        Sample(0.5, clip)


def test_no_clip_and_an_infinite_one_are_the_same():
    assert Sample(0.5, math.inf) == Sample(0.5)


@pytest.mark.parametrize("gradients", ["dX", "all", None, 1])
def test_unknown_gradients_are_refused(gradients):
    with refused(f"Sample.gradients is {gradients!r}; allowed is ", '"both" or "input" or "weight"'):
        Sample(0.5, gradients=gradients)


def test_phases_hold_from_their_start():
    method = Sample([(1.0, 0.0), (0.25, 0.5)], clip=3, gradients="weight")
    assert method.needs_total_steps
    assert method.at(0.49) == Sample(1.0, clip=3, gradients="weight")
    assert method.at(0.5) == method.at(1.0) == Sample(0.25, clip=3, gradients="weight")


@pytest.mark.parametrize("fraction", [-0.1, math.nan, "0.5", None])
def test_fraction_that_is_no_number_is_refused(fraction):
    with refused(f"The fraction in Sample.at is {fraction!r}"):
        Sample(0.5).at(fraction)


def test_phases_without_total_steps_are_refused():
    with refused("Schedule.linear has the phase (0.25, 0.5)", "total_steps"):
        Schedule(linear=Sample([(1.0, 0.0), (0.25, 0.5)]))


@pytest.mark.parametrize(
    "method", [Sample(0.1), Sample([(1.0, 0.0), (0.25, 0.5)], clip=2, gradients="input")]
)
def test_round_trip_through_json(method):
    schedule = Schedule(linear=method, total_steps=10)
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.linear == method
