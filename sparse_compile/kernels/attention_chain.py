"""The backward of an attention that is a chain of products, over all or some of its query rows, with ATen.

Why it is one function, and the formulas, with dropout: ``passes/attention_chain.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.kernels.attention import Gradients, Group, WrittenOut

# As many entries of A as are computed at a time: 1 MB in float32, so that a core's own cache holds them. (For
# 16 × 12 heads of 128 × 128 the backward takes 27 ms; 36 if dA' and dS are written out by compiled loops.)
_CACHED = 2**18


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """Operands of the two products and what the softmax gave.

    Attributes:
        dropped: A' [B, H, T, U], the probabilities that V is multiplied by.
        probabilities: A [B, H, T, U], before dropout, or None if that is A'.
        v, q: [B, H, U, D], [B, H, T, D].
        kt: Kᵀ [B, H, D, U]; the gradient dK is a view of one with the same layout.
        scale: s.
    """

    dropped: Tensor
    probabilities: Tensor | None
    v: Tensor
    q: Tensor
    kt: Tensor
    scale: float
    stored: bool = dataclasses.field(default=True, init=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, t, d = self.q.shape
        return b, h, t, d

    @property
    def keys(self) -> int:
        return self.v.shape[2]

    def backward(self, do: Tensor) -> Gradients:
        """A few matrices at a time, so that dA' and dS stay in cache and are never written out."""
        dq, dkt, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in self._operands)
        step = max(torch.get_num_threads(), _CACHED // max(1, self.dropped[0, 0].numel()))
        tensors = (do, self.dropped, *self._operands, dq, dkt, dv)
        parts = zip(*(x.flatten(0, 1).split(step) for x in tensors), strict=True)
        before_dropout = None if self.probabilities is None else self.probabilities.flatten(0, 1).split(step)
        for i, (some_do, dropped, q, kt, v, some_dq, some_dkt, some_dv) in enumerate(parts):
            torch.bmm(dropped.transpose(1, 2), some_do, out=some_dv)
            da = torch.bmm(some_do, v.transpose(1, 2))
            ds = scores_gradient(da, dropped, None if before_dropout is None else before_dropout[i])
            torch.bmm(ds, kt.transpose(1, 2), out=some_dq)
            torch.bmm(q.transpose(1, 2), ds, out=some_dkt)
        return dq.mul_(self.scale), dkt.mul_(self.scale).transpose(2, 3), dv

    @property
    def _operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.kt, self.v

    def backward_of_rows(self, do: Tensor, groups: Sequence[Group]) -> Gradients:
        dq, dkt, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in self._operands)
        for group in groups:
            do_rows = _rows(do, group)
            do_rows.transpose(1, 2)[group.filled_up] = 0
            rows_dq, rows_dk, rows_dv = self._of_group(group).backward(do_rows)
            dq[_index(dq, group)] = rows_dq
            if len(group.samples) == len(dq):
                return dq, rows_dk, rows_dv
            dkt[group.samples], dv[group.samples] = rows_dk.transpose(2, 3), rows_dv
        return dq, dkt.transpose(2, 3), dv

    def _of_group(self, group: Group) -> Chain:
        whole = len(group.samples) == len(self.q)
        v, kt = (x if whole else x[group.samples] for x in (self.v, self.kt))
        probabilities = None if self.probabilities is None else _rows(self.probabilities, group)
        return Chain(_rows(self.dropped, group), probabilities, v, _rows(self.q, group), kt, self.scale)

    def written_out(self) -> WrittenOut:
        k = self.kt.transpose(2, 3)
        return WrittenOut(self.q, k, self.v, self.dropped, self.probabilities, self.scale)

    def like_gradients(self, gradients: Gradients) -> Gradients:
        dq, dk, dv = gradients
        return dq.contiguous(), dk.transpose(2, 3).contiguous().transpose(2, 3), dv.contiguous()


def scores_gradient(da: Tensor, dropped: Tensor, probabilities: Tensor | None) -> Tensor:
    """dS / s = A' ∘ dA' − A ∘ rowsum(A' ∘ dA'), in the dtype of dA'.

    Args:
        probabilities: A, or None if it is A'.
    """
    if probabilities is None:
        return torch._softmax_backward_data(da, dropped, -1, da.dtype)
    weighted = torch.mul(dropped, da.to(probabilities.dtype))
    weighted.addcmul_(probabilities, weighted.sum(-1, keepdim=True), value=-1)
    return weighted.to(da.dtype)


def _rows(x: Tensor, group: Group) -> Tensor:
    """The group's query rows of x [B, H, T, …], as [G, H, k, …]; a tensor of its own."""
    return x[_index(x, group)]


def _index(x: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Of the group's query rows in x [B, H, T, …]."""
    heads = torch.arange(x.shape[1], device=x.device).view(1, -1, 1)
    return group.samples.view(-1, 1, 1), heads, group.queries.unsqueeze(1)
