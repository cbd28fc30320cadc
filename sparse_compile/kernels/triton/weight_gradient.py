"""Gather–reduce: dW = Σ_j scale_j · dY_(kept_j)ᵀ · X_(kept_j), gathered as the sum over rows reads them, and
of reuse + Σ_t P_tᵀ · S_t.

Each program makes one tile of dW and walks over the rows in the index buffer, up to the count that it reads
on the device; then over the tokens t, of which P has a base row, and S the sum of the inputs whose rows are
dropped (``base_inputs.py``). Where dW has too few tiles to fill the GPU, rows and tokens are dealt out among
``splits`` programs a tile, each with a partial sum of its own in float32; those are added up afterwards
(``partial_sums.py``). (Atomic adds into one dW would need no buffer, and give another rounding in every run.)

Rows that are scaled are scaled before (``scaled_rows.py``), on one side, and lie one after the other then:
what is multiplied by a scale on its way is no longer copied to shared memory ahead of the tensor cores, and
they wait for it.
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
from sparse_compile.kernels.triton.partial_sums import add_up
from sparse_compile.kernels.triton.scaled_rows import scaled_rows

_GROUP = 8
# What a split is worth: fewer rows than this are not divided any further.
_ROWS_PER_SPLIT = 256
_MOST_SPLITS = 8


@triton.jit
def _gather_reduce(
    a,
    b,
    base_a,
    base_b,
    kept,
    count,
    sums,
    height,
    width,
    a_row,
    a_column,
    b_row,
    b_column,
    bucket,  # for the tuner alone
    splits,
    tokens,
    PACKED: tl.constexpr,
    BASED: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # sums [splits, height, width]: partial sums of Aᵀ · B over the kept rows of A [N, height], B [N, width].
    # If it is based, and over all rows of base_a [tokens, height], base_b [tokens, width], both contiguous.
    # Of the one that is PACKED, "a", "b" or "", the kept rows are the first ones.
    program = tl.program_id(0)
    split = tl.program_id(1)
    row_tiles = tl.cdiv(height, BLOCK_M)
    column_tiles = tl.cdiv(width, BLOCK_N)
    first = program // (GROUP * column_tiles) * GROUP
    in_group = program % (GROUP * column_tiles)
    tall = tl.minimum(row_tiles - first, GROUP)
    of_a = (first + in_group % tall) * BLOCK_M + tl.arange(0, BLOCK_M)
    of_b = in_group // tall * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    live = tl.load(count)
    share = tl.cdiv(tl.cdiv(live, splits), BLOCK_K) * BLOCK_K
    stop = tl.minimum(live, (split + 1) * share)
    # Columns beyond the edge read another one's numbers; what comes of it is not stored.
    from_a = a + (of_a % height).to(tl.int64)[None, :] * a_column
    from_b = b + (of_b % width).to(tl.int64)[None, :] * b_column
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # The row numbers are read one round ahead. Loads that wait for another load of the same round would take
    # a stage of the pipeline from the tiles (on an A100 two).
    at = split * share + k
    rows = tl.load(kept + at, mask=at < stop, other=0).to(tl.int64)[:, None]
    for start in range(split * share, stop, BLOCK_K):
        there = start + k < stop
        first_ones = (start + k).to(tl.int64)[:, None]
        of_left = first_ones if PACKED == "a" else rows
        of_right = first_ones if PACKED == "b" else rows
        left = tl.load(from_a + of_left * a_row, mask=there[:, None], other=0.0)
        right = tl.load(from_b + of_right * b_row, mask=there[:, None], other=0.0)
        at += BLOCK_K
        rows = tl.load(kept + at, mask=at < stop, other=0).to(tl.int64)[:, None]
        total = tiles.multiply_add(tl.trans(left), right, total, PRECISION)

    if BASED:
        # Dealt out from the other end: if few rows are live, the first splits have all of those.
        share = tl.cdiv(tl.cdiv(tokens, splits), BLOCK_K) * BLOCK_K
        begin = (splits - 1 - split) * share
        stop = tl.minimum(tokens, begin + share)
        at = (begin + k).to(tl.int64)[:, None]
        from_a = base_a + at * height + (of_a % height)[None, :]
        from_b = base_b + at * width + (of_b % width)[None, :]
        for start in range(begin, stop, BLOCK_K):
            there = start + k < stop
            left = tl.load(from_a, mask=there[:, None], other=0.0)
            right = tl.load(from_b, mask=there[:, None], other=0.0)
            total = tiles.multiply_add(tl.trans(left), right, total, PRECISION)
            from_a += BLOCK_K * tl.cast(height, tl.int64)
            from_b += BLOCK_K * tl.cast(width, tl.int64)

    to = sums + split.to(tl.int64) * height * width + of_a.to(tl.int64)[:, None] * width + of_b[None, :]
    inside = (of_a < height)[:, None] & (of_b < width)[None, :]
    tl.store(to, total.to(sums.dtype.element_ty), mask=inside)


_KEY = ["bucket", "height", "width", "splits", "PACKED", "BASED", "PRECISION"]


@functools.cache
def _tuned(single: bool, generation: int) -> Any:
    """The kernel with the tiles for its dtype and GPU."""
    return tiles.tuned(_gather_reduce, tiles.SINGLE if single else tiles.HALF[generation], _KEY)


def weight_gradient(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    count: Tensor,
    scale: Tensor | None = None,
    *,
    transposed: bool = False,
    splits: int | None = None,
    base: Tensor | None = None,
    inputs: Tensor | None = None,
) -> Tensor:
    """dW over the kept rows and the base; see :func:`reference.weight_gradient`.

    Args:
        dy: [N, O], of any strides.
        x: X [N, I], of any strides, in the dtype of ``dy``.
        kept: int32 [C], C ≤ N, contiguous: row numbers, of which the first ``count`` are read.
        count: int32 [1], on the device.
        scale: float32 [C], or None.
        transposed: return dW as [I, O].
        splits: among how many programs the rows of a tile are dealt out; None fills the GPU.
        base: P [T, O], contiguous, in the dtype of ``dy``; or None. What has a base has no scale.
        inputs: [T, I], contiguous, in the dtype of ``dy``: the inputs of the rows that the base stands for,
            summed (:func:`base_inputs.sum_dropped`); None together with ``base``.

    Returns:
        [O, I] or [I, O], contiguous, in the dtype of ``dy``.
    """
    assert base is None or (scale is None and inputs is not None)
    packed = ""
    if scale is not None:
        # The narrower one. In float16 dY: what was drawn against the odds has a dY as small as its weight is
        # large, and X times that weight may be infinite.
        of_dy = dy.dtype == torch.float16 or dy.shape[1] <= x.shape[1]
        rows = scaled_rows(dy if of_dy else x, kept, count, scale)
        dy, x = (rows, x) if of_dy else (dy, rows)
        packed = "a" if of_dy != transposed else "b"
    a, b = (x, dy) if transposed else (dy, x)
    tokens, base_a, base_b = 0, a, b
    if base is not None and inputs is not None:
        tokens = len(base)
        base_a, base_b = (inputs, base) if transposed else (base, inputs)
    height, width = a.shape[1], b.shape[1]
    if splits is None:
        splits = _splits(height, width, len(kept) + tokens, dy.device)
    dtype = dy.dtype if splits == 1 else torch.float32
    size = (height, width) if splits == 1 else (splits, height, width)
    sums = torch.empty(size, dtype=dtype, device=dy.device)
    if sums.numel() == 0:
        return add_up(sums, dy.dtype) if splits > 1 else sums

    def grid(tile: dict[str, int]) -> tuple[int, int]:
        return (cdiv(height, tile["BLOCK_M"]) * cdiv(width, tile["BLOCK_N"]), splits)

    kernel = _tuned(dy.dtype == torch.float32, tiles.generation(dy.device))
    launch(
        kernel,
        grid,
        *(a, b, base_a, base_b, kept, count, sums),
        *(height, width, *a.stride(), *b.stride(), choice.bucket(len(kept) + tokens), splits, tokens),
        PACKED=packed,
        BASED=base is not None,
        PRECISION=tiles.precision(dy.dtype),
        GROUP=_GROUP,
    )
    return sums if splits == 1 else add_up(sums, dy.dtype)


def _splits(height: int, width: int, rows: int, device: torch.device) -> int:
    """So many that two tiles fall to each multiprocessor, if there are rows enough to share."""
    tiles_of_dw = max(1, cdiv(height, 128) * cdiv(width, 128))
    wanted = 2 * _multiprocessors(device) // tiles_of_dw
    return max(1, min(wanted, rows // _ROWS_PER_SPLIT, _MOST_SPLITS))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
