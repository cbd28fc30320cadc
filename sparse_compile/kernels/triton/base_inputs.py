"""The inputs of the rows that a base stands for, summed over the samples: what dW multiplies the base by.

    S_t = Σ_b dropped_(b·T + t) · X_(b·T + t)

Each program has one token and a block of columns, and reads of X only what is dropped: rows that are kept
cost nothing, and one that is not finite spoils no sum. The rows of a token are far apart in memory, but a
block of columns of one is a line of the cache or more. It is added up in float32, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.triton import cdiv, launch

_SAMPLES = 16
_COLUMNS = 128


@triton.jit
def _sum_dropped(
    x,
    dropped,
    sums,
    samples,
    tokens,
    inputs,
    x_row,
    x_column,
    BLOCK_SAMPLES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # Programs that follow each other read columns that do.
    column_tiles = tl.cdiv(inputs, BLOCK_COLUMNS)
    token = tl.program_id(0) // column_tiles
    columns = tl.program_id(0) % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    there = columns < inputs
    from_x = x + columns.to(tl.int64)[None, :] * x_column
    sample = tl.arange(0, BLOCK_SAMPLES)
    total = tl.zeros((BLOCK_SAMPLES, BLOCK_COLUMNS), tl.float32)
    # The flags are read one round ahead, so that X waits for none of them.
    flag = tl.load(dropped + sample * tokens + token, mask=sample < samples, other=0) != 0
    for _ in range(0, samples, BLOCK_SAMPLES):
        rows = (sample * tokens + token).to(tl.int64)
        inside = flag[:, None] & there[None, :]
        sample += BLOCK_SAMPLES
        flag = tl.load(dropped + sample * tokens + token, mask=sample < samples, other=0) != 0
        total += tl.load(from_x + rows[:, None] * x_row, mask=inside, other=0.0).to(tl.float32)
    to = sums + token.to(tl.int64) * inputs + columns
    tl.store(to, tl.sum(total, axis=0).to(sums.dtype.element_ty), mask=there)


def sum_dropped(x: Tensor, dropped: Tensor, tokens: int) -> Tensor:
    """See :func:`reference.sum_dropped`.

    Args:
        x: X [N, I], of any strides.
        dropped: bool [N], contiguous.
        tokens: T, which divides N.

    Returns:
        [T, I], contiguous, in the dtype of ``x``.
    """
    n, inputs = x.shape
    sums = x.new_empty(tokens, inputs)
    if sums.numel() == 0:
        return sums
    launch(
        _sum_dropped,
        (tokens * cdiv(inputs, _COLUMNS),),
        *(x, dropped.view(torch.int8), sums, n // tokens, tokens, inputs, *x.stride()),
        BLOCK_SAMPLES=_SAMPLES,
        BLOCK_COLUMNS=_COLUMNS,
    )
    return sums
