"""Gather–matmul: dX = dY · W over the rows in an index buffer, gathered as the product reads them.

    products_j       = scale_j · dY_(kept_j) · W      j < count
    products_(C + t) = P_t · W                        of reuse: the base, behind the C slots of kept rows
    products_j       = X_(kept_j) · Wᵀ + b            in a forward, of which X is dY's place and Wᵀ W's
    products_N       = 0                              where every row of dX that is not computed points to

Each program makes one tile of the products. Tiles are numbered over the *live* rows, whose number is read
on the device, and then over those of the base: the first programs have all the work, a few tiles of rows side
by side so that they share W in cache, and those beyond it end at once. No tile has rows of both, so what it
reads is chosen once, by a number, and copied ahead as if there were no choice.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels import choice
from sparse_compile.kernels.triton import cdiv, launch, tiles

_GROUP = 8


@triton.jit
def _gather_matmul(
    dy,
    base,
    w,
    kept,
    count,
    scale,
    bias,
    products,
    n,
    outputs,
    inputs,
    capacity,
    tokens,
    dy_row,
    dy_column,
    w_row,
    w_column,
    bucket,  # for the tuner alone
    SCALED: tl.constexpr,
    BASED: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    live = tl.load(count)
    live_tiles = tl.cdiv(live, BLOCK_M)
    row_tiles = live_tiles + tl.cdiv(tokens, BLOCK_M) if BASED else live_tiles
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
    tile = first + in_group % height
    source = dy
    row_stride = dy_row
    end = live
    if BASED:
        of_base = tile >= live_tiles
        tile = tl.where(of_base, tile - live_tiles, tile)
        source = tl.where(of_base, base, dy)
        row_stride = tl.where(of_base, outputs, dy_row)
        end = tl.where(of_base, tokens, live)
        slot = tl.where(of_base, capacity, 0)
    places = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = in_group // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    along = k.to(tl.int64)

    # Rows and columns beyond the edge read another one's numbers; what comes of it is not stored.
    there = places < end
    if BASED:  # of which the rows are numbered by their places
        of_kept = places < tl.where(of_base, 0, live)
        rows = tl.load(kept + places, mask=of_kept, other=tl.where(there, places, 0))
    else:
        rows = tl.load(kept + places, mask=there, other=0)
    from_dy = source + rows.to(tl.int64)[:, None] * row_stride + along[None, :] * dy_column
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
        total *= tl.load(scale + places, mask=there, other=0.0).to(tl.float32)[:, None]
    if BIASED:
        total += tl.load(bias + columns, mask=columns < inputs, other=0.0).to(tl.float32)[None, :]

    slots = places + slot if BASED else places
    to = products + slots.to(tl.int64)[:, None] * inputs + columns[None, :]
    inside = there[:, None] & (columns < inputs)[None, :]
    tl.store(to, total.to(products.dtype.element_ty), mask=inside)


_KEY = ["bucket", "outputs", "inputs", "SCALED", "BASED", "BIASED", "PRECISION"]
_even = triton.heuristics({"EVEN_K": lambda given: given["outputs"] % given["BLOCK_K"] == 0})


@functools.cache
def _tuned(single: bool, generation: int) -> Any:
    """The kernel with the tiles for its dtype and GPU."""
    return tiles.tuned(_even(_gather_matmul), tiles.SINGLE if single else tiles.HALF[generation], _KEY)


def input_gradient(
    dy: Tensor,
    w: Tensor,
    kept: Tensor,
    count: Tensor,
    scale: Tensor | None = None,
    base: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The products of the kept rows, and of the base; see :func:`reference.input_gradient`.

    Args:
        dy: [N, O], of any strides; with a base, it is copied if its columns are not side by side.
        w: W [O, I], of any strides, in the dtype of ``dy``.
        kept: int32 [C], C ≤ N, contiguous: row numbers, of which the first ``count`` are read.
        count: int32 [1], on the device.
        scale: float32 [C], or None.
        base: P [T, O], contiguous, in the dtype of ``dy``, with C + T < N; or None. What has a base has no
            scale.
        bias: [I], contiguous, added to each product; or None.

    Returns:
        [N, I]: products, in the order of ``kept``; then rows that are not written; from C on the products of
        the base, and again rows that are not written; last, if ``count`` < N, a row of zeros.
    """
    (n, outputs), inputs, capacity = dy.shape, w.shape[1], len(kept)
    products = dy.new_empty(n, inputs)
    if products.numel() == 0:
        return products
    tokens = 0 if base is None else len(base)
    if base is not None:
        assert scale is None
        assert capacity + tokens < n
        dy = dy if dy.stride(1) == 1 else dy.contiguous()

    def grid(tile: dict[str, int]) -> tuple[int]:
        tiles_of_rows = cdiv(capacity, tile["BLOCK_M"]) + cdiv(tokens, tile["BLOCK_M"])
        return (max(1, tiles_of_rows) * cdiv(inputs, tile["BLOCK_N"]),)

    kernel = _tuned(dy.dtype == torch.float32, tiles.generation(dy.device))
    launch(
        kernel,
        grid,
        *(dy, dy if base is None else base, w, kept, count, count if scale is None else scale),
        *(dy if bias is None else bias, products),
        *(n, outputs, inputs, capacity, tokens, *dy.stride(), *w.stride()),
        choice.bucket(capacity + tokens),
        SCALED=scale is not None,
        BASED=base is not None,
        BIASED=bias is not None,
        PRECISION=tiles.precision(dy.dtype),
        GROUP=_GROUP,
    )
    return products
