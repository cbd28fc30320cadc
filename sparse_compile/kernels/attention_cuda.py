"""The backward of CUDA's fused attention ops, over all or some of the query rows.

All rows go through the op's own backward, the very one that the graph would have called: its results are the
same to the bit. Some rows go through Triton (``triton/attention.py``), with the log-sum-exp that the forward
left, which all of these ops give as the natural logarithm of each row's sum.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels import on_device
from sparse_compile.kernels.attention import Gradients

aten = torch.ops.aten

FORMS = ("flash", "efficient", "cudnn")
_WIDEST = 128  # heads that the kernel can hold


@dataclasses.dataclass(frozen=True, slots=True)
class Queries:
    """Query rows to be computed, whose number the device alone knows.

    Attributes:
        live: bool [B, T], which ones.
        weights: f [B, T], what dO is multiplied by: zero in the other rows. None where all of those are zero
            in dO, and nothing is to be changed.
        share: of the rows, that are live; as far as the host knows, and for a guess of what they cost.
    """

    live: Tensor
    weights: Tensor | None
    share: float

    def apply(self, do: Tensor) -> Tensor:
        """dO [B, H, T, D], written out as these rows stand for it."""
        # (A weight may be larger than float16 can hold, where what it is multiplied by is small.)
        return do if self.weights is None else (do * self.weights[:, None, :, None]).to(do.dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class CudaFused:
    """What the forward of ``_scaled_dot_product_{flash,efficient,cudnn}_attention`` left; without dropout.

    Attributes:
        form: which of the three: one of ``FORMS``.
        lse: float32, [B, H, T], or [B, H, T, 1], or with room behind the last row, as the op gives it.
        mask: added to the scores, [B, H, T, U] or broadcast to it, or None.
        rest: what else the op's backward wants: cum_seq_q, cum_seq_k, max_q, max_k, and the two parts of the
            state of the random numbers.
    """

    form: str
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    causal: bool
    mask: Tensor | None
    scale: float | None
    rest: tuple[Any, ...]
    stored: bool = dataclasses.field(default=False, init=False)

    @classmethod
    def of(
        cls,
        form: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        mask: Tensor | None,
        scale: float | None,
        *rest: Any,
    ) -> CudaFused:
        """As the ops have them."""
        return cls(form, q, k, v, out, lse, causal, mask, scale, rest)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, t, d = self.q.shape
        return b, h, t, d

    @property
    def keys(self) -> int:
        return self.k.shape[2]

    @property
    def by_kernel(self) -> bool:
        """Whether there is a kernel for some of the rows."""
        return self.q.shape[3] <= _WIDEST and on_device.usable(self.q)

    def backward(self, do: Tensor) -> Gradients:
        """dQ, dK, dV by the op's own backward."""
        operands = (do, self.q, self.k, self.v)
        cum_q, cum_k, max_q, max_k, seed, offset = self.rest
        lengths, random = (cum_q, cum_k, max_q, max_k), (seed, offset)
        if self.form == "flash":
            return aten._scaled_dot_product_flash_attention_backward(
                *(*operands, self.out, self.lse, *lengths, 0.0, self.causal, *random), scale=self.scale
            )
        if self.form == "cudnn":
            return aten._scaled_dot_product_cudnn_attention_backward(
                *(*operands, self.out, self.lse, *random, self.mask, *lengths, 0.0, self.causal),
                scale=self.scale,
            )
        # This one takes dO and O in the layout of its own O alone (PyTorch's issue 138772).
        do, out = heads_inside(do), heads_inside(self.out)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            *(do, *operands[1:], self.mask, out, self.lse, *random, 0.0, [True, True, True, False]),
            *(self.causal,),
            scale=self.scale,
        )
        return dq, dk, dv

    def backward_of_queries(self, do: Tensor, queries: Queries) -> Gradients:
        """dQ, dK, dV of some rows, in the layout of :meth:`backward`'s. Nothing waits for the device."""
        return on_device.attention_backward(
            *(do, self.q, self.k, self.v, self.out, self.row_lse, queries.live),
            weight=queries.weights,
            causal=self.causal,
            mask=self.mask,
            scale=self.scale,
            gradients=(self._like(self.q).zero_(), self._like(self.k), self._like(self.v)),
        )

    @property
    def row_lse(self) -> Tensor:
        """The log-sum-exp as [B, H, T]."""
        lse = self.lse.squeeze(3) if self.lse.dim() == 4 else self.lse
        return lse[:, :, : self.q.shape[2]]

    def _like(self, x: Tensor) -> Tensor:
        if self.form != "efficient":
            return torch.empty_like(x)
        b, h, t, d = x.shape
        return x.new_empty(b, t, h, d).transpose(1, 2)


def heads_inside(x: Tensor) -> Tensor:
    """x [B, H, T, D], laid out as [B, T, H, D]; a copy if it is not."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
