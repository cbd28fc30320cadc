"""Prune to n of four: the part S of the residual that reuse computes, for both products, in one pass over dY.

    R_i  = dY_i − P_(i mod T)                    where row i is live, else 0
    S    = the n largest of every 4 features of R      which dX = (S + P) · W contracts
    S'   = the n largest of every 4 rows of R          which dW = (S' + P)ᵀ · X contracts, written as S'ᵀ

The rank of an entry is how many of its three neighbours are larger, or as large and before it. What is not a
number is larger than nothing and nothing is larger than it: it is kept, and reaches the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.triton import cdiv, launch

_BLOCK = 32


@triton.jit
def _largest(size, KEEP: tl.constexpr):
    """Which entries are among the KEEP largest of their four neighbours in the last dimension."""
    groups = size.reshape(size.shape[0], size.shape[1] // 4, 4)
    place = tl.arange(0, 4)
    before = place[None, :] < place[:, None]
    ours = groups[:, :, :, None]
    theirs = groups[:, :, None, :]
    ahead = (theirs > ours) | ((theirs == ours) & before[None, None, :, :])
    rank = tl.sum(ahead.to(tl.int32), axis=3)
    return (rank < KEEP).reshape(size.shape[0], size.shape[1])


@triton.jit
def _keep_of_four(
    dy,
    base,
    live,
    of_features,
    of_rows,
    n,
    outputs,
    tokens,
    dy_row,
    dy_column,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < n)[:, None] & (columns < outputs)[None, :]
    from_dy = dy + rows.to(tl.int64)[:, None] * dy_row + columns.to(tl.int64)[None, :] * dy_column
    from_base = base + (rows % tokens).to(tl.int64)[:, None] * outputs + columns[None, :]
    residual = tl.load(from_dy, mask=inside, other=0.0).to(tl.float32)
    residual -= tl.load(from_base, mask=inside, other=0.0).to(tl.float32)
    alive = tl.load(live + rows, mask=rows < n, other=0) != 0
    residual = tl.where(alive[:, None], residual, 0.0)
    # What is beyond the edge is smaller than anything.
    size = tl.where(inside, tl.abs(residual), -1.0)

    kept = tl.where(_largest(size, KEEP), residual, 0.0).to(of_features.dtype.element_ty)
    to = rows.to(tl.int64)[:, None] * outputs + columns[None, :]
    tl.store(of_features + to, kept, mask=inside)

    kept = tl.where(_largest(tl.trans(size), KEEP), tl.trans(residual), 0.0).to(of_rows.dtype.element_ty)
    to = columns.to(tl.int64)[:, None] * n + rows[None, :]
    tl.store(of_rows + to, kept, mask=tl.trans(inside))


def keep_of_four(dy: Tensor, base: Tensor, live: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """S and S'ᵀ; see :func:`reference.keep_of_four`.

    Args:
        dy: [N, O], of any strides.
        base: P, [T, O], contiguous, T divides N.
        live: bool [N], the rows of ``dy`` that are not zero.
        keep: n, 1 to 3.

    Returns:
        ([N, O], [O, N]), contiguous, in the dtype of ``dy``.
    """
    n, outputs = dy.shape
    of_features, of_rows = dy.new_empty(n, outputs), dy.new_empty(outputs, n)
    launch(
        _keep_of_four,
        (max(1, cdiv(n, _BLOCK)), max(1, cdiv(outputs, _BLOCK))),
        *(dy, base, live.view(torch.int8), of_features, of_rows),
        *(n, outputs, len(base), *dy.stride()),
        KEEP=keep,
        BLOCK=_BLOCK,
    )
    return of_features, of_rows
