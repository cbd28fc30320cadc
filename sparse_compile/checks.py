"""What every setting is checked with: the errors, and the plain kinds of value."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TypeGuard


def wrong(what: str, value: object, allowed: str) -> ValueError:
    """The error for a value that is refused: what was set, to which value, and what is allowed."""
    return ValueError(f"{what} is {value!r}; allowed is {allowed}.")


def unknown(what: str, name: str, allowed: Iterable[str]) -> TypeError:
    """The error for a setting that there is not."""
    allowed = list(allowed)
    found = near(name, allowed)
    return TypeError(
        f"{what} has no setting '{name}'; near names: {found or 'none'}; allowed are {listed(allowed)}."
    )


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


def check_keys(owner: str, given: Mapping[str, object], cls: type) -> None:
    """Refuse keys that are no field of the dataclass `cls`, and the lack of one that has no default."""
    names = [field.name for field in fields(cls)]
    for key in given:
        if key not in names:
            close = near(str(key), names)
            raise ValueError(
                f"{owner} has the unknown key {key!r}; near names: {close or 'none'}; "
                f"allowed are {listed(names)}."
            )
    for field in fields(cls):
        if field.default is field.default_factory is MISSING and field.name not in given:
            raise ValueError(f"{owner} lacks the key {field.name!r}, which is required.")
