"""Launching a kernel, with as little of the host's time as can be.

A backward at keep 0.25 has a layer's products done in some 30 µs of an H100, for which Triton takes some
20 of the host to launch each: it asks what the kernel was tuned to, and binds and classifies arguments, anew
each time. What comes of that is remembered here, by sizes and strides, dtypes, and whether addresses are
multiples of 16. A kernel that was built is then called itself, with all of its arguments, as in Triton's own
tutorial of the fused softmax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Traits:
    """Which arguments of a kernel are tensors, and which are numbers that it is built for: not those of which
    Triton is told to know nothing, nor floats. (The kernel is held, so that no other one gets its id.)"""

    kernel: Any
    tensors: tuple[int, ...]
    numbers: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    """A kernel as it was built for some arguments, and the values of those that are constant."""

    compiled: Any
    by_name: dict[str, Any]
    behind: tuple[Any, ...]


# Lengths of batches may differ from step to step: at so many, all is remembered anew.
_MOST = 10_000
_traits: dict[int, Traits] = {}
_built: dict[tuple[Any, ...], Built] = {}
# Tuning keeps its arguments in the kernel: two threads (of two GPUs) must not tune at once.
_tuning = threading.RLock()
_watching = threading.local()


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """In which ``device`` is the current one, where Triton launches and events are recorded. To change it
    takes microseconds; mostly it is that already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def launch(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
    """Run ``kernel`` on the GPU of its first argument. Every launch goes through here.

    Args:
        kernel: a function of ``triton.jit``, or one that is tuned.
        grid: how many programs, (x,) or (x, y), or a function that tells, given the constants.
        arguments: tensors, numbers, and tuples of numbers: the kernel's first ones, in order.
        options: constants of the kernel, and ``num_warps`` or ``num_stages``.
    """
    device = arguments[0].device
    watcher = getattr(_watching, "watcher", None)
    with current(device):
        if not _builds(device):
            with contextlib.nullcontext() if watcher is None else watcher.aside():
                kernel[grid](*arguments, **options)
            if watcher is not None:
                watcher.launched(kernel, grid, arguments, options)
            return
        key = _key(kernel, device, arguments, options)
        built = _built.get(key)
        if built is None:
            with _tuning:
                compiled = kernel[grid](*arguments, **options)
                if len(_built) >= _MOST:
                    _built.clear()
                _built[key] = _describe(kernel, compiled, len(arguments))
            spoil()
            return
        size = grid(built.by_name) if callable(grid) else grid
        built.compiled[(*size, 1, 1)](*arguments, *built.behind)
        if watcher is not None:
            watcher.launched_built(built.compiled, size, (*arguments, *built.behind))


# A kernel that was built, its grid, and its arguments, with addresses in the place of tensors.
Again = Callable[[Any, tuple[int, int, int], list[Any]], None]


def again(device: torch.device) -> Again:
    """What launches kernels that were built on the current stream of ``device``, which is the current one."""
    if not _builds(device):
        return _never
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    hooks = _hooks()
    # Chains of them, which may be empty.
    enter, leave = (
        hook if getattr(hook, "calls", True) else None
        for hook in (hooks.launch_enter_hook, hooks.launch_exit_hook)
    )

    def launch(compiled: Any, grid: tuple[int, int, int], arguments: list[Any]) -> None:
        metadata = None if enter is None else compiled.launch_metadata(grid, stream, *arguments)
        compiled.run(
            *(*grid, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave),
            *arguments,
        )

    return launch


@functools.cache
def _hooks() -> Any:
    from triton import knobs

    return knobs.runtime


def _never(compiled: Any, grid: tuple[int, int, int], arguments: list[Any]) -> None:
    raise AssertionError("kernels that are interpreted are not built")


class Watcher(Protocol):
    """Who is told of launches; see ``replay.py``."""

    def launched(self, kernel: Any, grid: Any, arguments: Sequence[Any], options: dict[str, Any]) -> None: ...

    def launched_built(self, compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any]) -> None: ...

    def aside(self) -> contextlib.AbstractContextManager[Any]: ...

    def spoil(self) -> None: ...


def watch(watcher: Watcher | None) -> None:
    """Tell this one of what this thread launches from now on."""
    _watching.watcher = watcher


def spoil() -> None:
    """Tell it that something happens which the next run does not do."""
    watcher = getattr(_watching, "watcher", None)
    if watcher is not None:
        watcher.spoil()


def _builds(device: torch.device) -> bool:
    """Whether a kernel is built for ``device``; else it is interpreted."""
    return device.type == "cuda"


def _describe(kernel: Any, compiled: Any, given: int) -> Built:
    names = kernel.arg_names
    constants = {names[i]: value for (i, *inner), value in compiled.src.constants.items() if not inner}
    return Built(compiled, constants, tuple(constants.get(name) for name in names[given:]))


def _key(
    kernel: Any, device: torch.device, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, ...]:
    """What decides how a kernel is built and tuned, and a little more."""
    traits = _traits.get(id(kernel))
    if traits is None:
        traits = _traits[id(kernel)] = _traits_of(kernel, arguments)
    tensors = [arguments[i] for i in traits.tensors]
    return (
        *(id(kernel), device.index, *options.items()),
        *[arguments[i] for i in traits.numbers],
        *[tensor.dtype for tensor in tensors],
        *[tensor.data_ptr() & 15 for tensor in tensors],
    )


def _traits_of(kernel: Any, arguments: tuple[Any, ...]) -> Traits:
    function = kernel
    while not hasattr(function, "params"):  # below what tunes it
        function = function.fn
    known = [i for i in range(len(arguments)) if not function.params[i].do_not_specialize]
    tensors = tuple(i for i in known if isinstance(arguments[i], Tensor))
    return Traits(kernel, tensors, tuple(i for i in known if isinstance(arguments[i], int | tuple)))
