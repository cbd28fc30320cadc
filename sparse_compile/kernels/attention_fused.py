"""The backward of the fused attention op of the CPU, over all or some of its query rows.

Some rows are computed by the very same op, on the rows of Q, dO, O and log-sum-exp and on whole K and V: with
the log-sum-exp at hand, a row of A takes no other row. A causal mask becomes an explicit one of the rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.kernels.attention import Gradients, Group, WrittenOut

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, slots=True)
class Fused:
    """The arguments of ``_scaled_dot_product_flash_attention_for_cpu`` and its results: O [B, H, T, D] and
    log-sum-exp [B, H, T]. The mask is added to the scores, and may be broadcast to [B, H, T, U]."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    causal: bool
    mask: Tensor | None
    scale: float | None
    stored: bool = dataclasses.field(default=False, init=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, t, d = self.q.shape
        return b, h, t, d

    @property
    def keys(self) -> int:
        return self.k.shape[2]

    def backward(self, do: Tensor) -> Gradients:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(do, self.q, self.k, self.v, self.out, self.lse, 0.0, self.causal),
            attn_mask=self.mask,
            scale=self.scale,
        )

    def backward_of_rows(self, do: Tensor, groups: Sequence[Group]) -> Gradients:
        dq = zeros(self.q)
        dk = dv = None
        for group in groups:
            do_rows = _rows(do, group)
            do_rows.transpose(1, 2)[group.filled_up] = 0
            rows_dq, rows_dk, rows_dv = self._of_group(group).backward(do_rows)
            dq.transpose(1, 2)[group.index] = rows_dq.transpose(1, 2)
            if len(group.samples) == len(dq):
                return dq, rows_dk, rows_dv
            if dk is None or dv is None:
                dk, dv = zeros(self.k), zeros(self.v)
            dk[group.samples], dv[group.samples] = rows_dk, rows_dv
        return dq, zeros(self.k) if dk is None else dk, zeros(self.v) if dv is None else dv

    def _of_group(self, group: Group) -> Fused:
        whole = len(group.samples) == len(self.q)
        k, v = (x if whole else x[group.samples] for x in (self.k, self.v))
        q, out = (_rows(x, group) for x in (self.q, self.out))
        lse = self.lse.transpose(1, 2)[group.index].transpose(1, 2)
        return Fused(q, k, v, out, lse, False, self._mask_of_group(group), self.scale)

    def _mask_of_group(self, group: Group) -> Tensor | None:
        mask = None
        if self.mask is not None:
            samples, _, queries, _ = self.shape
            heads = self.mask.shape[1] if self.mask.dim() == 4 else 1
            mask = _rows(self.mask.expand(samples, heads, queries, self.keys), group)
        if self.causal:
            later = torch.arange(self.keys, device=self.q.device) > group.queries.unsqueeze(2)
            causal = self.q.new_zeros(later.shape).masked_fill_(later, -torch.inf).unsqueeze(1)
            mask = causal if mask is None else mask + causal
        return mask

    def written_out(self) -> WrittenOut:
        shared = self.shape[1] // self.k.shape[1]
        k, v = (x.repeat_interleave(shared, 1) for x in (self.k, self.v))
        scale = 1 / math.sqrt(self.shape[3]) if self.scale is None else self.scale
        scores = (self.q @ k.transpose(-1, -2)) * scale
        if self.mask is not None:
            scores = scores + self.mask
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
            scores = scores.masked_fill(later, -torch.inf)
        probabilities = (scores - self.lse.unsqueeze(-1)).exp().to(self.q.dtype)
        return WrittenOut(self.q, k, v, probabilities, None, scale)

    def like_gradients(self, gradients: Gradients) -> Gradients:
        dq, dk, dv = gradients
        dk, dv = (x.unflatten(1, (self.k.shape[1], -1)).sum(2) for x in (dk, dv))
        return empty(dq).copy_(dq), empty(dk).copy_(dk), empty(dv).copy_(dv)


def _rows(x: Tensor, group: Group) -> Tensor:
    """The group's query rows of x [B, H, T, D], as [G, H, k, D]; a tensor of its own."""
    return x.transpose(1, 2)[group.index].transpose(1, 2)


def empty(x: Tensor) -> Tensor:
    """Of the shape of x [B, H, T, D], in the layout of the fused op's gradients: [B, T, H, D] in memory."""
    b, h, t, d = x.shape
    return x.new_empty(b, t, h, d).transpose(1, 2)


def zeros(x: Tensor) -> Tensor:
    """Zeros of the shape of x, laid out as in :func:`empty`."""
    return empty(x).zero_()
