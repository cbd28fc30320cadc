"""A number on its way from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """One number of a tensor, to be read later: at the next step, say, when it has long arrived.

    ``tensor.item()`` would wait for everything that was queued on the device before.

    Args:
        number: [1] or [], of any dtype.
    """

    def __init__(self, number: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = number
        if number.is_cuda:
            self._host = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
            self._host.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()
            # On that GPU's stream, which need not be the current one.
            self._event.record(torch.cuda.current_stream(number.device))

    def read(self) -> float:
        """The number; waits until it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.item()
