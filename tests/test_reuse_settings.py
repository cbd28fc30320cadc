"""Reuse as a user writes it: ratios, phases, granularity; what is refused, and in which words."""

import math
import re

import numpy as np
import pytest

from sparse_compile.phases import parse_n_m
from sparse_compile.settings.reuse import Reuse

DENSE_THEN_REUSE = [(0.0, 0.0), (0.9, 0.25)]


def refused(*parts: str):
    """Expects a ValueError whose sentence contains all `parts`, in order."""
    return pytest.raises(ValueError, match=".*".join(map(re.escape, parts)))


# Reuse: the ratio as one value


@pytest.mark.parametrize("ratio", [0, 0.0, 0.5, 0.9999999999999999, np.float64(0.25), "2:4", "4:4", "1:16"])
def test_single_ratio_is_accepted(ratio):
    assert Reuse(ratio).ratio == ratio
    assert Reuse(ratio).phases == ((ratio, 0.0),)


@pytest.mark.parametrize(
    "ratio",
    [True, False, math.nan, math.inf, -math.inf, -0.1, -1e-300, 1, 1.0, 1.2, 10**400, None, 0.5j, {}, {0.5}],
)
def test_ratio_outside_its_range_is_refused(ratio):
    with refused(
        f"Reuse.ratio is {ratio!r}; allowed is a number in [0, 1), ", "a list of (ratio, start) pairs."
    ):
        Reuse(ratio)


@pytest.mark.parametrize(
    "ratio", ["", "0.9", "2", "0:4", "5:4", "2:", "2:4:8", "-2:4", " 2:4", "2:4\n", "02:4", "a:b"]
)
def test_string_that_is_no_n_m_pattern_is_refused(ratio):
    with refused(f"Reuse.ratio is {ratio!r}", '"n:m" (1 <= n <= m)'):
        Reuse(ratio)


@pytest.mark.parametrize("ratio", [0, -0.0, np.int64(0), [(0, 0)], [[0, 0]], ((-0.0, 0.0),)])
def test_ratio_is_stored_as_floats_and_tuples(ratio):
    assert repr(Reuse(ratio).ratio) in ("0.0", "((0.0, 0.0),)")


@pytest.mark.parametrize(("text", "expected"), [("2:4", (2, 4)), ("4:4", (4, 4)), ("1:16", (1, 16))])
def test_parse_n_m(text, expected):
    assert parse_n_m(text) == expected


def test_parse_n_m_refuses_more_kept_than_there_are():
    with refused("'5:4'", "1 <= n <= m"):
        parse_n_m("5:4")


# Reuse: phases


@pytest.mark.parametrize(
    "phases", [[(0.0, 0.0), (0.9, 1.0)], [(0.9, 0), (0.0, 0.5)], [("2:4", 0.0)], [[0.5, 0.0]]]
)
def test_phases_are_accepted(phases):
    assert Reuse(phases).phases == tuple(tuple(pair) for pair in phases)


@pytest.mark.parametrize(
    ("ratio", "sentence"),
    [
        ([], "Reuse.ratio is []; allowed is a list of at least one"),
        ((0.9, 0.25), "Reuse.ratio[0] is 0.9; allowed is a (ratio, start) pair"),
        ([(0.0, 0.0), (0.9,)], "Reuse.ratio[1] is (0.9,); allowed is a (ratio, start) pair"),
        ([(0.0, 0.0, 0.0)], "Reuse.ratio[0] is (0.0, 0.0, 0.0); allowed is a (ratio, start) pair"),
        (["24"], "Reuse.ratio[0] is '24'; allowed is a (ratio, start) pair"),
        ([(1.0, 0.0)], "The ratio in Reuse.ratio[0] is 1.0; allowed is a number in [0, 1)"),
        ([(True, 0.0)], "The ratio in Reuse.ratio[0] is True"),
        ([("5:4", 0.0)], "The ratio in Reuse.ratio[0] is '5:4'"),
        ([(DENSE_THEN_REUSE, 0.0)], "The ratio in Reuse.ratio[0] is [(0.0"),
        ([(0.0, 0.0), (0.9, 1.01)], "The start in Reuse.ratio[1] is 1.01; allowed is a number in [0, 1]"),
        ([(0.0, -0.1)], "The start in Reuse.ratio[0] is -0.1"),
        ([(0.0, math.nan)], "The start in Reuse.ratio[0] is nan"),
        ([(0.0, False)], "The start in Reuse.ratio[0] is False"),
        ([(0.0, "0")], "The start in Reuse.ratio[0] is '0'"),
    ],
)
def test_malformed_phases_are_refused(ratio, sentence):
    with refused(sentence):
        Reuse(ratio)


@pytest.mark.parametrize("starts", [(0.0, 0.5, 0.5), (0.0, 0.75, 0.5), (0.5, 0.0)])
def test_unsorted_or_overlapping_phases_are_refused_with_the_pair(starts):
    earlier, later = starts[-2:]
    with refused(f"unsorted or overlapping phases, (0.1, {earlier}) before (0.1, {later})"):
        Reuse([(0.1, start) for start in starts])


def test_first_phase_must_start_at_zero():
    with refused("Reuse.ratio starts at 0.25", "add (0.0, 0.0) for a dense start"):
        Reuse([(0.9, 0.25)])


@pytest.mark.parametrize(
    ("fraction", "ratio"),
    [(0, 0.0), (0.2499999, 0.0), (0.25, 0.9), (0.5, 0.9), (0.75, 0.1), (1.0, 0.1), (7.5, 0.1)],
)
def test_ratio_is_piecewise_constant(fraction, ratio):
    reuse = Reuse([*DENSE_THEN_REUSE, (0.1, 0.75)], "element", "sample", 3)
    assert reuse.at(fraction) == Reuse(ratio, "element", "sample", 3)


def test_single_ratio_holds_at_every_fraction():
    assert Reuse(0.9).at(0.0) == Reuse(0.9).at(1.0) == Reuse(0.9)


@pytest.mark.parametrize("fraction", [-0.1, math.nan, True, "0.5", None])
def test_at_refuses_what_is_no_fraction(fraction):
    with refused(f"The fraction in Reuse.at is {fraction!r}; allowed is a number >= 0"):
        Reuse(0.9).at(fraction)


@pytest.mark.parametrize(
    ("ratio", "keep"), [(0, 1.0), (0.75, 0.25), ("2:4", 0.5), ("4:4", 1.0), ([(0.5, 0.0)], 0.5)]
)
def test_keep_is_one_minus_ratio(ratio, keep):
    assert Reuse(ratio).keep == keep


def test_keep_of_several_phases_is_refused():
    with refused("Reuse.keep is not defined for the 2 phases"):
        _ = Reuse(DENSE_THEN_REUSE).keep


@pytest.mark.parametrize(("ratio", "needed"), [(0.9, False), ([(0.9, 0.0)], False), (DENSE_THEN_REUSE, True)])
def test_total_steps_are_needed_by_late_phases_only(ratio, needed):
    assert Reuse(ratio).needs_total_steps is needed


# Reuse: granularity, source, refresh_every


@pytest.mark.parametrize("ratio", ["2:4", [("2:4", 0.0), ("3:4", 0.25), (0.0, 0.5)], [(0, 0), ("2:4", 0.5)]])
def test_n_m_ratio_chooses_its_granularity(ratio):
    assert Reuse(ratio).granularity == "n:m"
    assert Reuse(ratio) == Reuse(ratio, "n:m")


def test_dense_phase_keeps_the_n_m_granularity():
    assert Reuse([("2:4", 0.0), (0.0, 0.5)]).at(0.5) == Reuse(0.0, "n:m")


def test_n_m_ratio_with_element_granularity_is_refused():
    with refused("Reuse.granularity is 'element'", '"n:m" with the ratio "2:4"'):
        Reuse([(0.0, 0.0), ("2:4", 0.5)], "element")


@pytest.mark.parametrize("ratio", [0.5, [("2:4", 0.0), (0.5, 0.25)]])
def test_number_with_n_m_granularity_is_refused(ratio):
    with refused("Reuse.ratio holds 0.5", 'allowed with granularity "n:m"', "or 0.0 (dense)"):
        Reuse(ratio, "n:m")


def test_number_beside_an_n_m_ratio_is_refused_at_the_default_granularity():
    with refused("Reuse.ratio holds 0.5"):
        Reuse([("2:4", 0.0), (0.5, 0.25)])


@pytest.mark.parametrize("granularity", ["Row", "2:4", "", None, 1, ["row"]])
def test_unknown_granularity_is_refused(granularity):
    with refused(f"Reuse.granularity is {granularity!r}", '"row" or "element" or "n:m"'):
        Reuse(0.9, granularity)


@pytest.mark.parametrize("source", ["batch", "", None, ["mean"]])
def test_unknown_source_is_refused(source):
    with refused(f"Reuse.source is {source!r}", '"mean" or "sample"'):
        Reuse(0.9, source=source)


@pytest.mark.parametrize("refresh_every", [0, -1, 1.0, True, "1", None])
def test_refresh_every_must_be_a_positive_int(refresh_every):
    with refused(f"Reuse.refresh_every is {refresh_every!r}", "an int >= 1"):
        Reuse(0.9, refresh_every=refresh_every)
