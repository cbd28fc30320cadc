"""A base renewed in its place: P is what dY has for one sample, or on average over all, if that is finite.

    P_t ← mean_b dY_(b·T + t),   or   dY_(s·T + t) of one sample s

Two launches, since it is only known at the end of the first whether all of it is finite: the first writes the
new base aside, and of each of its programs whether its part is; the second reads those, and then copies, or
leaves what was there. Means are added up in float32, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.triton import cdiv, launch

_SAMPLES = 8
_COLUMNS = 512
_BLOCK = 4096


@triton.jit
def _next_base(
    dy,
    sample,
    new,
    finite,
    samples,
    tokens,
    outputs,
    dy_row,
    dy_column,
    MEAN: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    column_tiles = tl.cdiv(outputs, BLOCK_COLUMNS)
    token = tl.program_id(0) // column_tiles
    columns = tl.program_id(0) % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    there = columns < outputs
    from_dy = dy + columns.to(tl.int64) * dy_column
    if MEAN:
        total = tl.zeros((BLOCK_SAMPLES, BLOCK_COLUMNS), tl.float32)
        for first in range(0, samples, BLOCK_SAMPLES):
            which = first + tl.arange(0, BLOCK_SAMPLES)
            rows = (which * tokens + token).to(tl.int64)[:, None] * dy_row
            inside = (which < samples)[:, None] & there[None, :]
            total += tl.load(from_dy[None, :] + rows, mask=inside, other=0.0).to(tl.float32)
        value = tl.sum(total, axis=0) / samples
    else:
        row = tl.load(sample).to(tl.int64) * tokens + token
        value = tl.load(from_dy + row * dy_row, mask=there, other=0.0).to(tl.float32)
    value = value.to(new.dtype.element_ty)
    tl.store(new + token.to(tl.int64) * outputs + columns, value, mask=there)
    known = tl.where(there, (tl.abs(value.to(tl.float32)) < float("inf")).to(tl.int32), 1)
    tl.store(finite + tl.program_id(0), tl.min(known, axis=0).to(tl.int8))


@triton.jit
def _renew(new, base, finite, renewed, numbers, programs, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    known = tl.full((BLOCK,), 1, tl.int8)
    for first in range(0, programs, BLOCK):
        at = first + tl.arange(0, BLOCK)
        known = tl.minimum(known, tl.load(finite + at, mask=at < programs, other=1))
    every = tl.min(known.to(tl.int32), axis=0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    there = at < tl.where(every != 0, numbers, 0)
    tl.store(base + at, tl.load(new + at, mask=there, other=0.0), mask=there)
    if program == 0:
        tl.store(renewed, every.to(tl.int64))


def renew_base(dy: Tensor, base: Tensor, sample: Tensor | None, renewed: Tensor) -> None:
    """See :func:`reference.renew_base`.

    Args:
        dy: [N, O], of any strides; N > 0.
        base: P [T, O], contiguous, in the dtype of ``dy``, T divides N. What is to be renewed.
        sample: int64 [1]: which one it is to be of; None is the mean over all.
        renewed: int64 [1], which is set to 1 if it was, or to 0.
    """
    (n, outputs), tokens = dy.shape, len(base)
    parts = tokens * cdiv(outputs, _COLUMNS)
    new, finite = torch.empty_like(base), torch.empty(parts, dtype=torch.int8, device=dy.device)
    launch(
        _next_base,
        (parts,),
        *(dy, renewed if sample is None else sample, new, finite),
        *(n // tokens, tokens, outputs, *dy.stride()),
        MEAN=sample is None,
        BLOCK_SAMPLES=_SAMPLES,
        BLOCK_COLUMNS=_COLUMNS,
    )
    launch(
        _renew,
        (max(1, cdiv(base.numel(), _BLOCK)),),
        *(new, base, finite, renewed, base.numel(), parts),
        BLOCK=_BLOCK,
    )
