"""The backward of linears and attentions over rows whose number only the device knows, by Triton.

The products of a linear are those of ``linear.py``, with the same results, up to the order of sums. Rows are
gathered inside the kernels, and what reuse adds for a base (P · W and Pᵀ · Σ dropped X) is more rows to them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels import triton
from sparse_compile.kernels.linear import DistinctRows, input_gradient, weight_gradient
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
    return Rows(kept, count=count, slot=slot, padded=True)


def needed_slots(needed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kept, count, slot and copies of the rows with ``needed``, bool [N]; see ``device_forward.py``."""
    from sparse_compile.kernels.triton.compaction import compact

    kept, count, slot = compact(needed.contiguous())
    # Of none there is no copy, but the row of zeros.
    return kept, count, slot, torch.where(needed, slot, torch.where(count > 0, 0, len(needed) - 1))


def forward_of_rows(x: Tensor, w: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
    """X · Wᵀ + b, with X [N, I] and W [O, I], of ``rows``, which have a count: [N, O], in their order; then
    rows that are not written; then, if there are fewer than N, a row of zeros."""
    from sparse_compile.kernels.triton.input_gradient import input_gradient

    assert rows.count is not None
    bias = None if bias is None else bias.contiguous()
    return input_gradient(x, w.t(), rows.kept, rows.count, bias=bias)


def row_stats(dy: Tensor, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """‖dY_i − P_t‖² in float32 [N], and which rows of dY are not zero, bool [N]."""
    from sparse_compile.kernels.triton.row_stats import row_stats

    return row_stats(dy, base)


def drawn(
    dy: Tensor,
    x: Tensor | None,
    k: int,
    cap: float | None,
    numbers: list[tuple[int, int]] | Tensor,
    *,
    for_dx: bool,
    tally: Tensor,
    share: float | None = None,
) -> tuple[list[Rows], Tensor]:
    """Estimates of dY [N, O] by k rows drawn at random: for dX by ‖dY_i‖, if wanted; and for dW, if X [N, I]
    is given, by ‖dY_i‖ · ‖X_i‖; one of both at least. With them comes how many rows have such a score, int32.
    For the other arguments see ``triton/draw.py``."""
    from sparse_compile.kernels.triton.draw import draw
    from sparse_compile.kernels.triton.row_stats import scores

    if len(dy) == 0:
        none = _no_rows(dy)
        rows = dataclasses.replace(none, scale=dy.new_empty(0, dtype=torch.float32))
        draws = for_dx + (x is not None)
        return [rows] * draws, none.kept.new_zeros(draws)
    found = scores(dy, x, norm=for_dx)
    kept, scale, count, slot, _, alive = draw(found, k, cap, numbers, slots=for_dx, tally=tally, share=share)
    slots = [slot if for_dx else None, None]
    each = zip(kept, scale, count.split(1), slots, strict=False)
    return [Rows(kept, scale=scale, count=count, slot=slot) for kept, scale, count, slot in each], alive


def largest(squares: Tensor, live: Tensor, k: int, base: Tensor, tally: Tensor) -> Rows:
    """An estimate of dY by the k rows that differ most from P [T, O]: by ‖dY_i − P_t‖², float32 [N], and
    which rows are not zero, bool [N]; see ``triton/largest.py``."""
    from sparse_compile.kernels.triton.largest import largest

    if len(live) == 0:
        return dataclasses.replace(_no_rows(squares), base=base, dropped=live)
    kept, count, slot, dropped = largest(squares, live, k, len(base), tally)
    return Rows(kept, base=base, dropped=dropped, count=count, slot=slot)


def _no_rows(dy: Tensor) -> Rows:
    """Of none: those of an expert without tokens."""
    numbers = dy.new_empty(0, dtype=torch.int32)
    return Rows(numbers, count=numbers.new_zeros(1), slot=numbers.long())


def renew_base(dy: Tensor, base: Tensor, sample: Tensor | None, renewed: Tensor) -> None:
    """Renew P [T, O] from dY [N, O] in its place, if what it is to be is finite; see
    ``triton/base_renewal.py``."""
    from sparse_compile.kernels.triton.base_renewal import renew_base

    if len(dy) > 0:
        renew_base(dy, base, sample, renewed)


def tally_rows(tally: Tensor, count: Tensor, n: int, *, zero: bool, flops: int) -> None:
    """Count the rows beyond ``count`` of ``n`` as skipped, each of so many ``flops``; as zero, if asked."""
    from sparse_compile.kernels.triton.compaction import tally_rows

    tally_rows(tally, count, n, zero=zero, flops=flops)


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


def drawn_queries(
    do: Tensor, k: int, cap: float | None, numbers: tuple[int, int] | Tensor, tally: Tensor
) -> Tensor:
    """The weights [B, T] of the k query rows of ``do`` [B, H, T, D] that are drawn by ‖dO_t‖ over all heads,
    zero for the others; see ``triton/draw.py``."""
    from sparse_compile.kernels.triton.row_stats import scores

    b, h, t, d = do.shape
    (norms,) = scores(do.transpose(1, 2).reshape(b * t, h * d), None)
    return drawn_weights(norms, k, cap, numbers, tally).view(b, t)


def drawn_weights(
    scores: Tensor, k: int, cap: float | None, numbers: tuple[int, int] | Tensor, tally: Tensor
) -> Tensor:
    """The weights [N] of k drawn by ``scores``, float32 [N], zero for the others; see ``triton/draw.py``."""
    from sparse_compile.kernels.triton.draw import draw

    given = numbers if isinstance(numbers, Tensor) else [numbers]
    (weights,) = draw(scores.unsqueeze(0), k, cap, given, slots=False, tally=tally)[4]
    return weights


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
    """dX = Ŷ · W, with dY [N, O] and W [O, I]. ``rows`` has a count and slots; and k + T < N with a base."""
    from sparse_compile.kernels.triton.input_gradient import input_gradient

    assert rows.count is not None
    assert rows.slot is not None
    base = None if rows.base is None else rows.base.contiguous()
    products = input_gradient(dy, w, rows.kept.int(), rows.count, _narrow(rows.scale), base)
    return products, rows.slot


def _narrow(scale: Tensor | None) -> Tensor | None:
    """As the kernels are built and tested for, like int32 for row numbers: every other dtype is another
    build, of which nobody knows whether it fits."""
    return None if scale is None else scale.float()


def weight_gradient_of_rows(dy: Tensor, x: Tensor, rows: Rows, *, transposed: bool) -> Tensor:
    """dW = Ŷᵀ · X, or its transpose, with dY [N, O] and X [N, I]. ``rows`` has a count."""
    from sparse_compile.kernels.triton.base_inputs import sum_dropped
    from sparse_compile.kernels.triton.weight_gradient import weight_gradient

    assert rows.count is not None
    kept, scale = rows.kept.int(), _narrow(rows.scale)
    base = inputs = None
    if rows.base is not None and rows.dropped is not None:
        base = rows.base.contiguous()
        inputs = sum_dropped(x, rows.dropped.contiguous(), len(base))
    return weight_gradient(dy, x, kept, rows.count, scale, transposed=transposed, base=base, inputs=inputs)
