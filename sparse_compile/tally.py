"""What the device counts while the host goes on."""

from __future__ import annotations

import torch
from torch import Tensor


class Tally:
    """Sums that kernels add to, at an address that stays: rows that were zero, those of them that were
    skipped, and the FLOPs that this saved."""

    def __init__(self) -> None:
        self._sums: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The sums of this device, int64 [3]. (A model may move to another.)"""
        if device not in self._sums:
            self._sums[device] = torch.zeros(3, dtype=torch.int64, device=device)
        return self._sums[device]

    def settle(self) -> tuple[int, int, int]:
        """The sums since the last call, on the host. Waits for the devices."""
        zero = skipped = flops = 0
        for sums in self._sums.values():
            of_device = sums.tolist()
            zero, skipped, flops = zero + of_device[0], skipped + of_device[1], flops + of_device[2]
            sums.zero_()
        return zero, skipped, flops
