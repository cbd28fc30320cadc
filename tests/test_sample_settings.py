"""Sample as a user writes it: shares, phases, clip; what is refused, and in which words."""

import json
import math
import re

import numpy as np
import pytest

from sparse_compile import Reuse, Sample, Schedule


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


# Adaptive


@pytest.mark.parametrize("field", ["act_tau", "weight_tau"])
@pytest.mark.parametrize("value", [0, -0.1, math.inf, math.nan, "0.1", True, None])
def test_tau_that_is_no_positive_number_is_refused(field, value):
    with refused(f"Sample.adaptive: {field} is {value!r}; allowed is a finite number > 0"):
        Sample.adaptive(**{field: value})


@pytest.mark.parametrize("field", ["s_step", "ratio_step"])
@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan, "0.1", True])
def test_steps_outside_their_range_are_refused(field, value):
    with refused(f"Sample.adaptive: {field} is {value!r}; allowed is a number in (0, 1)"):
        Sample.adaptive(**{field: value})


@pytest.mark.parametrize("value", [1, -0.1, math.nan, "0.1", False])
def test_smoothing_outside_its_range_is_refused(value):
    with refused(f"Sample.adaptive: smoothing is {value!r}; allowed is a number in [0, 1)"):
        Sample.adaptive(smoothing=value)


def test_no_smoothing_is_allowed():
    assert Sample.adaptive(smoothing=0).smoothing == 0.0


@pytest.mark.parametrize("value", [0, -1, 1.5, "100", True, None])
def test_frequency_that_is_no_positive_int_is_refused(value):
    with refused(f"Sample.adaptive: cal_var_freq is {value!r}; allowed is an int >= 1"):
        Sample.adaptive(cal_var_freq=value)


@pytest.mark.parametrize("value", ["solved", "", None, 1])
def test_unknown_update_is_refused(value):
    with refused(f"Sample.adaptive: update is {value!r}; allowed is ", '"step" or "solve"'):
        Sample.adaptive(update=value)


@pytest.mark.parametrize("value", ["", 3, ["BertLayer"]])
def test_where_that_is_no_name_is_refused(value):
    allowed = "None, a class name or a pattern of module paths"
    with refused(f"Sample.adaptive: where is {value!r}; allowed is {allowed}"):
        Sample.adaptive(where=value)
    with refused(f"Sample.where is {value!r}; allowed is {allowed}"):
        Sample(0.5, where=value)


@pytest.mark.parametrize("value", [0.5, "none", True, float("nan"), -1])
def test_adaptive_refuses_a_clip(value):
    with refused(f"Sample.adaptive: clip is {value!r}; allowed is None, ", '"auto" or a number >= 1'):
        Sample.adaptive(clip=value)


@pytest.mark.parametrize(("clip", "stored"), [(None, None), ("auto", "auto"), (2, 2.0), (math.inf, None)])
def test_adaptive_clip(clip, stored):
    schedule = Schedule.vcas(clip=clip)
    assert schedule.linear.clip == stored
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_adaptive_takes_no_share():
    with pytest.raises(TypeError, match="keep"):
        Sample.adaptive(keep=0.5)


def test_the_papers_defaults():
    found = Sample.adaptive()
    assert (found.act_tau, found.weight_tau, found.cal_var_freq) == (0.025, 0.025, 100)
    assert (found.s_step, found.ratio_step, found.update) == (0.01, 0.95, "step")


def test_adaptive_does_not_depend_on_the_step():
    adaptive = Sample.adaptive()
    assert adaptive.at(0.0) is adaptive.at(0.7) is adaptive
    assert not adaptive.needs_total_steps
    assert Schedule.vcas().at(12_345).blocks == adaptive


# As part of a schedule


def test_vcas_samples_both_blocks_and_rows():
    schedule = Schedule.vcas(act_tau=0.1, where="BertLayer", exclude="head", skip_layers=0, total_steps=10)
    adaptive = Sample.adaptive(act_tau=0.1, where="BertLayer")
    assert schedule == Schedule(
        blocks=adaptive, linear=adaptive, exclude="head", skip_layers=0, total_steps=10
    )


def test_an_unknown_option_of_vcas_is_refused():
    with pytest.raises(TypeError, match="tau"):
        Schedule.vcas(tau=0.1)


@pytest.mark.parametrize(
    "value", [0.5, Reuse(0.9), "sample", True, Sample, {"method": "sample", "keep": 0.5}]
)
def test_blocks_take_sampling_only(value):
    with refused(
        "Schedule.blocks is ", "; allowed is None or Sample or Sample.adaptive(), e.g. blocks=Sample(0.9)"
    ):
        Schedule(blocks=value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"linear": Sample(0.5, where="a")}, "Schedule.linear's where is 'a'; allowed is None"),
        ({"linear": Sample.adaptive(where="a")}, "Schedule.linear's where is 'a'; allowed is None"),
        ({"blocks": Sample(0.5, gradients="weight")}, "Schedule.blocks's gradients is 'weight'"),
    ],
)
def test_what_would_be_ignored_is_refused(fields, message):
    with refused(message):
        Schedule(**fields)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("attention", "Schedule.attention is Adaptive("),
        ("saved_activations", "Schedule.saved_activations is Adaptive("),
        ("weight_gradients", "allowed is None or RotatedTopK"),
    ],
)
def test_sampling_is_not_available_elsewhere(field, message):
    with refused(message):
        Schedule(**{field: Sample.adaptive()})


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.vcas(),
        Schedule.vcas(cal_var_freq=7, update="solve", smoothing=0, where="layer.*", include="encoder"),
        Schedule(blocks=Sample(0.5, clip=2, where="BertLayer")),
        Schedule(blocks=Sample([(1.0, 0.0), (0.25, 0.5)]), linear=Sample.adaptive(), total_steps=10),
    ],
)
def test_schedules_of_blocks_through_json(schedule):
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert (type(again.blocks), type(again.linear)) == (type(schedule.blocks), type(schedule.linear))


@pytest.mark.parametrize(
    ("blocks", "parts"),
    [
        (
            {"method": "reuse", "ratio": 0.9},
            ["Schedule.blocks[\"method\"] is 'reuse'", '"sample" or "adaptive"'],
        ),
        ({"method": "adaptive", "keep": 0.5}, ["Schedule.blocks has the unknown key 'keep'", "act_tau"]),
        ({"method": "sample"}, ["Schedule.blocks lacks the key 'keep'"]),
    ],
)
def test_blocks_of_a_dict_are_checked(blocks, parts):
    with refused(*parts):
        Schedule.from_dict({"blocks": blocks})
