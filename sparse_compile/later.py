"""Numbers on their way from the device to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Later:
    """One number of a tensor, or all, to be read later: at the next step, say, when it has long arrived.

    ``tensor.item()`` would wait for everything that was queued on the device before.

    Args:
        number: of any dtype; to be read as one number, [1] or [].
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
        return self._arrived().item()

    def values(self) -> list[Any]:
        """All numbers, as nested lists; waits until they have arrived."""
        return self._arrived().tolist()

    def _arrived(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host
