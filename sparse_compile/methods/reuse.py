"""Reuse: what is remembered of an earlier gradient stands in for the part that is not computed.

    P  [T, O]   base: dY of an earlier backward, of one sample or the mean over the batch
    R = dY − P  residual, P broadcast over the batch
    S           the largest part of R, the rest set to zero
    Ŷ = S + P   the estimate of dY, from which   dX = Ŷ · W,   dW = Ŷᵀ · X

Where dY is exactly zero for a whole row its true gradient is known, and Ŷ is zero there too. Sources:
ReSprop (Goli & Aamodt, CVPR 2020, eq. 4–7: elements, one random sample); ReSprop for transformers and
C-Sharp (batch mean, N:M). The row form is ours: where S keeps a row whole, Ŷ equals dY in it, so that

    dX_i = dY_i · W      for kept rows            dW = Σ_kept dY_iᵀ · X_i + Pᵀ · Σ_dropped X_i
           P_t · W       for dropped ones

and both products need only the kept rows and the T rows of P.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparse_compile.kernels import linear as kernel
from sparse_compile.methods.rows import Estimate, Rows, number_kept, wide
from sparse_compile.phases import parse_n_m
from sparse_compile.settings.reuse import Reuse


def next_base(dy: Tensor, tokens: int, sample: int | Tensor | None) -> Tensor:
    """P for later backwards.

    Args:
        dy: [N, O], N = B · tokens.
        tokens: T, the rows of one sample.
        sample: which of the B samples to remember, as a number or int64 [1] on the device of ``dy``; or None
            for the mean over all of them.

    Returns:
        [T, O], a tensor of its own.
    """
    per_sample = dy.view(-1, tokens, dy.shape[1])
    if isinstance(sample, Tensor):
        return per_sample.index_select(0, sample).squeeze(0)
    return per_sample.mean(0) if sample is None else per_sample[sample].clone()


def rows(dy: Tensor, base: Tensor, keep: float, live: Tensor | None) -> Rows:
    """Keep whole rows of R, the round(keep · N) with the largest L2 norm (fewer if fewer are not zero).

    Args:
        dy: [N, O].
        base: P, [T, O].
        keep: share of the N rows that is computed.
        live: bool [N], the rows of dY that are not zero; None if none is.
    """
    norm = _residual_norms(dy, base)
    if live is not None:
        norm = torch.where(live, norm, -1.0)
    alive = dy.shape[0] if live is None else int(live.sum())
    kept = norm.topk(min(number_kept(keep, dy.shape[0]), alive), sorted=False).indices.sort().values
    dropped = torch.ones_like(norm, dtype=torch.bool) if live is None else live.clone()
    dropped[kept] = False
    return Rows(kept, base, dropped)


def _residual_norms(dy: Tensor, base: Tensor) -> Tensor:
    """‖dY_i − P_t‖ for every row, [N]; a few samples at a time, so that R stays in cache."""
    per_sample = dy.view(-1, *base.shape)
    samples = max(1, 2**20 // base.numel())
    of = functools.partial(torch.linalg.vector_norm, dim=-1, dtype=wide(dy.dtype))
    norms = [of(some - base) for some in per_sample.split(samples)]
    return torch.cat(norms).view(-1)


def elements(dy: Tensor, base: Tensor, keep: float, live: Tensor | None) -> Tensor:
    """Keep single entries of R, the round(keep · N · O) with the largest magnitude in the whole tensor.

    Returns:
        Ŷ, [N, O].
    """
    tiled = base.expand(dy.shape[0] // base.shape[0], *base.shape).reshape(dy.shape)
    size = _masked(dy - tiled, live).abs().reshape(-1)
    kept = size.topk(number_kept(keep, size.numel()), sorted=False).indices
    estimate = tiled.clone(memory_format=torch.contiguous_format)
    estimate.view(-1)[kept] = dy.reshape(-1)[kept]
    return _masked(estimate, live)


def n_of_m(dy: Tensor, base: Tensor, n: int, m: int, live: Tensor | None, *, dim: int) -> Tensor:
    """Keep the n largest of every m neighbours of R along ``dim``: 1 (the features, which dX = Ŷ · W
    contracts) or 0 (the rows, which dW = Ŷᵀ · X contracts). A last, shorter group keeps its n largest.

    Returns:
        Ŷ, [N, O].
    """
    tiled = base.expand(dy.shape[0] // base.shape[0], *base.shape).reshape(dy.shape)
    residual = _masked(dy - tiled, live).movedim(dim, -1)
    kept = largest_of_neighbours(residual.abs(), n, m).movedim(-1, dim)
    return _masked(torch.where(kept, dy, tiled), live)


def largest_of_neighbours(size: Tensor, n: int, m: int) -> Tensor:
    """Which entries are among the n largest of their group: bool. Groups are m neighbours in the last
    dimension, from its start; a last, shorter one keeps its n largest."""
    n, m = min(n, size.shape[-1]), min(m, size.shape[-1])
    groups = torch.nn.functional.pad(size, (0, -size.shape[-1] % m), value=-1.0).unflatten(-1, (-1, m))
    kept = torch.zeros_like(groups, dtype=torch.bool)
    kept.scatter_(-1, groups.topk(n, dim=-1, sorted=False).indices, True)
    return kept.flatten(-2)[..., : size.shape[-1]]


def _masked(values: Tensor, live: Tensor | None) -> Tensor:
    return values if live is None else torch.where(live.unsqueeze(1), values, torch.zeros_like(values))


def estimates(dy: Tensor, base: Tensor, method: Reuse, live: Tensor | None) -> tuple[Estimate, Estimate]:
    """dY as the schedule wants it estimated, for dX and for dW; by rows only where those are few.

    Args:
        dy: [N, O].
        base: [T, O].
        live: bool [N], the rows that are not zero; None if none is.
    """
    ratio = method.phases[0][0]
    if method.granularity == "element":
        estimate = elements(dy, base, method.keep, live)
        return estimate, estimate
    if isinstance(ratio, str):
        n, m = parse_n_m(ratio)
        return (
            n_of_m(dy, base, n, m, live, dim=1),
            n_of_m(dy, base, n, m, live, dim=0),
        )
    few = rows(dy, base, method.keep, live)
    if few.computed > kernel.DENSE_SHARE * len(dy):
        estimate = few.dense(dy)
        return estimate, estimate
    return few, few
