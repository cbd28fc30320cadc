"""The backward of an attention over some of its query rows, which are gathered as they are read.

With Q, dO, O [B, H, T, D], K, V [B, G, U, D], L the log-sum-exp [B, H, T] that the forward saved, and i a
kept query row of weight w_i (1, if it was not drawn at random):

    A_i = w_i · exp(s · Q_i · Kᵀ + mask_i − L_i)       δ_i = dO_i · O_i
    dS_i = A_i ∘ (dO_i · Vᵀ − δ_i)
    dV = Σ_i A_iᵀ · dO_i        dK = s · Σ_i dS_iᵀ · Q_i        dQ_i = s · dS_i · K,  0 in all other rows

(What a row gives is linear in its dO, so its weight may go to A. There it costs nothing: w · exp(x − L) is
exp(x − (L − log w)).) Three kernels, after FlashAttention-2 (Dao 2023, arXiv 2307.08691), with no atomics:

    _prepare             δ_i and L_i − log w_i, in the order of the index buffer
    _key_gradients       dK and dV: one program for a block of keys, which walks over the kept rows, once for
                         each of the query heads that share these keys
    _query_gradients     dQ: one program for a block of kept rows, which walks over the keys

Rows of a sample are ascending in the index buffer, so under a causal mask both walks leave out what lies
wholly on its other side. How many rows there are is read on the device; programs beyond that end at once.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels import choice
from sparse_compile.kernels.triton import cdiv, launch, tiles

_PREPARED = 32  # rows of one program of _prepare
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _prepare(
    do,
    out,
    lse,
    kept,
    count,
    weight,
    delta,
    shift,
    heads,
    tokens,
    capacity,
    features,
    do_strides,
    out_strides,
    lse_strides,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # delta, shift [B, H, capacity]
    blocks = tl.cdiv(capacity, ROWS)
    sample, head = _sample_and_head(tl.program_id(0) // blocks, heads)
    slots = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    there = slots < tl.load(count + sample)
    if tl.max(there.to(tl.int32), axis=0) == 0:
        return
    rows = tl.load(kept + sample * capacity + slots, mask=there, other=0).to(tl.int64)
    own_do = _load_rows(do, do_strides, sample, head, rows, there, features, WIDTH)
    own_out = _load_rows(out, out_strides, sample, head, rows, there, features, WIDTH)
    product = tl.sum(own_do.to(tl.float32) * own_out.to(tl.float32), axis=1)
    from_lse = lse + sample * lse_strides[0] + head * lse_strides[1] + rows * lse_strides[2]
    log = tl.load(from_lse, mask=there, other=0.0)
    # A row that may attend to nothing has an infinite L, of either sign, and whatever O there may be.
    empty = tl.abs(log) == float("inf")
    log = tl.where(empty, float("inf"), log)
    if WEIGHTED:
        log -= tl.log(tl.load(weight + sample * tokens + rows, mask=there, other=1.0).to(tl.float32))
    to = tl.program_id(0) // blocks * tl.cast(capacity, tl.int64) + slots
    tl.store(delta + to, tl.where(empty, 0.0, product), mask=there)
    tl.store(shift + to, log, mask=there)


@triton.jit
def _sample_and_head(number, heads):
    """Both int64, of a head of the batch."""
    return (number // heads).to(tl.int64), (number % heads).to(tl.int64)


@triton.jit
def _load_rows(x, strides, sample, head, rows, there, features, WIDTH: tl.constexpr):
    """Rows of x [B, H, T, D], as [ROWS, WIDTH]; zeros where there are none, and beyond the last feature."""
    columns = tl.arange(0, WIDTH)
    place = rows.to(tl.int64)[:, None] * strides[2] + columns.to(tl.int64)[None, :] * strides[3]
    inside = there[:, None] & (columns < features)[None, :]
    return tl.load(x + sample * strides[0] + head * strides[1] + place, mask=inside, other=0.0)


@triton.jit
def _store_rows(x, value, strides, sample, head, rows, there, features, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    place = rows.to(tl.int64)[:, None] * strides[2] + columns.to(tl.int64)[None, :] * strides[3]
    inside = there[:, None] & (columns < features)[None, :]
    to = x + sample * strides[0] + head * strides[1] + place
    tl.store(to, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _load_mask(mask, strides, sample, head, rows, columns, there, valid, ALIKE: tl.constexpr):
    """A tile of the mask, [ROWS, KEYS]; or [1, KEYS], where it is the same for all rows."""
    of_head = mask + sample * strides[0] + head * strides[1] + columns.to(tl.int64)[None, :] * strides[3]
    if ALIKE:
        tile = tl.load(of_head, mask=valid[None, :], other=0)
    else:
        place = of_head + rows.to(tl.int64)[:, None] * strides[2]
        tile = tl.load(place, mask=there[:, None] & valid[None, :], other=0)
    return tile


@triton.jit
def _scores(products, scale, mask):
    """Products of Q and K in powers of two, which is what a GPU computes: so log₂ e is one factor with the
    scale. Not so where a mask is added, which may be the lowest number that there is."""
    return products * scale if mask.dtype.element_ty.is_floating() else products * (scale * _LOG2_E)


@triton.jit
def _probabilities(scores, shift, mask):
    added = mask.dtype.element_ty.is_floating()
    return tl.exp(scores - shift) if added else tl.exp2(scores - shift * _LOG2_E)


@triton.jit
def _masked(scores, mask):
    if mask.dtype.is_floating():
        scores += mask.to(tl.float32)
    else:
        scores = tl.where(mask != 0, scores, float("-inf"))
    return scores


@triton.jit
def _first_block(kept, live, column, ROWS: tl.constexpr):
    """The first block of kept rows with a row that may attend to this column under a causal mask."""
    low = 0
    high = tl.cdiv(live, ROWS)
    while low < high:
        middle = (low + high) // 2
        last = tl.load(kept + tl.minimum((middle + 1) * ROWS, live) - 1)
        if last < column:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def _key_gradients(
    do,
    q,
    k,
    v,
    kept,
    count,
    delta,
    shift,
    mask,
    dk,
    dv,
    heads,
    groups,
    keys,
    capacity,
    features,
    scale,
    do_strides,
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    dk_strides,
    dv_strides,
    bucket,  # for the tuner alone
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    ALIKE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    blocks = tl.cdiv(keys, KEYS)
    sample, group = _sample_and_head(tl.program_id(0) // blocks, groups)
    first_column = tl.program_id(0) % blocks * KEYS
    columns = first_column + tl.arange(0, KEYS)
    valid = columns < keys
    own_k = _load_rows(k, k_strides, sample, group, columns, valid, features, WIDTH)
    own_v = _load_rows(v, v_strides, sample, group, columns, valid, features, WIDTH)
    total_k = tl.zeros((KEYS, WIDTH), tl.float32)
    total_v = tl.zeros((KEYS, WIDTH), tl.float32)

    live = tl.load(count + sample)
    kept += sample * capacity
    first = 0
    if CAUSAL:
        first = _first_block(kept, live, first_column, ROWS) * ROWS
    sharing = heads // groups
    for head in range(group * sharing, (group + 1) * sharing):
        prepared = (sample * heads + head) * capacity
        # The row numbers are read one round ahead; see weight_gradient.py.
        slots = first + tl.arange(0, ROWS)
        rows = tl.load(kept + slots, mask=slots < live, other=0)
        for start in range(first, live, ROWS):
            there = slots < live
            some_q = _load_rows(q, q_strides, sample, head, rows, there, features, WIDTH)
            some_do = _load_rows(do, do_strides, sample, head, rows, there, features, WIDTH)
            some_delta = tl.load(delta + prepared + slots, mask=there, other=0.0)
            # What is not there has no probabilities: exp(x − ∞).
            some_shift = tl.load(shift + prepared + slots, mask=there, other=float("inf"))
            # All tiles are transposed here, so that A and dS are left operands, which stay in registers.
            products = tl.zeros((KEYS, ROWS), tl.float32)
            products = tiles.multiply_add(own_k, tl.trans(some_q), products, PRECISION)
            scores = _scores(products, scale, mask)
            if MASKED:
                tile = _load_mask(mask, mask_strides, sample, head, rows, columns, there, valid, ALIKE)
                scores = _masked(scores, tl.trans(tile))
            if CAUSAL:
                scores = tl.where(columns[:, None] <= rows[None, :], scores, float("-inf"))
            a = _probabilities(scores, some_shift[None, :], mask)
            total_v = tiles.multiply_add(a.to(do.dtype.element_ty), some_do, total_v, PRECISION)
            da = tl.zeros((KEYS, ROWS), tl.float32)
            da = tiles.multiply_add(own_v, tl.trans(some_do), da, PRECISION)
            ds = a * (da - some_delta[None, :])
            total_k = tiles.multiply_add(ds.to(q.dtype.element_ty), some_q, total_k, PRECISION)
            slots = start + ROWS + tl.arange(0, ROWS)
            rows = tl.load(kept + slots, mask=slots < live, other=0)
    _store_rows(dk, total_k * scale, dk_strides, sample, group, columns, valid, features, WIDTH)
    _store_rows(dv, total_v, dv_strides, sample, group, columns, valid, features, WIDTH)


@triton.jit
def _query_gradients(
    do,
    q,
    k,
    v,
    kept,
    count,
    delta,
    shift,
    mask,
    dq,
    heads,
    groups,
    keys,
    capacity,
    features,
    scale,
    do_strides,
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    dq_strides,
    bucket,  # for the tuner alone
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    ALIKE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    programs = tl.cdiv(capacity, ROWS)  # for each head
    sample, head = _sample_and_head(tl.program_id(0) // programs, heads)
    group = head // (heads // groups)
    live = tl.load(count + sample)
    # From the last block down: under a causal mask it has the longest way to go.
    block = tl.cdiv(live, ROWS) - 1 - tl.program_id(0) % programs
    if block < 0:
        return
    slots = block * ROWS + tl.arange(0, ROWS)
    there = slots < live
    rows = tl.load(kept + sample * capacity + slots, mask=there, other=0)
    own_q = _load_rows(q, q_strides, sample, head, rows, there, features, WIDTH)
    own_do = _load_rows(do, do_strides, sample, head, rows, there, features, WIDTH)
    prepared = (sample * heads + head) * capacity + slots
    own_delta = tl.load(delta + prepared, mask=there, other=0.0)
    own_shift = tl.load(shift + prepared, mask=there, other=float("inf"))
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, tl.max(rows, axis=0) + 1)
    for start in range(0, stop, KEYS):
        columns = start + tl.arange(0, KEYS)
        valid = columns < keys
        some_k = _load_rows(k, k_strides, sample, group, columns, valid, features, WIDTH)
        some_v = _load_rows(v, v_strides, sample, group, columns, valid, features, WIDTH)
        products = tl.zeros((ROWS, KEYS), tl.float32)
        products = tiles.multiply_add(own_q, tl.trans(some_k), products, PRECISION)
        scores = _scores(products, scale, mask)
        if MASKED:
            tile = _load_mask(mask, mask_strides, sample, head, rows, columns, there, valid, ALIKE)
            scores = _masked(scores, tile)
        if CAUSAL:
            scores = tl.where(columns[None, :] <= rows[:, None], scores, float("-inf"))
        a = _probabilities(scores, own_shift[:, None], mask)
        da = tl.zeros((ROWS, KEYS), tl.float32)
        da = tiles.multiply_add(own_do, tl.trans(some_v), da, PRECISION)
        # Keys beyond the last are zeros, but what exp(0 − L) is times zero nobody knows.
        ds = tl.where(valid[None, :], a * (da - own_delta[:, None]), 0.0)
        total = tiles.multiply_add(ds.to(k.dtype.element_ty), some_k, total, PRECISION)
    _store_rows(dq, total * scale, dq_strides, sample, head, rows, there, features, WIDTH)


_KEY = ["bucket", "WIDTH", "CAUSAL", "MASKED", "ALIKE", "PRECISION"]


@functools.cache
def _tuned(over: str, single: bool, wide: bool, generation: int) -> Any:
    """The kernel that walks ``over`` the rows or the keys, with the tiles for its dtype, width and GPU."""
    kernel = _key_gradients if over == "rows" else _query_gradients
    configs = tiles.SCORES[over, "single" if single else str(generation), wide]
    return tiles.tuned(kernel, configs, _KEY, smallest=tiles.SMALLEST_SCORES)


def attention(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    count: Tensor,
    *,
    weight: Tensor | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    gradients: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) over the kept query rows; see :func:`reference.attention`.

    Args:
        do: [B, H, T, D], D ≤ 128, of any strides, as are all others.
        q: Q [B, H, T, D].
        k: K [B, G, U, D], G divides H: query heads g·H/G and those that follow share keys g.
        v: V [B, G, U, D].
        out: O [B, H, T, D].
        lse: log-sum-exp of each row's scores, float32 [B, H, T].
        kept: int32 [B, C], contiguous: query rows of each sample, ascending, of which the first ``count`` are
            read. No row twice.
        count: int32 [B], on the device.
        weight: [B, T], contiguous: what a row counts for, not negative; or None.
        causal: a query attends to no key of a higher number (T = U or not).
        mask: added to the scores, or bool, where it says what may be attended to; broadcasts to [B, H, T, U].
        scale: of the scores; None is 1/√D.
        gradients: what to write the results to, of any strides; dQ has to be zeros. None makes them.

    Returns:
        dQ [B, H, T, D], zero in the rows that are not kept, dK and dV [B, G, U, D].
    """
    b, h, t, d = q.shape
    groups, keys, capacity = k.shape[1], k.shape[2], kept.shape[1]
    if gradients is None:
        gradients = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    dq, dk, dv = gradients
    if b * h * keys * d == 0 or capacity == 0:
        return dq, dk.zero_(), dv.zero_()
    delta = torch.empty(b, h, capacity, dtype=torch.float32, device=q.device)
    shift = torch.empty_like(delta)
    width = max(16, triton.next_power_of_2(d))
    launch(
        _prepare,
        (b * h * cdiv(capacity, _PREPARED),),
        *(do, out, lse, kept, count, count if weight is None else weight, delta, shift),
        *(h, t, capacity, d, do.stride(), out.stride(), lse.stride()),
        WEIGHTED=weight is not None,
        ROWS=_PREPARED,
        WIDTH=width,
    )
    if mask is not None:
        mask = (mask.view(torch.int8) if mask.dtype == torch.bool else mask).expand(b, h, t, keys)
    operands = (do, q, k, v, kept, count, delta, shift, count if mask is None else mask)
    strides = [x.stride() for x in (do, q, k, v)] + [(0, 0, 0, 0) if mask is None else mask.stride()]
    scale = 1 / math.sqrt(d) if scale is None else scale
    sizes = (h, groups, keys, capacity, d, scale)
    constants = {"CAUSAL": causal, "PRECISION": tiles.precision(q.dtype), "WIDTH": width}
    constants |= {"MASKED": mask is not None, "ALIKE": mask is not None and mask.stride(2) == 0}
    bucket = choice.bucket(max(capacity, keys))
    kind = (q.dtype == torch.float32, width > tiles.NARROW, tiles.generation(q.device))
    launch(
        _tuned("rows", *kind),
        lambda tile: (b * groups * cdiv(keys, tile["KEYS"]),),
        *(*operands, dk, dv, *sizes, *strides, dk.stride(), dv.stride(), bucket),
        **constants,
    )
    launch(
        _tuned("keys", *kind),
        lambda tile: (b * h * cdiv(capacity, tile["ROWS"]),),
        *(*operands, dq, *sizes, *strides, dq.stride(), bucket),
        **constants,
    )
    return dq, dk, dv
