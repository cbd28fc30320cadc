"""What the device counts while the host goes on."""

from __future__ import annotations

import torch
from torch import Tensor


class Tally:
    """Sums that kernels add to, at an address that stays: rows that were zero, those of them that were
    skipped, and the FLOPs that this saved."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        """The sums, int64 [3]."""
        if self._sums is None:
            self._sums = torch.zeros(3, dtype=torch.int64, device=device)
        return self._sums

    def settle(self) -> tuple[int, int, int]:
        """The sums since the last call, on the host. Waits for the device."""
        if self._sums is None:
            return 0, 0, 0
        zero, skipped, flops = self._sums.tolist()
        self._sums.zero_()
        return zero, skipped, flops
