"""The backward of an attention that is a chain of products, over all or some of its query rows, with ATen.

Samples and heads are one dimension here, N = B · H: Q, dO [N, T, D], Kᵀ [N, D, U], V [N, U, D], the
probabilities A, before dropout, and A', after it, [N, T, U]. Formulas: ``passes/attention_chain.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.kernels.attention import Gradients, Group

# As many entries of A as are computed at a time: 1 MB in float32, so that a core's own cache holds them.
_CACHED = 2**18


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """What the forward of an attention made of products left, heads and samples in one dimension N = B · H.

    Attributes:
        dropped: A' [N, T, U], the probabilities that V is multiplied by.
        probabilities: A [N, T, U], before dropout, or None if that is A'.
        v, q, kt: V [N, U, D], Q [N, T, D], Kᵀ [N, D, U].
        scale: s.
        heads: H.
    """

    dropped: Tensor
    probabilities: Tensor | None
    v: Tensor
    q: Tensor
    kt: Tensor
    scale: float
    heads: int


def backward(do: Tensor, chain: Chain) -> Gradients:
    """(dQ [N, T, D], dKᵀ [N, D, U], dV [N, U, D]), all rows of dO [N, T, D].

    A few matrices at a time, so that dA' and dS stay in cache and are never written out.
    """
    c = chain
    dq, dkt, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (c.q, c.kt, c.v))
    step = max(torch.get_num_threads(), _CACHED // max(1, c.dropped[0].numel()))
    for start in range(0, len(do), step):
        at = slice(start, start + step)
        torch.bmm(c.dropped[at].transpose(1, 2), do[at], out=dv[at])
        ds = _scores_gradient(torch.bmm(do[at], c.v[at].transpose(1, 2)), c, at)
        torch.bmm(ds, c.kt[at].transpose(1, 2), out=dq[at])
        torch.bmm(c.q[at].transpose(1, 2), ds, out=dkt[at])
    return dq.mul_(c.scale), dkt.mul_(c.scale), dv


def _scores_gradient(da: Tensor, c: Chain, at: slice) -> Tensor:
    """dS / s = A' ∘ dA' − A ∘ rowsum(A' ∘ dA'), in the dtype of ``da``, which is overwritten."""
    if c.probabilities is None:
        return torch._softmax_backward_data(da, c.dropped[at], -1, da.dtype)
    weighted = torch.mul(c.dropped[at], da.to(c.probabilities.dtype))
    weighted.addcmul_(c.probabilities[at], weighted.sum(-1, keepdim=True), value=-1)
    return weighted.to(da.dtype)


def backward_of_rows(do: Tensor, chain: Chain, groups: Sequence[Group]) -> Gradients:
    """(dQ, dKᵀ, dV) of the query rows in the groups alone, the same in all heads; see :func:`backward`."""
    dq, dkt, dv = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (chain.q, chain.kt, chain.v)
    )
    for group in groups:
        rows_do, c = _chain_of_group(do, chain, group)
        rows_dq, rows_dkt, rows_dv = backward(rows_do, c)
        index = _index(group, chain.heads)
        dq.view(-1, chain.heads, *dq.shape[1:])[index] = rows_dq.view(
            *index[2].shape[:1], chain.heads, -1, dq.shape[2]
        )
        if len(group.samples) * chain.heads == len(dq):
            return dq, rows_dkt, rows_dv
        for whole, some in ((dkt, rows_dkt), (dv, rows_dv)):
            whole.view(-1, chain.heads, *whole.shape[1:])[group.samples] = some.view(
                -1, chain.heads, *some.shape[1:]
            )
    return dq, dkt, dv


def _index(group: Group, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the group's query rows in a tensor [B, H, T, …]."""
    head = torch.arange(heads, device=group.samples.device).view(1, -1, 1)
    return group.samples.view(-1, 1, 1), head, group.queries.unsqueeze(1)


def _chain_of_group(do: Tensor, c: Chain, group: Group) -> tuple[Tensor, Chain]:
    index = _index(group, c.heads)

    def rows(x: Tensor) -> Tensor:
        return x.view(-1, c.heads, *x.shape[1:])[index].flatten(0, 1)

    def samples(x: Tensor) -> Tensor:
        return (
            x
            if len(group.samples) * c.heads == len(x)
            else x.unflatten(0, (-1, c.heads))[group.samples].flatten(0, 1)
        )

    probabilities = None if c.probabilities is None else rows(c.probabilities)
    return rows(do), Chain(
        rows(c.dropped), probabilities, samples(c.v), rows(c.q), samples(c.kt), c.scale, c.heads
    )
