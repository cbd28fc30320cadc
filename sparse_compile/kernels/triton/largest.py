"""Selection of rows: the k live rows with the largest score, as an index buffer; see ``methods/reuse.py``.

Two launches make the selection, where eager PyTorch takes fifteen. Scores are not negative, so they are
ordered as their bits are, read as whole numbers. Of these one program finds the k-th largest, a digit of 8
bits at a time, from the top, as in ``select.py``: four walks over the N scores, which stay in cache, whatever
is in them. Then each block of rows has a program, which counts those before it and writes down its own:

    kept, ascending; then, if fewer than k rows are live, rows that are not
    slot: where a row of the estimate stands among [kept rows; base rows], or N − 1 for a row of zeros
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.triton import cdiv, launch
from sparse_compile.kernels.triton.select import FORMATS, key_of

# Of the threshold, and of the rest; and how many rows are counted at a time.
_BLOCK, _WARPS = 2048, 16
BLOCK, WARPS = 512, 4
AT_ONCE = 4096
_FORM = FORMATS[torch.float32]
# What is not a number is larger than what is infinite.
KEYS = {"UNSIGNED": _FORM.constants["UNSIGNED"], "LARGEST": _FORM.infinity + 1}


@triton.jit
def _count_digits(
    ranks,
    live,
    threshold,
    n,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    UNSIGNED: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # How many live rows that agree with the threshold in the digits found so far have which next digit.
    digits: tl.constexpr = 1 << WIDTH
    found = tl.zeros((digits,), tl.int32)
    for start in range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        there = rows < n
        key = key_of(tl.load(ranks + rows, mask=there, other=0), UNSIGNED, LARGEST)
        alike = there & (tl.load(live + rows, mask=there, other=0) != 0)
        alike = alike & ((key >> (SHIFT + WIDTH)) == threshold)
        found += tl.histogram((key >> SHIFT) & (digits - 1), digits, mask=alike)
    return found


@triton.jit
def _choose_digit(found, threshold, room, WIDTH: tl.constexpr):
    # The digit at which, counted from the largest, `room` rows are reached; and how many are left for it.
    as_large = tl.cumsum(found, axis=0, reverse=True)
    digit = tl.sum((as_large >= room).to(tl.int32), axis=0) - 1
    room -= tl.sum(tl.where(tl.arange(0, 1 << WIDTH) > digit, found, 0), axis=0)
    return (threshold << WIDTH) | digit, room


@triton.jit(do_not_specialize=["k"])
def _threshold(
    ranks, live, found, tally, n, k, UNSIGNED: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):
    # found int32 [3]: the k-th largest key of the live rows, how many of those equal to it are kept, and how
    # many are live.
    digits = _count_digits(ranks, live, 0, n, 23, 8, UNSIGNED, LARGEST, BLOCK)
    alive = tl.sum(digits, axis=0)
    threshold, room = _choose_digit(digits, 0, tl.minimum(alive, k), 8)
    digits = _count_digits(ranks, live, threshold, n, 15, 8, UNSIGNED, LARGEST, BLOCK)
    threshold, room = _choose_digit(digits, threshold, room, 8)
    digits = _count_digits(ranks, live, threshold, n, 7, 8, UNSIGNED, LARGEST, BLOCK)
    threshold, room = _choose_digit(digits, threshold, room, 8)
    digits = _count_digits(ranks, live, threshold, n, 0, 7, UNSIGNED, LARGEST, BLOCK)
    threshold, room = _choose_digit(digits, threshold, room, 7)
    tl.store(found, threshold)
    tl.store(found + 1, room)
    tl.store(found + 2, alive)
    tl.store(tally, tl.load(tally) + (n - alive))


@triton.jit
def _compared(ranks, live, rows, n, threshold, UNSIGNED: tl.constexpr, LARGEST: tl.constexpr):
    # Of rows below n: whether they are above the threshold, at it, and not live.
    there = rows < n
    key = key_of(tl.load(ranks + rows, mask=there, other=0), UNSIGNED, LARGEST)
    alike = there & (tl.load(live + rows, mask=there, other=0) != 0)
    return alike & (key > threshold), alike & (key == threshold), there & (alike == 0), alike


@triton.jit(do_not_specialize=["k"])
def _largest(
    ranks,
    live,
    found,
    kept,
    count,
    slot,
    dropped,
    n,
    k,
    tokens,
    UNSIGNED: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    begin = tl.program_id(0) * BLOCK
    threshold = tl.load(found)
    room = tl.load(found + 1)
    chosen = tl.minimum(tl.load(found + 2), k)
    above = 0
    equal = 0
    without = 0
    for start in range(0, begin, AT_ONCE):
        rows = start + tl.arange(0, AT_ONCE)
        larger, ties, spare, _ = _compared(ranks, live, rows, begin, threshold, UNSIGNED, LARGEST)
        above += tl.sum(larger.to(tl.int32), axis=0)
        equal += tl.sum(ties.to(tl.int32), axis=0)
        without += tl.sum(spare.to(tl.int32), axis=0)
    rows = begin + tl.arange(0, BLOCK)
    there = rows < n
    larger, ties, spare, alike = _compared(ranks, live, rows, n, threshold, UNSIGNED, LARGEST)
    # Of rows with the same score the first ones.
    ahead = equal + tl.cumsum(ties.to(tl.int32), axis=0)
    keep = larger | (ties & (ahead <= room))
    place = above + tl.minimum(equal, room) + tl.cumsum(keep.to(tl.int32), axis=0) - 1
    tl.store(kept + place, rows, mask=keep)
    behind = chosen + without + tl.cumsum(spare.to(tl.int32), axis=0) - 1
    tl.store(kept + behind, rows, mask=spare & (behind < k))
    drop = alike & (keep == 0)
    of_base = tl.where(drop, k + rows % tokens, n - 1)
    tl.store(slot + rows, tl.where(keep, place, of_base).to(tl.int64), mask=there)
    tl.store(dropped + rows, drop.to(tl.int8), mask=there)
    if begin == 0:
        tl.store(count, chosen)


def largest(
    scores: Tensor, live: Tensor, k: int, tokens: int, tally: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`reference.largest`.

    Args:
        scores: float32 [N], contiguous, none negative. A NaN counts as the largest.
        live: bool [N], contiguous.
        k: how many rows are kept, from 1 to N.
        tokens: T, rows of the base.
        tally: int64, to whose first number the rows that are not live are added.

    Returns:
        (kept int32 [k], count int32 [1], slot int64 [N], dropped bool [N]: live and not kept).
    """
    n, device = len(scores), scores.device
    kept = torch.empty(k, dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    slot = torch.empty(n, dtype=torch.int64, device=device)
    dropped = torch.empty(n, dtype=torch.int8, device=device)
    found = torch.empty(3, dtype=torch.int32, device=device)
    ranks, flags = scores.view(torch.int32), live.view(torch.int8)
    launch(_threshold, (1,), ranks, flags, found, tally, n, k, **KEYS, BLOCK=_BLOCK, num_warps=_WARPS)
    launch(
        *(_largest, (cdiv(n, BLOCK),)),
        *(ranks, flags, found, kept, count, slot, dropped, n, k, tokens),
        **KEYS,
        BLOCK=BLOCK,
        AT_ONCE=AT_ONCE,
        num_warps=WARPS,
    )
    return kept, count, slot, dropped.view(torch.bool)
