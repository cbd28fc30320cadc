"""The backward of attention over some of its query rows, with ATen.

Shapes: Q, dO, O [B, H, T, D]; K, V [B, H, U, D]; log-sum-exp [B, H, T]; an additive mask, broadcastable to
[B, H, T, U]. What autograd needs is

    dV = Aᵀ · dO    dA = dO · Vᵀ    dS = A ∘ (dA − rowsum(dA ∘ A)) · s    dQ = dS · K    dK = dSᵀ · Q

and every query row of dO goes through it alone: A is needed only in the rows that are computed, and the
sums over queries, dV and dK, only have those rows as terms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten

Gradients = tuple[Tensor, Tensor, Tensor]  # dQ, dK, dV

# Samples are computed together if the smallest lacks no more rows than this, or than a quarter, of the
# largest's. What it lacks is filled up with rows that add nothing, and that is cheaper than the copies of
# K, V, dK and dV that a group of its own needs: as long as 20 to 30 rows of 64 (one core, AVX-512, float32).
_FILLED_UP = 24


@dataclasses.dataclass(frozen=True, slots=True)
class Fused:
    """What the forward of a fused attention left: see ``_scaled_dot_product_flash_attention_for_cpu``."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    mask: Tensor | None
    causal: bool
    scale: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Samples with about the same number of query rows to compute.

    Attributes:
        samples: int64 [G], ascending.
        queries: int64 [G, k], the rows of each, no row twice. A sample with fewer than k of them is filled up
            with others of its rows, whose dO must be zero.
    """

    samples: Tensor
    queries: Tensor

    @property
    def index(self) -> tuple[Tensor, Tensor]:
        """Of the rows of a tensor [B, T, …]."""
        return self.samples.unsqueeze(1), self.queries


def groups(chosen: Tensor) -> list[Group]:
    """Sort samples into groups, by the number of their chosen rows; those with none are in no group.

    Args:
        chosen: bool [B, T].
    """
    counts = chosen.sum(1).tolist()
    chosen_first = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    waiting = sorted((i for i, count in enumerate(counts) if count), key=lambda i: -counts[i])
    found = []
    while waiting:
        most = counts[waiting[0]]
        size = sum(counts[i] >= most - max(_FILLED_UP, most // 4) for i in waiting)
        samples = torch.tensor(sorted(waiting[:size]), device=chosen.device)
        found.append(Group(samples, chosen_first[samples, :most]))
        waiting = waiting[size:]
    return found


def fused_backward(do: Tensor, forward: Fused) -> Gradients:
    """(dQ, dK, dV), all rows."""
    f = forward
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, f.q, f.k, f.v, f.out, f.lse, 0.0, f.causal, attn_mask=f.mask, scale=f.scale
    )


def fused_backward_of_rows(do: Tensor, forward: Fused, groups: Sequence[Group]) -> Gradients:
    """(dQ, dK, dV) of the query rows in the groups alone; the dQ of all others is zero."""
    dq = zeros(forward.q)
    dk = dv = None
    for group in groups:
        rows_dq, rows_dk, rows_dv = fused_backward(rows_of(do, group), _of_group(forward, group))
        dq.transpose(1, 2)[group.index] = rows_dq.transpose(1, 2)
        if len(group.samples) == len(dq):
            return dq, rows_dk, rows_dv
        if dk is None or dv is None:
            dk, dv = zeros(forward.k), zeros(forward.v)
        dk[group.samples], dv[group.samples] = rows_dk, rows_dv
    return dq, zeros(forward.k) if dk is None else dk, zeros(forward.v) if dv is None else dv


def _of_group(f: Fused, group: Group) -> Fused:
    whole = len(group.samples) == len(f.q)
    k, v = (x if whole else x[group.samples] for x in (f.k, f.v))
    q, out = (rows_of(x, group) for x in (f.q, f.out))
    lse = f.lse.transpose(1, 2)[group.index].transpose(1, 2)
    return Fused(q, k, v, out, lse, _mask_of_group(f, group), False, f.scale)


def _mask_of_group(f: Fused, group: Group) -> Tensor | None:
    mask = None
    if f.mask is not None:
        heads = f.mask.shape[1] if f.mask.dim() == 4 else 1
        mask = f.mask.expand(len(f.q), heads, f.q.shape[2], f.k.shape[2])
        mask = mask.transpose(1, 2)[group.index].transpose(1, 2)
    if f.causal:
        later = torch.arange(f.k.shape[2], device=f.q.device) > group.queries.unsqueeze(2)
        mask = f.q.new_zeros(later.shape).masked_fill_(later, -torch.inf).unsqueeze(1)
    return mask


def rows_of(x: Tensor, group: Group) -> Tensor:
    """The group's query rows of x [B, H, T, D], as [G, H, k, D]."""
    return x.transpose(1, 2)[group.index].transpose(1, 2)


def empty(x: Tensor) -> Tensor:
    """Of the shape of x [B, H, T, D], in the layout of the fused op's gradients: [B, T, H, D] in memory."""
    b, h, t, d = x.shape
    return x.new_empty(b, t, h, d).transpose(1, 2)


def zeros(x: Tensor) -> Tensor:
    """Zeros of the shape of x, laid out as in :func:`empty`."""
    return empty(x).zero_()
