"""Selection: the k-th largest magnitude of every sample, exactly, and how many of those equal to it are kept.

Magnitudes of floating numbers are ordered as their bits are, without the sign, read as a whole number: the
*key* of an entry. Its threshold is found a digit of 8 bits at a time, from the top:

    count    how many entries that agree with the threshold in the digits found so far have which next digit
    choose   the digit at which, counted from the largest, k entries are reached; the larger ones are settled

So x is read four times in float32 and twice in 16 bits, whatever is in it, and nothing is guessed. Counts are
whole numbers, which add up to the same in any order: programs add theirs to one sum by atomics.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.triton import cdiv, launch

_BLOCK = 4096
_ROUNDS = 4  # blocks of one program, whose counts are added up in registers


@dataclasses.dataclass(frozen=True)
class Format:
    """How a dtype holds a number: sign, then exponent and fraction.

    Attributes:
        bits: the integer dtype of this width.
        infinity: its key. What is not a number has larger ones, and counts as infinite.
        digits: how many bits are settled at a time; all but the sign in total.
    """

    bits: torch.dtype
    infinity: int
    digits: tuple[int, ...]

    @property
    def constants(self) -> dict[str, int]:
        """What :func:`key_of` needs to know."""
        return {"UNSIGNED": (1 << sum(self.digits)) - 1, "INFINITY": self.infinity}


FORMATS = {
    torch.float32: Format(torch.int32, 0x7F800000, (8, 8, 8, 7)),
    torch.bfloat16: Format(torch.int16, 0x7F80, (8, 7)),
    torch.float16: Format(torch.int16, 0x7C00, (8, 7)),
}
_BINS = 256


@triton.jit
def key_of(bits, UNSIGNED: tl.constexpr, INFINITY: tl.constexpr):
    """Magnitudes as int32, in the same order."""
    return tl.minimum(bits.to(tl.int32) & UNSIGNED, INFINITY)


@triton.jit(do_not_specialize=["spans"])
def _count_digits(
    x,
    threshold,
    totals,
    n,
    spans,
    UNSIGNED: tl.constexpr,
    INFINITY: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    # totals [B, BINS] += the next digits of sample b's entries, over BLOCK · ROUNDS of them.
    sample = tl.program_id(0) // spans
    first = (tl.program_id(0) % spans).to(tl.int64) * BLOCK * ROUNDS
    known = tl.load(threshold + sample)
    entries = x + sample.to(tl.int64) * n + first
    left = tl.minimum(n - first, BLOCK * ROUNDS).to(tl.int32)
    digits: tl.constexpr = 1 << WIDTH
    found = tl.zeros((digits,), tl.int32)
    for start in range(0, left, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < left
        key = key_of(tl.load(entries + at, mask=there, other=0), UNSIGNED, INFINITY)
        agrees = there & ((key >> (SHIFT + WIDTH)) == known)
        found += tl.histogram((key >> SHIFT) & (digits - 1), digits, mask=agrees)
    to = totals + sample.to(tl.int64) * BINS + tl.arange(0, digits)
    tl.atomic_add(to, found.to(tl.int64), mask=found != 0, sem="relaxed")


@triton.jit
def _choose_digit(threshold, room, totals, WIDTH: tl.constexpr, BINS: tl.constexpr):
    # One sample a program. room: how many are still to be kept of those that agree with the threshold.
    sample = tl.program_id(0)
    digits = tl.arange(0, 1 << WIDTH)
    known = tl.load(threshold + sample)
    from_total = totals + sample.to(tl.int64) * BINS + digits
    total = tl.load(from_total)
    wanted = tl.load(room + sample)
    as_large = tl.cumsum(total, axis=0, reverse=True)
    digit = tl.sum((as_large >= wanted).to(tl.int32), axis=0) - 1
    tl.store(room + sample, wanted - tl.sum(tl.where(digits > digit, total, 0), axis=0))
    tl.store(threshold + sample, (known << WIDTH) | digit)
    tl.store(from_total, tl.zeros_like(total))  # for the next digit


def kth_largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :func:`reference.kth_largest`.

    Args:
        x: [B, n], contiguous, of a dtype in ``FORMATS``.
        k: from 1 to n.

    Returns:
        (threshold int32 [B], a key; room int64 [B], from 1 to k).
    """
    samples, n = x.shape
    form = FORMATS[x.dtype]
    threshold = torch.zeros(samples, dtype=torch.int32, device=x.device)
    room = torch.full((samples,), k, device=x.device)
    totals = torch.zeros(samples, _BINS, dtype=torch.int64, device=x.device)
    spans = cdiv(n, _BLOCK * _ROUNDS)
    shift = sum(form.digits)
    for width in form.digits:
        shift -= width
        digit = {"WIDTH": width, "BINS": _BINS}
        launch(
            _count_digits,
            (samples * spans,),
            *(x.view(form.bits), threshold, totals, n, spans),
            **form.constants,
            **digit,
            SHIFT=shift,
            BLOCK=_BLOCK,
            ROUNDS=_ROUNDS,
            num_warps=8,
        )
        launch(_choose_digit, (samples,), threshold, room, totals, **digit)
    return threshold, room
