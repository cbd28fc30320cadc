"""Ratios and shares that change in the course of training, checked and brought into one form."""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from sparse_compile.checks import is_number, wrong

Ratio: TypeAlias = float | str  # a number in [0, 1), or "n:m"
Phases: TypeAlias = tuple[tuple[Ratio, float], ...]  # (ratio, the fraction of training it starts at)
KeepPhases: TypeAlias = tuple[tuple[float, float], ...]  # the same with shares to keep, in (0, 1]

_ONE_RATIO = 'a number in [0, 1), "n:m" (1 <= n <= m)'
_ONE_KEEP = "a number in (0, 1]"
_START = "a number in [0, 1]"


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
    return _parse_phases(field, value, _one_ratio, _ONE_RATIO, "ratio")


def parse_keep(field: str, value: object) -> float | KeepPhases:
    """A share in (0, 1] or (keep, start) pairs, as a float or a tuple of tuples; see `parse_ratio`.

    Raises:
        ValueError: `value` is none of these; the message calls it `field`.
    """
    return _parse_phases(field, value, _one_keep, _ONE_KEEP, "keep")


def _parse_phases(
    field: str, value: object, parse: Callable[[str, object, str], Any], allowed: str, what: str
) -> Any:
    """`value` by `parse`, or each of its (`what`, start) pairs."""
    if not isinstance(value, list | tuple):
        return parse(field, value, f"{allowed}, or a list of ({what}, start) pairs")
    if not value:
        raise wrong(field, value, f"a list of at least one ({what}, start) pair")
    phases = []
    for index, pair in enumerate(value):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise wrong(f"{field}[{index}]", pair, f"a ({what}, start) pair")
        start = _unit_float(pair[1])
        if start is None:
            raise wrong(f"The start in {field}[{index}]", pair[1], _START)
        phases.append((parse(f"The {what} in {field}[{index}]", pair[0], allowed), start))
    _check_order(field, phases, f"({1.0 if what == 'keep' else 0.0}, 0.0)")
    return tuple(phases)


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


def _one_keep(field: str, value: object, allowed: str) -> float:
    keep = _unit_float(value)
    if keep is None or keep == 0.0:
        raise wrong(field, value, allowed)
    return keep


def _unit_float(value: object) -> float | None:
    """`value` as a float if it is a number in [0, 1], else None. (Adding 0.0 turns -0.0 into 0.0.)"""
    return float(value) + 0.0 if is_number(value) and 0 <= value <= 1 else None


def _check_order(field: str, phases: Sequence[tuple[Any, float]], dense: str) -> None:
    for earlier, later in pairwise(phases):
        if later[1] <= earlier[1]:
            raise ValueError(
                f"{field} has unsorted or overlapping phases, {earlier} before {later}; "
                "allowed are starts that increase strictly."
            )
    if phases[0][1] != 0:
        raise ValueError(
            f"{field} starts at {phases[0][1]}; the first phase must start at 0.0 "
            f"(add {dense} for a dense start)."
        )
