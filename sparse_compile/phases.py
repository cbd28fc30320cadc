"""Ratios as a user may write them, checked and brought into one form: see `parse_ratio`."""

import re
from collections.abc import Sequence
from itertools import pairwise
from numbers import Real
from typing import TypeAlias, TypeGuard

Ratio: TypeAlias = float | str  # a number in [0, 1), or "n:m"
Phases: TypeAlias = tuple[tuple[Ratio, float], ...]  # (ratio, the fraction of training it starts at)

_ONE_RATIO = 'a number in [0, 1), "n:m" (1 <= n <= m)'
_START = "a number in [0, 1]"


def wrong(what: str, value: object, allowed: str) -> ValueError:
    """The error for a value that is refused: what was set, to which value, and what is allowed."""
    return ValueError(f"{what} is {value!r}; allowed is {allowed}.")


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a real number, of Python or NumPy; a bool is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def parse_n_m(text: str) -> tuple[int, int]:
    """(n, m) of the N:M pattern `text`, e.g. (2, 4) of "2:4": n kept of every m neighbours.

    Raises:
        ValueError: `text` is not two plain integers with 1 <= n <= m.
    """
    match = re.fullmatch(r"([1-9][0-9]*):([1-9][0-9]*)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise wrong("The N:M pattern", text, '"n:m" with 1 <= n <= m')
    return int(match[1]), int(match[2])


def parse_ratio(field: str, value: object) -> Ratio | Phases:
    """A number, an N:M string or (ratio, start) pairs, as a float, a string or a tuple of tuples.

    Starts are fractions of training in [0, 1]; the first is 0.0 and they increase strictly.

    Raises:
        ValueError: `value` is none of these; the message calls it `field`.
    """
    if not isinstance(value, list | tuple):
        return _one_ratio(field, value, f"{_ONE_RATIO}, or a list of (ratio, start) pairs")
    if not value:
        raise wrong(field, value, "a list of at least one (ratio, start) pair")
    phases = tuple(_one_phase(f"{field}[{index}]", pair) for index, pair in enumerate(value))
    _check_order(field, phases)
    return phases


def _one_phase(field: str, pair: object) -> tuple[Ratio, float]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise wrong(field, pair, "a (ratio, start) pair")
    start = _unit_float(pair[1])
    if start is None:
        raise wrong(f"The start in {field}", pair[1], _START)
    return _one_ratio(f"The ratio in {field}", pair[0], _ONE_RATIO), start


def _one_ratio(field: str, value: object, allowed: str) -> Ratio:
    if isinstance(value, str):
        try:
            parse_n_m(value)
        except ValueError:
            raise wrong(field, value, allowed) from None
        return value
    ratio = _unit_float(value)
    if ratio is None or ratio == 1.0:
        raise wrong(field, value, allowed)
    return ratio


def _unit_float(value: object) -> float | None:
    """`value` as a float if it is a number in [0, 1], else None. (Adding 0.0 turns -0.0 into 0.0.)"""
    return float(value) + 0.0 if is_number(value) and 0 <= value <= 1 else None


def _check_order(field: str, phases: Sequence[tuple[Ratio, float]]) -> None:
    for earlier, later in pairwise(phases):
        if later[1] <= earlier[1]:
            raise ValueError(
                f"{field} has unsorted or overlapping phases, {earlier} before {later}; "
                "allowed are starts that increase strictly."
            )
    if phases[0][1] != 0:
        raise ValueError(
            f"{field} starts at {phases[0][1]}; the first phase must start at 0.0 "
            "(add (0.0, 0.0) for a dense start)."
        )
