"""Triton's interpreter, made quicker: tests spend more time in it than in the kernels that it runs.

It replaces the whole of ``triton.language`` when a kernel is launched, and once more at every call of a
function in it, for every program of the grid; and puts it back after the launch. With this it is replaced
once, and stays so: a process in which kernels are interpreted builds none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _Replaced:
    """What is asked to put the language back."""

    def restore(self) -> None:
        pass


def make_quicker() -> None:
    from triton.runtime import interpreter

    interpreter._patch_lang = _once(interpreter._patch_lang)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)


def _once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    seen: set[int] = set()  # of the modules that see the language, their names

    def patch_lang(function: Any) -> _Replaced:
        names = id(function.__globals__)
        if names not in seen:
            seen.add(names)
            patch(function)
        return _Replaced()

    return patch_lang


def _remembered(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    found: dict[Any, Any] = {}

    def dtype(of: Any) -> Any:
        """NumPy's for Triton's; a pointer's cannot be remembered."""
        if of.__hash__ is None:
            return find(of)
        if of not in found:
            found[of] = find(of)
        return found[of]

    return dtype


@contextmanager
def no_overflow_is_looked_for() -> Iterator[None]:
    """In sums and products of whole numbers; a fifth of the interpreter's time."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    options = builder.options
    builder.options = dataclasses.replace(options, sanitize_overflow=False)
    yield
    builder.options = options
