"""ReSprop for linear layers as eager code: what users of the published systems have today.

Written from the formula (element granularity, base of one random sample). With output gradient dY
`[B, T, O]`, base P `[T, O]` = dY of one random sample of the previous backward, and R = dY − P broadcast over
the batch:

    S  = R where |R| is among the largest (1 − ratio) share of the whole tensor, else 0
    dX = S·W + P·W        dW = Sᵀ·X + Pᵀ·Σ_b X_b        db = Σ dY

S is mostly zeros but stored densely, as general matmuls want it: so nothing is saved, and finding the
threshold (a global `kthvalue`) and applying it come on top. At ratio 0 the gradient is the dense one up to
rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BaseGradient:
    """The base of one layer: remembers dY of one random sample until the next backward."""

    def __init__(self, seed: int) -> None:
        self.value: Tensor | None = None
        self._generator = torch.Generator().manual_seed(seed)

    def fits(self, grad_output: Tensor) -> bool:
        """Whether there is a base, and for this many tokens: otherwise the step is dense."""
        return self.value is not None and self.value.shape == grad_output.shape[1:]

    def renew(self, grad_output: Tensor) -> None:
        """Take dY `[B, T, O]` of one random sample as the next base."""
        sample = int(torch.randint(grad_output.shape[0], (1,), generator=self._generator))
        self.value = grad_output[sample].clone()


def largest_entries(values: Tensor, ratio: float) -> Tensor:
    """`values` with all but the (1 − ratio) share of largest magnitude set to zero (ties are kept)."""
    keep = max(1, round((1.0 - ratio) * values.numel()))
    if keep >= values.numel():
        return values
    magnitudes = values.abs()
    threshold = magnitudes.flatten().kthvalue(values.numel() - keep + 1).values
    return torch.where(magnitudes >= threshold, values, 0.0)


class ReSpropFunction(torch.autograd.Function):
    """y = x·Wᵀ + b, whose backward is the formula above; `x` is `[B, T, I]`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ratio: float, base: BaseGradient
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.ratio, ctx.base = bias is not None, ratio, base
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        (grad_output,) = grad_outputs
        x, weight = ctx.saved_tensors
        base, wants_x = ctx.base, ctx.needs_input_grad[0]
        reuses = base.fits(grad_output)
        kept = largest_entries(grad_output - base.value, ctx.ratio) if reuses else grad_output
        grad_x = kept @ weight if wants_x else None
        grad_weight = kept.flatten(0, 1).t() @ x.flatten(0, 1)
        if reuses:
            grad_weight += base.value.t() @ x.sum(dim=0)
        if reuses and wants_x:
            grad_x += base.value @ weight
        grad_bias = grad_output.sum(dim=(0, 1)) if ctx.has_bias else None
        base.renew(grad_output)
        return grad_x, grad_weight, grad_bias, None, None


class ReSpropLinear(nn.Module):
    """An `nn.Linear` with the same parameters, trained by `ReSpropFunction`."""

    def __init__(self, linear: nn.Linear, ratio: float, seed: int) -> None:
        super().__init__()
        self.weight, self.bias, self.ratio = linear.weight, linear.bias, ratio
        self.base = BaseGradient(seed)

    def forward(self, x: Tensor) -> Tensor:
        """Leading dimensions after the first are the tokens; a 2-D input has one token per sample."""
        batched = x.reshape(x.shape[0], -1, x.shape[-1])
        y = ReSpropFunction.apply(batched, self.weight, self.bias, self.ratio, self.base)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def swap_linears(model: nn.Module, ratio: float, seed: int = 0) -> int:
    """Replace every `nn.Linear` in `model` by a `ReSpropLinear`, in place; returns how many there were.

    Subclasses and look-alikes (such as GPT-2's Conv1D) stay dense, as they do in the published code.
    """
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"ratio={ratio}: allowed is 0 <= ratio < 1")
    swapped = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, ReSpropLinear(child, ratio, seed + swapped))
                swapped += 1
    return swapped
