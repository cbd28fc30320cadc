"""Gather–matmul: dX = dY · W over the rows in an index buffer, gathered as the product reads them.

    products_j = scale_j · dY_(kept_j) · W      j < count
    products_N = 0                              where every row of dX that is not computed points to

Each program makes one tile of the products. Tiles are numbered over the *live* rows, whose number is read
on the device: the first programs have all the work, a few tiles of rows side by side so that they share W
in cache, and those beyond it end at once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels import choice
from sparse_compile.kernels.triton import launch, tiles

_GROUP = 8


@triton.jit
def _gather_matmul(
    dy,
    w,
    kept,
    count,
    scale,
    products,
    n,
    outputs,
    inputs,
    dy_row,
    dy_column,
    w_row,
    w_column,
    bucket,  # for the tuner alone
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    live = tl.load(count)
    row_tiles = tl.cdiv(live, BLOCK_M)
    column_tiles = tl.cdiv(inputs, BLOCK_N)

    # If all rows are live, the last one holds products, and nothing points at a row of zeros.
    if program < column_tiles and live < n:
        at = program * BLOCK_N + tl.arange(0, BLOCK_N)
        zero = tl.zeros((BLOCK_N,), products.dtype.element_ty)
        tl.store(products + tl.cast(n - 1, tl.int64) * inputs + at, zero, mask=at < inputs)
    if program >= row_tiles * column_tiles:
        return

    first = program // (GROUP * column_tiles) * GROUP
    in_group = program % (GROUP * column_tiles)
    height = tl.minimum(row_tiles - first, GROUP)
    slots = (first + in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = in_group // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    along = k.to(tl.int64)

    # Rows and columns beyond the edge read another one's numbers; what comes of it is not stored.
    rows = tl.load(kept + slots, mask=slots < live, other=0).to(tl.int64)
    from_dy = dy + rows[:, None] * dy_row + along[None, :] * dy_column
    from_w = w + along[:, None] * w_row + (columns % inputs).to(tl.int64)[None, :] * w_column
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, outputs, BLOCK_K):
        if EVEN_K:
            a = tl.load(from_dy)
            b = tl.load(from_w)
        else:
            a = tl.load(from_dy, mask=(k < outputs - start)[None, :], other=0.0)
            b = tl.load(from_w, mask=(k < outputs - start)[:, None], other=0.0)
        total = tiles.multiply_add(a, b, total, PRECISION)
        from_dy += BLOCK_K * tl.cast(dy_column, tl.int64)
        from_w += BLOCK_K * tl.cast(w_row, tl.int64)
    if SCALED:
        total *= tl.load(scale + slots, mask=slots < live, other=0.0).to(tl.float32)[:, None]

    to = products + slots.to(tl.int64)[:, None] * inputs + columns[None, :]
    inside = (slots < live)[:, None] & (columns < inputs)[None, :]
    tl.store(to, total.to(products.dtype.element_ty), mask=inside)


_KEY = ["bucket", "outputs", "inputs", "SCALED", "PRECISION"]
_even = triton.heuristics({"EVEN_K": lambda given: given["outputs"] % given["BLOCK_K"] == 0})


@functools.cache
def _tuned(single: bool, generation: int) -> Any:
    """The kernel with the tiles for its dtype and GPU."""
    return tiles.tuned(_even(_gather_matmul), tiles.SINGLE if single else tiles.HALF[generation], _KEY)


def input_gradient(dy: Tensor, w: Tensor, kept: Tensor, count: Tensor, scale: Tensor | None = None) -> Tensor:
    """The products of the kept rows; see :func:`reference.input_gradient`.

    Args:
        dy: [N, O], of any strides.
        w: W [O, I], of any strides, in the dtype of ``dy``.
        kept: int32 [C], C ≤ N, contiguous: row numbers, of which the first ``count`` are read.
        count: int32 [1], on the device.
        scale: float32 [C], or None.

    Returns:
        [N, I]: products, in the order of ``kept``; then rows that are not written; then, if ``count`` < N, a
        row of zeros.
    """
    (n, outputs), inputs = dy.shape, w.shape[1]
    products = dy.new_empty(n, inputs)
    if products.numel() == 0:
        return products

    def grid(tile: dict[str, int]) -> tuple[int]:
        tiles_of_rows = max(1, triton.cdiv(len(kept), tile["BLOCK_M"]))
        return (tiles_of_rows * triton.cdiv(inputs, tile["BLOCK_N"]),)

    kernel = _tuned(dy.dtype == torch.float32, tiles.generation(dy.device))
    launch(
        kernel,
        grid,
        *(dy, w, kept, count, count if scale is None else scale, products),
        *(n, outputs, inputs, *dy.stride(), *w.stride(), choice.bucket(len(kept))),
        SCALED=scale is not None,
        PRECISION=tiles.precision(),
        GROUP=_GROUP,
    )
    return products
