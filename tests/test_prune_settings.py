"""`PruneSaved` and where a `Schedule` takes it."""

import json
import math

import pytest

from sparse_compile import PruneSaved, Reuse, Schedule


@pytest.mark.parametrize("ratio", [1, -0.1, "0.9", "2:4", None, True, math.nan, [(0.0, 0.0), (0.9, 0.5)]])
def test_ratio_is_one_number(ratio):
    with pytest.raises(
        ValueError, match=r"^PruneSaved.ratio is .*; allowed is one number in \[0, 1\), without"
    ):
        PruneSaved(ratio)


@pytest.mark.parametrize("values", ["fp8", None, 8])
def test_values(values):
    allowed = '"same" or "fp16" or "bf16" or "int8"'
    with pytest.raises(ValueError, match=f"^PruneSaved.values is {values!r}; allowed is {allowed}.$"):
        PruneSaved(0.9, values)


def test_as_published_is_a_bool():
    with pytest.raises(ValueError, match=r"^PruneSaved.as_published is 1; allowed is True or False.$"):
        PruneSaved(0.9, as_published=1)


def test_it_is_refused_where_it_does_not_belong():
    with pytest.raises(ValueError, match=r"^Schedule.linear is PruneSaved"):
        Schedule(linear=PruneSaved(0.9))
    with pytest.raises(
        ValueError, match=r"^Schedule.saved_activations is Reuse.*saved_activations=PruneSaved\(0.9\)"
    ):
        Schedule(saved_activations=Reuse(0.9))


def test_json_round_trip():
    schedule = Schedule(saved_activations=PruneSaved(0.75, "int8"))
    assert schedule.to_dict()["saved_activations"] == {
        "method": "prune_saved",
        "ratio": 0.75,
        "values": "int8",
        "as_published": False,
    }
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_it_holds_at_every_step():
    schedule = Schedule.back_razor(0.8, exclude="head", total_steps=10)
    published = PruneSaved(0.8, as_published=True)
    assert schedule.saved_activations == published
    assert schedule.at(0).saved_activations == schedule.at(10).saved_activations == published
    assert schedule.exclude == ("head",)
    with pytest.raises(ValueError, match=r"^The fraction in PruneSaved\.at is -1"):
        PruneSaved(0.5).at(-1)


def test_exact():
    assert PruneSaved(0).exact
    assert not PruneSaved(0, "fp16").exact
    assert not PruneSaved(0.1).exact
