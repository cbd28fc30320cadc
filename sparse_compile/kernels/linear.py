"""The two products of a linear's backward, dense or over few rows, with ATen (CPU and CUDA).

Shapes: dY [N, O], X [N, I], W [O, I]; dX [N, I]; dW [O, I], or [I, O] where the graph wants it transposed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.methods.rows import Estimate, Rows, written

# dX [N, I] as (rows [N, I], index int64 [N]): row i of dX is rows[index[i]]. What reads dX gathers it. If the
# index is None, the rows are dX.
# N rows are enough: if one is zero, or the same as another, there is one to spare for the row of zeros. And
# they are as large as dense products, so that the allocator finds the same memory again, still in the cache:
# with N + 1 the products of a whole step of layers of 512 × 1408 took 3 % longer.
# (More than N only if an estimate has that many distinct ones, which no site lets happen.)
DistinctRows = tuple[Tensor, Tensor | None]

# Beyond this share of the rows, writing the estimate out and multiplying it whole is as cheap.
DENSE_SHARE = 0.9


def forward(x: Tensor, w: Tensor, bias: Tensor | None, kept: Tensor) -> Tensor:
    """Y = X · Wᵀ + b, [N, O], of the rows ``kept``, int64 [k]. All others are the first of these, which they
    may as well be: that is as finite, and as far from zero, as what is needed.

    It is written out, other than dX: to leave that to the loops that read it took as long.
    """
    n, k = len(x), len(kept)
    if k == 0:
        return x.new_zeros(n, w.shape[0])
    rows = torch.nn.functional.linear(x.index_select(0, kept), w, bias)
    slot = torch.zeros(n, dtype=torch.int64, device=x.device)
    slot[kept] = torch.arange(k, device=x.device)
    return rows.index_select(0, slot)


def backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    for_dx: Estimate,
    for_dw: Estimate,
    *,
    dw_transposed: bool,
) -> tuple[DistinctRows | None, Tensor | None]:
    """(dX, dW), each from its own estimate of dY; None for the one whose other operand is None."""
    dx = dw = compact = None
    for_dx, for_dw = written(for_dx), written(for_dw)
    if w is not None:
        if isinstance(for_dx, Rows):
            compact = gather(dy, for_dx)
            dx = input_gradient_of_rows(compact, w, for_dx, len(dy))
        else:
            dx = input_gradient(for_dx, w)
    if x is not None:
        if isinstance(for_dw, Rows):
            if compact is None or for_dw is not for_dx:
                compact = gather(dy, for_dw)
            dw = weight_gradient_of_rows(compact, x, for_dw, transposed=dw_transposed)
        else:
            dw = weight_gradient(for_dw, x, transposed=dw_transposed)
    return dx, dw


def input_gradient(dy: Tensor, w: Tensor) -> DistinctRows:
    """dX = dY · W."""
    return torch.mm(dy, w), None


def on_all_rows(few: Tensor, rows: Tensor, total: int) -> Tensor:
    """``few`` [n, O] as the ``rows``, int64 [n], of ``total``; all others are zero."""
    return few.new_zeros(total, few.shape[1]).index_copy_(0, rows, few)


def written_out(dx: DistinctRows) -> Tensor:
    """dX itself."""
    rows, index = dx
    return rows if index is None else rows.index_select(0, index)


def by_sample(rows: Tensor, samples: int) -> Tensor:
    """Rows [T · B, …] that go from sample to sample, token by token, as [B · T, …], sample by sample."""
    return rows.unflatten(0, (-1, samples)).transpose(0, 1).flatten(0, 1)


def by_token(dx: DistinctRows, samples: int) -> DistinctRows:
    """dX of rows [B · T, …] as that of :func:`by_sample`'s own."""
    rows, index = dx
    tokens = len(rows if index is None else index) // samples
    return (by_sample(rows, tokens), None) if index is None else (rows, by_sample(index, tokens))


def weight_gradient(dy: Tensor, x: Tensor, *, transposed: bool) -> Tensor:
    """dW = dYᵀ · X, or its transpose."""
    return torch.mm(x.t(), dy) if transposed else torch.mm(dy.t(), x)


def gather(dy: Tensor, rows: Rows) -> Tensor:
    """The distinct rows of Ŷ, [k + T, O]: the kept rows of dY (scaled), then the base."""
    compact = dy.new_empty(rows.computed, dy.shape[1])
    k = rows.kept.numel()
    torch.index_select(dy, 0, rows.kept, out=compact[:k])
    if rows.scale is not None:
        compact[:k].mul_(rows.scale.unsqueeze(1))
    if rows.base is not None:
        compact[k:] = rows.base
    return compact


def input_gradient_of_rows(compact: Tensor, w: Tensor, rows: Rows, n: int) -> DistinctRows:
    """dX = Ŷ · W: each distinct row is multiplied once; those of Ŷ that are zero share a row of zeros."""
    k, zero_slot = rows.kept.numel(), compact.shape[0]
    products = compact.new_empty(max(n, zero_slot + (k < n)), w.shape[1])
    torch.mm(compact, w, out=products[:zero_slot])
    if rows.slot is not None:  # in which zeros are at N − 1
        products[zero_slot:][-1:] = 0
        return products, rows.slot
    products[zero_slot : zero_slot + 1] = 0
    if rows.base is None or rows.dropped is None:
        slot = torch.full((n,), zero_slot, device=compact.device)
    else:
        of_token = torch.arange(k, zero_slot, device=compact.device)
        slot = torch.where(rows.dropped.view(-1, len(of_token)), of_token, zero_slot).view(-1)
    slot[rows.kept] = torch.arange(k, device=compact.device)
    return products, slot


def weight_gradient_of_rows(compact: Tensor, x: Tensor, rows: Rows, *, transposed: bool) -> Tensor:
    """dW = Ŷᵀ · X."""
    return weight_gradient(compact, inputs_of_rows(x, rows), transposed=transposed)


def contracted(dy: Tensor, x: Tensor, estimate: Estimate) -> tuple[Tensor, Tensor]:
    """The rows [r, O] and [r, I] whose product is dW, for what is made of it by other ways than ATen's."""
    estimate = written(estimate)
    if not isinstance(estimate, Rows):
        return estimate, x
    if estimate.padded:  # how many rows there are only the device knows; the rest are zero, and harmless
        return dy, x
    return gather(dy, estimate), inputs_of_rows(x, estimate)


def inputs_of_rows(x: Tensor, rows: Rows) -> Tensor:
    """Of X [N, I] what the distinct rows of Ŷ are multiplied by, [k + T, I]: inputs whose rows of Ŷ are the
    same base row are summed."""
    inputs = x.new_empty(rows.computed, x.shape[1])
    k = rows.kept.numel()
    torch.index_select(x, 0, rows.kept, out=inputs[:k])
    if rows.base is not None and rows.dropped is not None:
        sum_dropped(x, rows, out=inputs[k:], kept=inputs[:k])
    return inputs


def sum_dropped(x: Tensor, rows: Rows, *, out: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
    """Σ over the samples b of dropped[b, t] · x[b, t], with x [B · T, I]: [T, I], in ``out`` if given.

    Where every row is either kept or dropped this is the sum of all rows less the kept ones, ``kept`` [k, I]:
    0.5 ms for 16 × 128 rows of 3072 where the masked sum takes 2.8 (one core). Rows that are counted on the
    device are not counted again.
    """
    assert rows.base is not None
    assert rows.dropped is not None
    per_sample = x.reshape(-1, len(rows.base), x.shape[1])
    samples, tokens, _ = per_sample.shape
    out = x.new_empty(tokens, x.shape[1]) if out is None else out
    if kept is not None and rows.count is None and len(kept) + int(rows.dropped.sum()) == samples * tokens:
        torch.sum(per_sample, 0, out=out)
        out.index_add_(0, rows.kept % tokens, kept, alpha=-1)
    else:
        mask = rows.dropped.view(samples, tokens).t().unsqueeze(1).to(x.dtype)
        out.copy_(torch.bmm(mask, per_sample.transpose(0, 1)).squeeze(1))
    return out


def empty_backward(
    dy: Tensor, x: Tensor | None, w: Tensor | None, *, dw_transposed: bool, dx_whole: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the sizes that the ops of a linear's backward return: rows and index of dX, and dW."""
    rows = dy.new_empty(0) if w is None else dy.new_empty(dy.shape[0], w.shape[1])
    index = dy.new_empty(0 if w is None or dx_whole else dy.shape[0], dtype=torch.int64)
    if x is None:
        return rows, index, dy.new_empty(0)
    shape = (x.shape[1], dy.shape[1]) if dw_transposed else (dy.shape[1], x.shape[1])
    return rows, index, dy.new_empty(shape)
