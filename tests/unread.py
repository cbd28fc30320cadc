"""A guard under which the host may not learn what is in a tensor: on a GPU it would have to wait for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Ops whose result is a number of the host, or as long as a tensor's contents say.
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Ops(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert not _READS & set(func.tags), f"{func} waits for the GPU"
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """What reads a CPU tensor without an op."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        assert func not in (torch.Tensor.tolist, torch.Tensor.numpy), f"{func.__name__} waits for the GPU"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def unread() -> Iterator[None]:
    with _Ops(), _Methods():
        yield
