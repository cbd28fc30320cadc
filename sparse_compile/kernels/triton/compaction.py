"""Compaction: from "which rows are live" to an index buffer and a count, without telling the host.

One program walks over the N flags with a running sum, so the buffer is ascending and the same in every run.
(Several that reserve their places with an atomic would fill it in another order each time, and with it
change the order of the sums in dW.) Where each sample has a buffer of its own, each has a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.triton import launch

_BLOCK = 4096


@triton.jit
def _compact(live, kept, count, slot, n, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    sample = tl.program_id(0)
    live += sample.to(tl.int64) * n
    kept += sample.to(tl.int64) * n
    found = 0
    for start in range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        there = rows < n
        flag = (tl.load(live + rows, mask=there, other=0) != 0).to(tl.int32)
        place = found + tl.cumsum(flag, axis=0) - 1
        tl.store(kept + place, rows, mask=flag != 0)
        if SLOTS:
            tl.store(slot + rows, tl.where(flag != 0, place, n - 1).to(tl.int64), mask=there)
        found += tl.sum(flag, axis=0)
    tl.store(count + sample, found)


def compact(live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`reference.compact`.

    Args:
        live: bool [N].

    Returns:
        (kept int32 [N], count int32 [1], slot int64 [N]).
    """
    n = len(live)
    # Zeros, so that what is beyond the count is a row number too, and may be read.
    kept = torch.zeros(n, dtype=torch.int32, device=live.device)
    count = torch.empty(1, dtype=torch.int32, device=live.device)
    slot = torch.empty(n, dtype=torch.int64, device=live.device)
    operands = (live.view(torch.int8), kept, count, slot, n)
    launch(_compact, (1,), *operands, SLOTS=True, BLOCK=_BLOCK, num_warps=16)
    return kept, count, slot


def compact_samples(live: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's live rows, in a buffer of its own.

    Args:
        live: bool [B, T], contiguous.

    Returns:
        (kept int32 [B, T], padded with zeros; count int32 [B]).
    """
    b, t = live.shape
    kept = torch.zeros(b, t, dtype=torch.int32, device=live.device)
    count = torch.empty(b, dtype=torch.int32, device=live.device)
    if b > 0:
        operands = (live.view(torch.int8), kept, count, count, t)
        launch(_compact, (b,), *operands, SLOTS=False, BLOCK=_BLOCK, num_warps=16)
    return kept, count


@triton.jit
def _tally_rows(count, tally, n, flops, ZERO: tl.constexpr):
    skipped = (n - tl.load(count)).to(tl.int64)
    if ZERO:
        tl.store(tally, tl.load(tally) + skipped)
    tl.store(tally + 1, tl.load(tally + 1) + skipped)
    tl.store(tally + 2, tl.load(tally + 2) + skipped * flops)


def tally_rows(tally: Tensor, count: Tensor, n: int, *, zero: bool, flops: int) -> None:
    """Add to ``tally`` int64 [3] (rows that are zero; that were skipped; FLOPs) what is beyond a count.

    Args:
        count: int32 [1], rows that are computed of the ``n``.
        zero: whether they are to be counted as zero, too.
        flops: what each saves.
    """
    launch(_tally_rows, (1,), count, tally, n, flops, ZERO=zero, num_warps=1)
