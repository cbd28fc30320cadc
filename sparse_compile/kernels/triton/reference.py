"""What each kernel computes, in eager PyTorch. Slow, and it may wait for the GPU: for reading and for tests.

``kept`` is an index buffer [C]: its first ``count`` entries are row numbers, the others hold anything.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from sparse_compile.methods.rows import Rows
from sparse_compile.methods.sample import Draw
from sparse_compile.methods.sample import rows as sample_rows


def row_stats(dy: Tensor, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """‖dY_i − P_(i mod T)‖² in float32, and which rows of dY are not exactly zero; each [N].

    Args:
        dy: [N, O].
        base: P, [T, O], T divides N; None is zero.
    """
    residual = dy.float() if base is None else dy.float() - base.float().repeat(len(dy) // len(base), 1)
    return residual.square().sum(1), (dy != 0).any(1)


def scores(dy: Tensor, x: Tensor | None, *, norm: bool = True) -> Tensor:
    """‖dY_i‖, if wanted, and ‖dY_i‖ · ‖X_i‖, if there is an X, in float32 [1 or 2, N]. The norm of a row that
    is not zero is not zero, however small."""
    norms = dy.float().norm(dim=1)
    norms = torch.where((dy != 0).any(1), norms.clamp(min=torch.finfo(norms.dtype).tiny), 0.0)
    wanted = [norms] if norm else []
    return torch.stack(wanted if x is None else [*wanted, norms * x.float().norm(dim=1)])


def keep_of_four(dy: Tensor, base: Tensor, live: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Of R = dY − P, zero where a row is not live: the largest of every 4 features, [N, O], and the largest
    of every 4 rows, transposed, [O, N]. The last of a row or column may be fewer than 4.

    Args:
        dy: [N, O].
        base: P, [T, O], T divides N.
        live: bool [N].
        keep: how many of four.
    """
    residual = dy.float() - base.float().repeat(len(dy) // len(base), 1)
    residual = torch.where(live.unsqueeze(1), residual, 0.0)
    found = []
    for rows in (residual, residual.t().contiguous()):
        pruned = torch.zeros_like(rows)
        for start in range(0, rows.shape[1], 4):
            group = rows[:, start : start + 4]
            largest = group.abs().topk(min(keep, group.shape[1]), dim=1).indices
            pruned[:, start : start + 4].scatter_(1, largest, group.gather(1, largest))
        found.append(pruned.to(dy.dtype))
    return found[0], found[1]


def compact(live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that are live, in order.

    Args:
        live: bool [N].

    Returns:
        (kept int32 [N], padded with zeros; count int32 [1]; slot int64 [N], where in ``kept`` a row stands,
        or N − 1 if it does not).
    """
    n = len(live)
    rows = live.nonzero().squeeze(1)
    kept = torch.zeros(n, dtype=torch.int32, device=live.device)
    kept[: len(rows)] = rows.int()
    slot = torch.full((n,), n - 1, device=live.device)
    slot[rows] = torch.arange(len(rows), device=live.device)
    return kept, torch.tensor([len(rows)], dtype=torch.int32, device=live.device), slot


def sum_dropped(x: Tensor, dropped: Tensor, tokens: int) -> Tensor:
    """Σ_b X_(b·T + t) over those that are dropped, in float32, then in the dtype of X: [T, I].

    Args:
        x: [N, I].
        dropped: bool [N].
        tokens: T, which divides N.
    """
    chosen = torch.where(dropped.unsqueeze(1), x.float(), 0.0)
    return chosen.unflatten(0, (len(x) // tokens, tokens)).sum(0).to(x.dtype)


def input_gradient(
    dy: Tensor,
    w: Tensor,
    kept: Tensor,
    count: Tensor,
    scale: Tensor | None = None,
    base: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Products [count + T + 1, I]: scale_j · dY_(kept_j) · W (+ b) in float32, P · W, and a row of zeros.

    (The kernel puts those of the base behind all slots of ``kept``, and the last row at N − 1, if it is not
    taken. It leaves the rows between as they are.)
    """
    rows = kept[: int(count)].long()
    products = dy[rows].float() @ w.float()
    if scale is not None:
        products *= scale[: int(count)].float().unsqueeze(1)
    if bias is not None:
        products += bias.float()
    of_base = products[:0] if base is None else base.float() @ w.float()
    return torch.cat([products, of_base, products.new_zeros(1, w.shape[1])])


def scaled_rows(m: Tensor, kept: Tensor, count: Tensor, scale: Tensor) -> Tensor:
    """scale_j · M_(kept_j), [count, M], in the dtype of M [N, M]."""
    live = int(count)
    return (scale[:live].float().unsqueeze(1) * m[kept[:live].long()].float()).to(m.dtype)


def weight_gradient(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    count: Tensor,
    scale: Tensor | None = None,
    *,
    transposed: bool = False,
    base: Tensor | None = None,
    inputs: Tensor | None = None,
) -> Tensor:
    """dW = Σ_j scale_j · dY_(kept_j)ᵀ · X_(kept_j) + Pᵀ · inputs in float32: [O, I], or its transpose."""
    rows = kept[: int(count)].long()
    gradients = dy[rows].float()
    if scale is not None:
        gradients *= scale[: int(count)].float().unsqueeze(1)
    dw = gradients.t() @ x[rows].float()
    if base is not None and inputs is not None:
        dw += base.float().t() @ inputs.float()
    return dw.t() if transposed else dw


def kth_largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest magnitude of every row, and how many of those equal to it are among the k largest.

    Args:
        x: [B, n], float32, bfloat16 or float16. What is not a number counts as infinite.

    Returns:
        (threshold int32 [B], the bits of that magnitude; room int64 [B]).
    """
    magnitude = x.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    least = magnitude.sort(dim=1, descending=True).values[:, k - 1]
    bits = least.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
    return bits.int(), k - (magnitude > least.unsqueeze(1)).sum(1)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ [B, H, T, D], dK and dV [B, G, U, D] of the kept rows, in float32; shapes as in ``attention.py``.

    Rows that may attend to nothing (their log-sum-exp is infinite) give zeros.
    """
    (b, h, t, d), (groups, keys) = q.shape, k.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    factor = torch.zeros(b, t, device=q.device)
    for sample in range(b):
        rows = kept[sample, : int(count[sample])].long()
        factor[sample, rows] = 1.0 if weight is None else weight[sample, rows].float()
    q, k, v, out = (x.float() for x in (q, k, v, out))
    do = torch.where(factor[:, None, :, None] != 0, do.float() * factor[:, None, :, None], 0.0)
    wide_k, wide_v = (x.repeat_interleave(h // groups, 1) for x in (k, v))
    scores = q @ wide_k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    if causal:
        later = torch.ones(t, keys, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    empty = lse.isinf().unsqueeze(-1)
    a = torch.where(empty, 0.0, (scores - lse.unsqueeze(-1)).exp())
    delta = torch.where(empty, 0.0, (do * out).sum(-1, keepdim=True))
    ds = a * (do @ wide_v.mT - delta) * scale
    dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (ds.mT @ q, a.mT @ do))
    return ds @ wide_k, dk, dv


def order(n: int, key: int) -> Tensor:
    """0 … n − 1 in the random order of a key, int64: by a Feistel network of six rounds over as many bits as
    n − 1 has (at least two), of which what is not below n is left out."""
    bits = max(2, (n - 1).bit_length())
    low = bits // 2
    x = torch.arange(1 << bits)
    lower, upper = x & ((1 << low) - 1), x >> low
    for turn in range(6):
        if turn % 2 == 0:
            lower = lower ^ (_hashed(upper ^ _hashed(key + turn)) & ((1 << low) - 1))
        else:
            upper = upper ^ (_hashed(lower ^ _hashed(key + turn)) & ((1 << (bits - low)) - 1))
    x = (upper << low) | lower
    return x[x < n]


_T = TypeVar("_T", int, Tensor)


def _hashed(x: _T) -> _T:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


class Numbers(Draw):
    """A draw as a kernel makes it: in its own order, and from these numbers."""

    def order(self, n: int) -> Tensor:
        return order(n, self.number())

    def start(self) -> float:
        return self.number() / 2**31


def draw(scores: Tensor, k: int, cap: float | None, numbers: Draw) -> Rows:
    """k rows drawn at random by ``scores`` [N], none negative: :func:`methods.sample.rows`, whose weights are
    1 where no more than k have a score, and not a number where a score is not finite."""
    if not bool(scores.sum().isfinite()):
        kept = torch.arange(k, device=scores.device)
        return Rows(kept, scale=torch.full((k,), torch.nan, device=scores.device))
    found = sample_rows(scores, k, cap, numbers)
    if found.scale is not None:
        return found
    return Rows(found.kept, scale=torch.ones_like(found.kept, dtype=torch.float32))


def largest(scores: Tensor, live: Tensor, k: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k live rows with the largest score; of rows with the same one the first.

    Returns:
        (kept int64, ascending, at most k; slot int64 [N], where a row stands among the k entries of a buffer
        with these first and the rows of the base behind it, or N − 1; dropped bool [N]).
    """
    n = len(scores)
    known = scores.nan_to_num(nan=torch.inf).double() + scores.isnan()
    ranked = torch.where(live, known, -1.0).sort(descending=True, stable=True).indices
    kept = ranked[: min(k, int(live.sum()))].sort().values
    dropped = live.index_fill(0, kept, False)
    slot = torch.where(dropped, k + torch.arange(n, device=scores.device) % tokens, n - 1)
    slot[kept] = torch.arange(len(kept), device=scores.device)
    return kept, slot, dropped


def add_up(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_s parts_s, float32 [S, …], rounded to ``dtype``."""
    return parts.sum(0).to(dtype)


def renew_base(dy: Tensor, base: Tensor, sample: Tensor | None) -> bool:
    """Renew P [T, O] from dY [N, O] in its place, by one sample, int64 [1], or by the mean over all, if that
    is finite. Returns whether it is."""
    per_sample = dy.reshape(-1, *base.shape)
    new = per_sample.float().mean(0) if sample is None else per_sample[int(sample)]
    new = new.to(base.dtype)
    finite = bool(new.isfinite().all())
    if finite:
        base.copy_(new)
    return finite
