"""Reuse in plain eager PyTorch, written from DESIGN 3.1 alone: it shares no line with sparse_compile.

    P [T, O]    dY of an earlier backward: of one sample, or the mean over the batch
    R = dY − P  P repeated for every sample
    S           the largest part of R
    dX = S · W + P · W,    dW = Sᵀ · X + Pᵀ · Σ_b X_b,    db = Σ dY

A row of dY that is zero has the gradient zero: neither S nor P is added there. The first backward, and one
with another number of tokens, is dense; so is one with another number of samples, by more than a quarter, and
the first of these leaves the base as it is. Loops where they read like the formula; nothing here is fast.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass
class Recipe:
    """How much is reused; shared by all the layers of a model, and changed by the test between steps.

    Attributes:
        ratio: the share that is dropped, or (n, m) with the granularity "n:m"; 0.0 is dense.
        granularity: "row", "element" or "n:m".
        refresh_every: the base is renewed at every backward that is a multiple of it.
        sample: which sample becomes the base, or None for the mean of all.
    """

    ratio: float | tuple[int, int] = 0.0
    granularity: str = "row"
    refresh_every: int = 1
    sample: int | None = None


@dataclasses.dataclass
class Memory:
    """P, for how many backwards it has been used, how many samples it is of, and whether the last backward
    was of another number of them."""

    base: Tensor | None = None
    age: int = 0
    samples: int = 0
    skipped: bool = False


def largest(values: list[float], count: int) -> set[int]:
    """The positions of the ``count`` largest values."""
    return set(sorted(range(len(values)), key=lambda i: -values[i])[:count])


def sparse_residual(residual: Tensor, zero: list[bool], recipe: Recipe, contracted: int) -> Tensor:
    """S: the largest part of R [N, O], the rest set to zero.

    Args:
        zero: which rows of dY are zero; nothing of them is kept.
        contracted: for n:m, the dimension in which neighbours are grouped: 1 for dX, 0 for dW.
    """
    residual = residual.clone()
    residual[torch.tensor(zero)] = 0.0
    kept = torch.zeros(residual.shape, dtype=torch.bool)
    rows, columns = residual.shape
    if recipe.granularity == "row":
        norms = [-1.0 if zero[i] else float(residual[i].norm()) for i in range(rows)]
        for i in largest(norms, round((1 - recipe.ratio) * rows)):
            kept[i] = True
    elif recipe.granularity == "element":
        chosen = largest(residual.abs().flatten().tolist(), round((1 - recipe.ratio) * rows * columns))
        kept.view(-1)[list(chosen)] = True
    else:
        n, m = recipe.ratio
        lines, mask = (residual, kept) if contracted == 1 else (residual.t(), kept.t())
        for i in range(lines.shape[0]):
            for start in range(0, lines.shape[1], m):
                group = lines[i, start : start + m].abs().tolist()
                for j in largest(group, n):
                    mask[i, start + j] = True
    return torch.where(kept, residual, torch.zeros_like(residual))


def gradients(dy: Tensor, x: Tensor, w: Tensor, base: Tensor | None, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(dX, dW) of one linear: dY [N, O], X [N, I], W [O, I], P [T, O] or None for a dense backward."""
    if base is None or recipe.ratio == 0.0:
        return dy @ w, dy.t() @ x
    tiled = torch.cat([base] * (len(dy) // len(base)))
    zero = [not bool(row.ne(0).any()) for row in dy]
    share_of_base = tiled.clone()
    share_of_base[torch.tensor(zero)] = 0.0
    for_dx, for_dw = (sparse_residual(dy - tiled, zero, recipe, contracted) for contracted in (1, 0))
    return for_dx @ w + share_of_base @ w, for_dw.t() @ x + share_of_base.t() @ x


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, memory, recipe):
        ctx.save_for_backward(x, w)
        ctx.memory, ctx.recipe, ctx.has_bias = memory, recipe, b is not None
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        memory, recipe = ctx.memory, ctx.recipe
        tokens = x[0, ..., 0].numel()  # of one sample; 1 where the input is [B, I]
        flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        samples = len(flat_dy) // tokens
        base = memory.base if memory.base is not None and len(memory.base) == tokens else None
        fits = 0.75 <= samples / max(memory.samples, 1) <= 1.25
        skip = base is not None and not fits and not memory.skipped
        if not fits:
            base = None
        memory.skipped = skip
        dx, dw = gradients(flat_dy, flat_x, w, base, recipe)
        if recipe.ratio != 0.0 and not skip:
            memory.age = memory.age + 1 if base is not None else 0
            if base is None or memory.age >= recipe.refresh_every:
                per_sample = flat_dy.reshape(-1, tokens, flat_dy.shape[1])
                memory.base = per_sample.mean(0) if recipe.sample is None else per_sample[recipe.sample]
                memory.age, memory.samples = 0, samples
        elif not skip:  # what comes after it has no base of the step before
            memory.base = None
        return dx.reshape(x.shape), dw, flat_dy.sum(0) if ctx.has_bias else None, None, None


class ReferenceLinear(nn.Module):
    """A linear whose backward reuses. ``lane`` is set by a test that runs a model twice per backward."""

    def __init__(self, linear: nn.Linear, recipe: Recipe) -> None:
        super().__init__()
        self.weight, self.bias, self.recipe = linear.weight, linear.bias, recipe
        self.lane = 0
        self.memories: defaultdict[int, Memory] = defaultdict(Memory)

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.bias, self.memories[self.lane], self.recipe)

    def forget(self) -> None:
        self.memories.clear()


def reference_of(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy of a model with every linear replaced by a :class:`ReferenceLinear`."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, ReferenceLinear(child, recipe))
        assert not isinstance(module, nn.Linear) or path, "wrap a bare linear in a Sequential"
    return model


def reference_linears(model: nn.Module) -> list[ReferenceLinear]:
    return [module for module in model.modules() if isinstance(module, ReferenceLinear)]


class MLP(nn.Module):
    """Three linears, the last without a bias; works on [B, 6] and on [B, T, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 9)
        self.head = nn.Linear(9, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Block(nn.Module):
    """A small transformer block, [B, T, 8] to [B, T, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.query, self.value, self.out = (nn.Linear(8, 8) for _ in range(3))
        self.key = nn.Linear(8, 8, bias=False)  # softmax ignores it: its gradient would be pure rounding
        self.up, self.down = nn.Linear(8, 14), nn.Linear(14, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        scores = self.query(h) @ self.key(h).transpose(1, 2)
        x = x + self.out(torch.softmax(scores, -1) @ self.value(h))
        return x + self.down(F.gelu(self.up(x)))


class Transformer(nn.Module):
    """A block between two linears; [B, T, 6] to [B, T, 5].

    The norm before the head matters here: rows that reuse drops all get the same dX, and without it the
    layer below would have to choose among rows of equal norm, which it may do as it likes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([Block()])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def square_loss(out: Tensor) -> Tensor:
    """A loss whose gradient differs in every entry."""
    return ((out - 1.0) ** 2).mean()


def dense_gradients(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = square_loss
) -> list[Tensor]:
    """The true gradient of every parameter, by plain eager autograd; nothing else is touched."""
    return list(torch.autograd.grad(loss(model(x)), list(model.parameters())))


def grads_of(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None for grad in found)
    return [grad.clone() for grad in found if grad is not None]


def same(actual: list[Tensor], expected: list[Tensor], rtol: float = 1e-9) -> bool:
    """Whether all gradients agree to rounding (of float64, unless told)."""
    return all(
        a.shape == e.shape and float((a - e).norm()) <= rtol * float(e.norm()) + 1e-14
        for a, e in zip(actual, expected, strict=True)
    )


def assert_same_gradients(
    model: nn.Module, expected: nn.Module | list[Tensor], step: object, rtol: float = 1e-9
) -> None:
    """Every parameter's gradient, by name."""
    if isinstance(expected, nn.Module):
        expected = grads_of(expected)
    for (name, parameter), wanted in zip(model.named_parameters(), expected, strict=True):
        assert parameter.grad is not None, f"step {step}: {name} has no gradient"
        error = float((parameter.grad - wanted).norm() / (wanted.norm() + 1e-30))
        assert error <= rtol, f"step {step}: the gradient of {name} is off by {error:.2e}"
