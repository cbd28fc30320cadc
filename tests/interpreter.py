"""Triton's interpreter, made quicker: tests spend more time in it than in the kernels that it runs.

It replaces the whole of ``triton.language`` when a kernel is launched, and once more at every call of a
function in it, for every program of the grid. With this, not again what was replaced in the same launch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_seen: set[int] = set()  # the modules (their globals) whose language is replaced in this launch


def make_quicker() -> None:
    from triton.runtime import interpreter

    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    interpreter.GridExecutor.__call__ = _launch(interpreter.GridExecutor.__call__)


def _once_a_launch(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def patch_lang(function: Any) -> Any:
        """What is returned is asked for at the head of a launch only, which is never seen."""
        module = id(function.__globals__)
        if module in _seen:
            return None
        _seen.add(module)
        return patch(function)

    return patch_lang


def _launch(call: Callable[..., Any]) -> Callable[..., Any]:
    def launch(*args: Any, **options: Any) -> Any:
        _seen.clear()
        return call(*args, **options)

    return launch


@contextmanager
def no_overflow_is_looked_for() -> Iterator[None]:
    """In sums and products of whole numbers; a fifth of the interpreter's time."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    options = builder.options
    builder.options = dataclasses.replace(options, sanitize_overflow=False)
    yield
    builder.options = options
