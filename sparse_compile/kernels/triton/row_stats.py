"""Row statistics: one pass over dY that tells how long each row is and whether it is exactly zero.

    squares_i = ‖dY_i − P_(i mod T)‖²      what reuse ranks by, and, without P, what sampling draws by
    live_i    = any(dY_i ≠ 0)              a NaN is not zero: it must reach the gradient
    scores_i  = ‖dY_i‖, ‖dY_i‖ · ‖X_i‖     zero exactly where the row is: what rows are drawn by

Where only ``live`` is wanted, a program stops at the first columns in which all of its rows showed something:
of a dY without zero rows it reads one block of columns, and the test costs next to nothing. (``live`` is
not taken from the norm: the square of an entry below 1e-23 is zero in float32.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.triton import cdiv, launch

_ROWS = 8
_COLUMNS = 128
SMALLEST = torch.finfo(torch.float32).tiny


@triton.jit
def _row_stats(
    dy,
    base,
    squares,
    live,
    n,
    outputs,
    tokens,
    dy_row,
    dy_column,
    BASED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    there = rows < n
    from_row = dy + rows.to(tl.int64)[:, None] * dy_row
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    seen = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
    for start in range(0, outputs, BLOCK_COLUMNS):
        at = start + columns
        inside = there[:, None] & (at < outputs)[None, :]
        value = tl.load(from_row + at.to(tl.int64)[None, :] * dy_column, mask=inside, other=0.0).to(
            tl.float32
        )
        seen |= (value != 0).to(tl.int32)
        if BASED:
            row_of_base = (rows % tokens).to(tl.int64)[:, None] * outputs
            value -= tl.load(base + row_of_base + at[None, :], mask=inside, other=0.0).to(tl.float32)
        total += value * value
    tl.store(squares + rows, tl.sum(total, axis=1), mask=there)
    tl.store(live + rows, tl.max(seen, axis=1).to(tl.int8), mask=there)


@triton.jit
def _live_rows(
    dy, live, n, outputs, dy_row, dy_column, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    there = rows < n
    from_row = dy + rows.to(tl.int64)[:, None] * dy_row
    # Rows beyond the last count as seen: nobody waits for them.
    seen = (rows >= n).to(tl.int32)
    start = 0
    while (start < outputs) & (tl.min(seen, axis=0) == 0):
        at = start + columns
        inside = there[:, None] & (at < outputs)[None, :]
        value = tl.load(from_row + at.to(tl.int64)[None, :] * dy_column, mask=inside, other=0.0)
        seen |= tl.max((value != 0).to(tl.int32), axis=1)
        start += BLOCK_COLUMNS
    tl.store(live + rows, seen.to(tl.int8), mask=there)


@triton.jit
def _squares(x, row, there, width, column, seen, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    # ‖X_i‖² of a block of rows, and `seen`, or whether there is an entry that is not zero.
    columns = tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        at = start + columns
        inside = there[:, None] & (at < width)[None, :]
        value = tl.load(x + row[:, None] + at.to(tl.int64)[None, :] * column, mask=inside, other=0.0)
        seen |= (value != 0).to(tl.int32)
        total += value.to(tl.float32) * value.to(tl.float32)
    return tl.sum(total, axis=1), seen


@triton.jit
def _scores(
    dy,
    x,
    scores,
    n,
    outputs,
    inputs,
    dy_row,
    dy_column,
    x_row,
    x_column,
    SMALLEST: tl.constexpr,
    NORM: tl.constexpr,
    LEVERAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    there = rows < n
    far = rows.to(tl.int64)
    seen = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
    squares, seen = _squares(dy, far * dy_row, there, outputs, dy_column, seen, BLOCK_ROWS, BLOCK_COLUMNS)
    # The square of an entry below 1e-23 is zero, and yet its row needs a chance. (A maximum would lose NaNs.)
    norm = tl.sqrt(squares)
    norm = tl.where((norm < SMALLEST) & (tl.max(seen, axis=1) != 0), SMALLEST, norm)
    if NORM:
        tl.store(scores + rows, norm, mask=there)
        scores += n
    if LEVERAGE:
        squares, _ = _squares(x, far * x_row, there, inputs, x_column, seen, BLOCK_ROWS, BLOCK_COLUMNS)
        tl.store(scores + rows, norm * tl.sqrt(squares), mask=there)


def row_stats(dy: Tensor, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`reference.row_stats`.

    Args:
        dy: [N, O], of any strides.
        base: P, [T, O], contiguous, T divides N; or None.

    Returns:
        (squares float32 [N], live bool [N]).
    """
    n, outputs = dy.shape
    squares = torch.empty(n, dtype=torch.float32, device=dy.device)
    live = torch.empty(n, dtype=torch.int8, device=dy.device)
    launch(
        _row_stats,
        (max(1, cdiv(n, _ROWS)),),
        *(dy, dy if base is None else base, squares, live),
        *(n, outputs, 1 if base is None else len(base), *dy.stride()),
        BASED=base is not None,
        BLOCK_ROWS=_ROWS,
        BLOCK_COLUMNS=_COLUMNS,
    )
    return squares, live.view(torch.bool)


def live_rows(dy: Tensor) -> Tensor:
    """Which rows of ``dy`` [N, O] are not exactly zero: bool [N]."""
    n, outputs = dy.shape
    live = torch.empty(n, dtype=torch.int8, device=dy.device)
    launch(
        _live_rows,
        (max(1, cdiv(n, _ROWS)),),
        *(dy, live, n, outputs, *dy.stride()),
        BLOCK_ROWS=_ROWS,
        BLOCK_COLUMNS=_COLUMNS,
    )
    return live.view(torch.bool)


def scores(dy: Tensor, x: Tensor | None, *, norm: bool = True) -> Tensor:
    """See :func:`reference.scores`.

    Args:
        dy: [N, O], of any strides.
        x: X [N, I], of any strides, or None: no leverage.
        norm: whether the norm is wanted, or the leverage alone.

    Returns:
        float32 [1 or 2, N].
    """
    n = len(dy)
    found = torch.empty(norm + (x is not None), n, dtype=torch.float32, device=dy.device)
    other = dy if x is None else x
    launch(
        _scores,
        (max(1, cdiv(n, _ROWS)),),
        *(dy, other, found, n, dy.shape[1], other.shape[1], *dy.stride(), *other.stride()),
        SMALLEST=SMALLEST,
        NORM=norm,
        LEVERAGE=x is not None,
        BLOCK_ROWS=_ROWS,
        BLOCK_COLUMNS=_COLUMNS,
    )
    return found
