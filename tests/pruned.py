"""A transformer block in eager code whose backward reads pruned activations, written from the formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, HEADS = 32, 4


def largest(x: Tensor, ratio: float, center: bool = False) -> Tensor:
    """x with all but the largest entries of each of its samples (the first dimension) set to zero; with
    ``center`` the same of what x [..., T, I] differs by from its mean over T, which is added again. Rows
    that are less than half as large as the mean, or vary less than half as much over I, are not centered."""
    if center:
        mean = x.mean(-2, keepdim=True).expand_as(x).clone()
        for row, of_mean in zip(x.reshape(-1, x.shape[-1]), mean.view(-1, x.shape[-1]), strict=True):
            if 2 * row.norm() < of_mean.norm() or 2 * row.std() < of_mean.std():
                of_mean.zero_()
        return mean + largest(x - mean, ratio)
    kept = torch.zeros(len(x), x[0].numel(), dtype=x.dtype)
    for out, sample in zip(kept, x.reshape(len(x), -1), strict=True):
        k = max(1, round((1 - ratio) * len(sample)))
        chosen = sorted(range(len(sample)), key=lambda i: (-abs(float(sample[i])), i))[:k]
        out[chosen] = sample[chosen]
    return kept.view(x.shape)


def eight_bits(x: Tensor) -> Tensor:
    """x in 255 equal steps from minus to plus the largest magnitude of its row (the last dimension)."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        step = float(row.abs().max()) / 127
        rows.append(torch.tensor([round(float(entry) / step) * step for entry in row], dtype=x.dtype))
    return torch.stack(rows).view(x.shape)


class At(torch.autograd.Function):
    """f at its arguments in the forward, the gradient of f at others in the backward."""

    @staticmethod
    def forward(ctx: Any, f: Callable[..., Tensor], others: tuple[Tensor, ...], *values: Tensor) -> Tensor:
        ctx.f, ctx.others = f, others
        return f(*values)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            others = tuple(other.detach().requires_grad_() for other in ctx.others)
            return None, None, *torch.autograd.grad(ctx.f(*others), others, dy)


class PrunedNorm(torch.autograd.Function):
    """Layer norm whose backward reads a pruned input, and the mean and deviation of the whole one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, [x.shape[-1]], weight, bias, 1e-5)
        ctx.save_for_backward(other, mean, rstd, weight)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, mean, rstd, weight = ctx.saved_tensors
        normal = (x - mean) * rstd
        inner = dy * weight
        dx = inner - inner.mean(-1, keepdim=True) - normal * (inner * normal).mean(-1, keepdim=True)
        return dx * rstd, None, (dy * normal).sum((0, 1)), dy.sum((0, 1))


class Block(nn.Module):
    """Linear, norm, attention, norm, MLP, dropout: one of every kind of saved tensor.

    Args:
        attention: "fused", or "chain" for bmm, softmax, bmm.
        activation: of the MLP, "gelu", "silu" or "relu".
    """

    def __init__(self, attention: str = "chain", activation: str = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        self.attention, self.activation, self.dropout = attention, activation, dropout
        self.embed, self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(5))
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)
        self.first, self.second = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        n = self.first(h)
        q, k, v = (heads(linear(n)) for linear in (self.q, self.k, self.v))
        if self.attention == "fused":
            o = F.scaled_dot_product_attention(q, k, v)
        else:
            o = scores(q, k).softmax(-1) @ v
        h = h + self.o(merged(o))
        up = getattr(F, self.activation)(self.up(self.second(h)))
        return h + F.dropout(self.down(up), self.dropout, training=self.training)

    def pruned(self, x: Tensor, ratio: float, published: bool = True, center: bool = False) -> Tensor:
        """The same output, with the gradients of Back Razor, or of ours, with means or without."""

        def p(value: Tensor) -> Tensor:
            return largest(value.detach(), ratio, center)

        def norm(layer: nn.LayerNorm, value: Tensor) -> tuple[Tensor, Tensor]:
            """The result, and what stands for it in the gradient of a linear."""
            y = PrunedNorm.apply(value, p(value), layer.weight, layer.bias)
            if published:
                return y, p(y)
            whole = value.detach()
            deviation = (whole.var(-1, keepdim=True, correction=0) + layer.eps).sqrt()
            normal = (p(value) - whole.mean(-1, keepdim=True)) / deviation
            return y, (normal * layer.weight + layer.bias).detach()

        def linear(layer: nn.Linear, value: Tensor, other: Tensor) -> Tensor:
            parameters = (layer.weight, layer.bias)
            return at(F.linear, (other, *parameters), value, *parameters)

        h = self.embed(x)
        n, for_n = norm(self.first, h)
        flat_q, flat_k, flat_v = (linear(layer, n, for_n) for layer in (self.q, self.k, self.v))
        q, k, v = heads(flat_q), heads(flat_k), heads(flat_v)
        if self.attention == "fused" and published:
            o = at(chain, (p(q), p(k), p(v)), q, k, v)
        elif self.attention == "fused":
            o = at(
                chain, tuple(heads(eight_bits(flat.detach())) for flat in (flat_q, flat_k, flat_v)), q, k, v
            )
        else:
            # Which rows are small is seen to where the linears give them, all heads of a token at once.
            a = at(scores, (heads(p(flat_q)), heads(p(flat_k))), q, k)
            a = SoftmaxAt.apply(a, p(a.softmax(-1)))  # type: ignore[no-untyped-call]
            o = at(torch.matmul, (p(a), heads(p(flat_v))), a, v)
        flat = merged(o)
        h = h + linear(self.o, flat, merged(p(o)))
        n, for_n = norm(self.second, h)
        up = linear(self.up, n, for_n)
        f = getattr(F, self.activation)
        if self.activation == "relu":  # its sign is kept to the bit, its output is pruned
            up = f(up)
            other = p(up)
        else:
            rounded = eight_bits(up.detach())
            up, other = at(f, (rounded,), up), f(rounded)
        return h + F.dropout(linear(self.down, up, other), self.dropout, training=self.training)


class SoftmaxAt(torch.autograd.Function):
    """Softmax whose backward reads given probabilities."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(other)
        return s.softmax(-1)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> Any:  # type: ignore[override]
        (a,) = ctx.saved_tensors
        return a * (da - (a * da).sum(-1, keepdim=True)), None


def at(f: Callable[..., Tensor], others: tuple[Tensor, ...], *values: Tensor) -> Tensor:
    return At.apply(f, others, *values)  # type: ignore[no-any-return, no-untyped-call]


def heads(x: Tensor) -> Tensor:
    """[B, T, H] as [B, heads, T, H / heads]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merged(o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(HIDDEN // HEADS)


def chain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v
