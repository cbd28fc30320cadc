"""Rows that were drawn, each multiplied by its weight, one after the other: what dW multiplies.

    out_j = scale_j · M_(kept_j)        for j < count

Which of dY and X it is, and why, is said in ``weight_gradient.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.triton import cdiv, launch

_ROWS = 16
_COLUMNS = 256


@triton.jit
def _scaled_rows(
    m,
    kept,
    count,
    scale,
    out,
    width,
    m_row,
    m_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    live = tl.load(count)
    if tl.program_id(0) * BLOCK_ROWS >= live:
        return
    at = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    there = at < live
    inside = there[:, None] & (columns < width)[None, :]
    rows = tl.load(kept + at, mask=there, other=0).to(tl.int64)
    factor = tl.load(scale + at, mask=there, other=0.0)
    found = tl.load(
        m + rows[:, None] * m_row + columns.to(tl.int64)[None, :] * m_column, mask=inside, other=0.0
    )
    scaled = found.to(tl.float32) * factor[:, None]
    to = out + at.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(to, scaled.to(out.dtype.element_ty), mask=inside)


def scaled_rows(m: Tensor, kept: Tensor, count: Tensor, scale: Tensor) -> Tensor:
    """See :func:`reference.scaled_rows`.

    Args:
        m: [N, M], of any strides.
        kept: int32 [C], contiguous: row numbers, of which the first ``count`` are read.
        count: int32 [1], on the device.
        scale: float32 [C], contiguous.

    Returns:
        [C, M], contiguous, in the dtype of ``m``; rows beyond ``count`` are not written.
    """
    width = m.shape[1]
    out = m.new_empty(len(kept), width)
    if out.numel() > 0:
        launch(
            _scaled_rows,
            (cdiv(len(kept), _ROWS), cdiv(width, _COLUMNS)),
            *(m, kept, count, scale, out, width, *m.stride()),
            BLOCK_ROWS=_ROWS,
            BLOCK_COLUMNS=_COLUMNS,
        )
    return out
