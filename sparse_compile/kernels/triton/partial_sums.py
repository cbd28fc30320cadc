"""Partial sums of dW added up, in float32 and always in the same order, and rounded once.

    sums_i = Σ_s parts_(s, i)

In one pass: ATen's sum would write it in float32, and read that again to round it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.triton import cdiv, launch

_BLOCK = 1024


@triton.jit
def _add_up(parts, sums, numbers, splits, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < numbers
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts + tl.cast(split, tl.int64) * numbers + at, mask=there, other=0.0)
    tl.store(sums + at, total.to(sums.dtype.element_ty), mask=there)


def add_up(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`reference.add_up`.

    Args:
        parts: float32 [S, …], contiguous.
        dtype: of the sums.

    Returns:
        […], contiguous.
    """
    sums = parts.new_empty(parts.shape[1:], dtype=dtype)
    if sums.numel() == 0:
        return sums
    launch(
        _add_up,
        (cdiv(sums.numel(), _BLOCK),),
        *(parts, sums, sums.numel(), len(parts)),
        BLOCK=_BLOCK,
    )
    return sums
