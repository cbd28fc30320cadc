"""The forward of a linear on a GPU, of which only some rows are needed; see ``passes/needed.py``.

How many rows are needed is known from the inputs of the model, but to the device alone. So what is made of
the mask, once for all linears that share it, are buffers and a count (``slots``), which these and their
backwards read; and whether to skip rows is decided by how many were needed in the step before. Either way is
exact.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_compile.kernels import choice, on_device, triton
from sparse_compile.looks import LaterLooks
from sparse_compile.methods.rows import Rows
from sparse_compile.tally import Tally

# Products over gathered rows are not as fast as dense ones: fewer rows than this share are not skipped.
WORTH_SKIPPING = 1 / 16
_LONGEST_PAUSE = 15
PARTS = 8  # a share of rows is taken as so many parts, for keys of timings


@dataclasses.dataclass(frozen=True, slots=True)
class Needed:
    """The rows that a forward needs, and thus a backward: all others have a gradient of zero.

    Attributes:
        rows: their buffer and count.
        share: how many they are of all, about.
    """

    rows: Rows
    share: float

    @classmethod
    def given(cls, kept: Tensor, count: Tensor, slot: Tensor, skip: Tensor) -> Needed | None:
        """What :meth:`DeviceForward.slots` returned; None: no row is to be skipped."""
        return cls.of(Rows(kept, count=count, slot=slot, padded=True), int(skip))

    @classmethod
    def of(cls, rows: Rows, skip: int) -> Needed | None:
        """``rows``; None if ``skip`` is 0, and no row is to be skipped. Else it is 1 more than the share of
        needed rows, in eighths."""
        return cls(rows, share_skipped(skip)) if skip else None


@functools.lru_cache(maxsize=4096)
def skipped(alive: int, n: int) -> int:
    """Whether to skip all but ``alive`` of ``n`` rows: 1 more than their share, in eighths, or 0: not. (Of
    −1, nothing is known.)"""
    pays = 0 <= alive <= (1 - WORTH_SKIPPING) * n and n > 0
    return 1 + round(PARTS * alive / n) if pays else 0


def share_skipped(skip: int) -> float:
    """The share of the rows that are not skipped, by such a number."""
    return (skip - 1) / PARTS


class DeviceForward:
    """What a linear's site keeps for its forwards on a GPU."""

    def __init__(self) -> None:
        self._looks: dict[int, LaterLooks] = {}
        self._tally = Tally()
        self._skipped = False  # whether the last forward left rows out

    def slots(self, needed: Tensor, call: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Buffers for the rows with ``needed``, bool [N]. ``call`` is which use of the layer it is the mask
        of: each has its own, and is decided by the one of the step before.

        Returns:
            kept int32 [N]: their numbers, ascending, of which the first ``count``, int32 [1], count.
            slot int64 [N]: where in ``kept`` a row stands, or N − 1 if it does not.
            copies int64 [N]: the same, but what is not needed is the first that is, if any is.
            skip int64 [1], on the CPU: 0 if all rows are to be computed (then the others hold anything); else
            1 more than the share of needed rows, in eighths.
        """
        n = len(needed)
        looks = self._looks.setdefault(call, LaterLooks(_LONGEST_PAUSE, WORTH_SKIPPING))
        if on_device.available(needed.device) and n > 0 and looks.due():
            kept, count, slot, copies = on_device.needed_slots(needed)
            found = looks.found(count, n)
            return kept, count, slot, copies, _number(found * (1 + round(PARTS * looks.alive)))
        return *self.no_slots(needed), _number(0)

    @staticmethod
    def no_slots(needed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Buffers for the rows with ``needed``, bool [N], that hold anything."""
        kept, count = (needed.new_empty(size, dtype=torch.int32) for size in (needed.shape[0], 1))
        slot, copies = (needed.new_empty(needed.shape, dtype=torch.int64) for _ in range(2))
        return kept, count, slot, copies

    def linear(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        needed: Needed | None,
        copies: Tensor,
        *,
        whole: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Y [N, O] of a linear as (rows [N, O], index int64 [N]): row i of Y is rows[index[i]].

        Args:
            x: X [N, I].
            w: W [O, I].
            needed: the rows that have to be right; None is all.
            copies: which of the computed rows stands where.
            whole: return Y itself, and an empty index.
        """
        n, inputs = x.shape

        def by_aten() -> tuple[Tensor, Tensor]:
            y = torch.nn.functional.linear(x, w, bias)
            return y, torch.arange(0 if whole else n, device=x.device)

        self._skipped = False
        if needed is None or not on_device.usable(x):
            return by_aten()
        rows = needed.rows

        def by_triton() -> tuple[Tensor, Tensor]:
            some = on_device.forward_of_rows(x, w, bias, rows)
            # An op must not return what it was given.
            return (some.index_select(0, copies), copies[:0].clone()) if whole else (some, copies.clone())

        sizes = (choice.bucket(n), inputs, len(w), bias is None)
        key = ("forward", x.device, x.dtype, *sizes, whole, needed.share)
        candidates: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"aten": by_aten, "triton": by_triton}
        with triton.current(x.device):  # whose time is taken
            kernel = choice.fastest(key, candidates)
        self._skipped = kernel == "triton"
        return candidates[kernel]()

    def count(self, needed: Needed, n: int, flops: int) -> None:
        """Count the rows that a forward left out of ``n``, each of so many ``flops``, when its backward runs:
        under activation checkpointing the forward runs twice."""
        count = needed.rows.count
        if self._skipped and count is not None:
            on_device.tally_rows(self._tally.on(count.device), count, n, zero=False, flops=flops)

    def reserve(self, device: torch.device) -> None:
        """Make what is counted in, before anything is recorded."""
        self._tally.on(device)

    def settle(self) -> tuple[int, int]:
        """The rows that were left out since the last call, and the FLOPs that this saved."""
        _, skipped, flops = self._tally.settle()
        return skipped, flops


def _number(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int64)
