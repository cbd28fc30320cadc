"""The backward of linears and attentions over rows whose number only the device knows, by Triton.

The products of a linear are those of ``linear.py``, with the same results, up to the order of sums. Rows are
gathered inside the kernels; what reuse adds for a base (P · W and Pᵀ · Σ dropped X, 1/B of the dense work) is
left to ATen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels import triton
from sparse_compile.kernels.linear import DistinctRows, input_gradient, sum_dropped, weight_gradient
from sparse_compile.methods.rows import Estimate, Neighbours, Rows


def usable(dy: Tensor) -> bool:
    """Whether the kernels can multiply ``dy``: on a GPU for which they are, in a dtype that they know."""
    return dy.dtype in triton.DTYPES and available(dy.device)


def available(device: torch.device) -> bool:
    """Whether there are kernels for ``device``: an Ampere GPU or a newer one."""
    return (
        device.type == "cuda"
        and triton.installed()
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def live_rows(dy: Tensor) -> Rows:
    """The rows of ``dy`` [N, O] that are not zero, as an estimate that is exact, in a buffer of size N."""
    from sparse_compile.kernels.triton.compaction import compact
    from sparse_compile.kernels.triton.row_stats import live_rows

    kept, count, slot = compact(live_rows(dy))
    return Rows(kept, count=count, slot=slot)


def row_stats(dy: Tensor, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """‖dY_i − P_t‖² in float32 [N], and which rows of dY are not zero, bool [N]."""
    from sparse_compile.kernels.triton.row_stats import row_stats

    return row_stats(dy, base)


def keep_of_four(dy: Tensor, base: Tensor, live: Tensor, keep: int) -> tuple[Neighbours, Neighbours]:
    """Estimates of dY [N, O] that keep ``keep`` of every four features, and of every four rows, of dY − P."""
    from sparse_compile.kernels.triton.neighbours import keep_of_four

    of_features, of_rows = keep_of_four(dy, base, live, keep)
    return Neighbours(of_features, base, live, False), Neighbours(of_rows, base, live, True)


def live_queries(do: Tensor) -> Tensor:
    """Which query rows of ``do`` [B, H, T, D] are not zero in every head: bool [B, T]."""
    from sparse_compile.kernels.triton.row_stats import live_rows

    b, h, t, d = do.shape
    rows = do.transpose(1, 2)
    if rows.is_contiguous():
        return live_rows(rows.view(b * t, h * d)).view(b, t)
    return live_rows(do.reshape(b * h * t, d)).view(b, h, t).any(1)


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, live: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV over the query rows that are ``live``, bool [B, T]; see ``triton/attention.py``."""
    from sparse_compile.kernels.triton.attention import attention
    from sparse_compile.kernels.triton.compaction import compact_samples

    return attention(do, q, k, v, out, lse, *compact_samples(live.contiguous()), **options)


def backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    for_dx: Estimate,
    for_dw: Estimate,
    *,
    dw_transposed: bool,
) -> tuple[DistinctRows | None, Tensor | None]:
    """As :func:`linear.backward`; all ``Rows`` have a count. What is written out goes to ATen."""
    dx = dw = None
    if w is not None and isinstance(for_dx, Rows):
        dx = input_gradient_of_rows(dy, w, for_dx)
    elif w is not None:
        dx = input_gradient(for_dx, w)  # type: ignore[arg-type]
    if x is not None and isinstance(for_dw, Rows):
        dw = weight_gradient_of_rows(dy, x, for_dw, transposed=dw_transposed)
    elif x is not None:
        dw = weight_gradient(for_dw, x, transposed=dw_transposed)  # type: ignore[arg-type]
    return dx, dw


def input_gradient_of_rows(dy: Tensor, w: Tensor, rows: Rows) -> DistinctRows:
    """dX = Ŷ · W, with dY [N, O] and W [O, I]. ``rows`` has a count, and k + T < N if it has a base."""
    from sparse_compile.kernels.triton.input_gradient import input_gradient

    assert rows.count is not None
    products = input_gradient(dy, w, rows.kept.int(), rows.count, _narrow(rows.scale))
    if rows.base is not None:
        k = len(rows.kept)
        torch.mm(rows.base, w, out=products[k : k + len(rows.base)])
    return products, _index(rows, len(dy))


def _index(rows: Rows, n: int) -> Tensor:
    """Where in the products each row of dX stands, int64 [N]; the row of zeros is at N − 1."""
    if rows.slot is not None:
        return rows.slot
    assert rows.count is not None
    device, k = rows.kept.device, len(rows.kept)
    # One more entry, which nobody reads: what is beyond the count is written there.
    index = torch.full((n + 1,), n - 1, device=device)
    if rows.base is not None and rows.dropped is not None:
        of_token = torch.arange(k, k + len(rows.base), device=device)
        index[:n] = torch.where(rows.dropped.view(-1, len(of_token)), of_token, n - 1).view(-1)
    slots = torch.arange(k, device=device)
    index.scatter_(0, torch.where(slots < rows.count, rows.kept.long(), n), slots)
    return index[:n]


def _narrow(scale: Tensor | None) -> Tensor | None:
    """As the kernels are built and tested for, like int32 for row numbers: every other dtype is another
    build, of which nobody knows whether it fits."""
    return None if scale is None else scale.float()


def weight_gradient_of_rows(dy: Tensor, x: Tensor, rows: Rows, *, transposed: bool) -> Tensor:
    """dW = Ŷᵀ · X, or its transpose, with dY [N, O] and X [N, I]. ``rows`` has a count."""
    from sparse_compile.kernels.triton.weight_gradient import weight_gradient

    assert rows.count is not None
    kept, scale = rows.kept.int(), _narrow(rows.scale)
    dw = weight_gradient(dy, x, kept, rows.count, scale, transposed=transposed)
    if rows.base is not None:
        inputs = sum_dropped(x, rows)
        dw.addmm_(*((inputs.t(), rows.base) if transposed else (rows.base.t(), inputs)))
    return dw
