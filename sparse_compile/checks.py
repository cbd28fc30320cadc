"""What every setting is checked with: the errors, and the plain kinds of value."""

from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TypeGuard


def wrong(what: str, value: object, allowed: str) -> ValueError:
    """The error for a value that is refused: what was set, to which value, and what is allowed."""
    return ValueError(f"{what} is {value!r}; allowed is {allowed}.")


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a real number, of Python or NumPy; a bool is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def store(instance: object, field: str, value: object) -> None:
    """Set a field of a frozen dataclass to its checked form, from its own `__post_init__`."""
    object.__setattr__(instance, field, value)


def one_of(field: str, value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise wrong(field, value, " or ".join(f'"{name}"' for name in allowed))
    return value


def integer(field: str, value: object, at_least: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < at_least:
        raise wrong(field, value, f"an int >= {at_least}")
    return int(value)


def near(name: str, candidates: Iterable[str]) -> str:
    """Up to five of `candidates` that look like `name`, quoted; empty if none does."""
    return listed(get_close_matches(name, dict.fromkeys(candidates), n=5))


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
