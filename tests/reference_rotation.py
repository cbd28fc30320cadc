"""SparseGrad in plain eager PyTorch, written from the formulas alone: it shares no line with sparse_compile.

    stack of G    every gradient [O, I] of the calibration, of all chosen weights of one shape
    U, V          left singular vectors of the stack unfolded to [O, I·m], and of it unfolded to [I, O·m]
    S             the upper left P × Q of Uᵀ · G · V, by the whole of U and V (that of the longer side is the
                  identity if only the short one is rotated)
    kept          the k entries of S that are largest; if the last quarter of the calibration has any steps,
                  those whose squares have the largest sum over it, and the stack is of the steps before
    W             (1 − lr · decay) · W + scale · U · D · Vᵀ, D what AdamW or SGD does to those k numbers

Nothing here is fast, and all of it float64.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import Tensor, nn


@dataclasses.dataclass
class Recipe:
    """As :class:`RotatedTopK` and the optimizer have it."""

    density: float
    steps: int
    candidates: float = 4.0
    sides: str = "short"
    every: int | None = None
    lr: float = 0.01
    decay: float = 0.0
    scale: float = 1.0
    momentum: float | None = None  # a number: SGD instead of AdamW


class Weight:
    """One chosen weight; ``transposed`` if the parameter is [I, O]."""

    def __init__(self, parameter: nn.Parameter, transposed: bool, recipe: Recipe) -> None:
        self.parameter = parameter
        self.transposed = transposed
        self.recipe = recipe
        self.kept: list[int] | None = None
        self.squares: list[float] = []
        self.chosen_at = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.numbers = nn.Parameter(torch.zeros(0))

    def oriented(self, tensor: Tensor) -> Tensor:
        return tensor.t() if self.transposed else tensor

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.oriented(self.parameter).shape
        return outputs, inputs

    def step(self, step: int, u: Tensor, v: Tensor) -> None:
        """One step once the bases are known; in the calibration, only take note of what is large."""
        recipe, (outputs, inputs) = self.recipe, self.shape
        k = max(1, round(recipe.density * outputs * inputs))
        wanted = recipe.candidates * k
        if recipe.sides == "both":
            p = min(outputs, math.ceil(outputs * math.sqrt(min(1.0, wanted / (outputs * inputs)))))
            q = min(inputs, math.ceil(wanted / p))
        elif inputs <= outputs:
            u, p, q = (
                torch.eye(outputs, dtype=torch.float64),
                outputs,
                min(inputs, math.ceil(wanted / outputs)),
            )
        else:
            v, p, q = torch.eye(inputs, dtype=torch.float64), min(outputs, math.ceil(wanted / inputs)), inputs
        rotated = u.t() @ self.oriented(self.parameter.grad) @ v
        flat = rotated[:p, :q].flatten().tolist()
        if step < recipe.steps:
            self.squares = [a + b * b for a, b in zip(self.squares or [0.0] * len(flat), flat, strict=True)]
            return
        if self.kept is None and self.squares:
            self.keep(sorted(range(len(flat)), key=lambda i: -self.squares[i])[:k], recipe.steps)
        if self.kept is None or (recipe.every and step - self.chosen_at >= recipe.every):
            self.keep(sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[:k], step)
        assert self.kept is not None
        self.numbers.data.zero_()
        self.numbers.grad = torch.tensor([flat[i] for i in self.kept], dtype=torch.float64)
        assert self.optimizer is not None
        self.optimizer.step()
        d = torch.zeros(outputs, inputs, dtype=torch.float64)
        for i, number in zip(self.kept, self.numbers.tolist(), strict=True):
            d[i // q, i % q] = number
        moved = recipe.scale * (u @ d @ v.t())
        weight = self.parameter.data
        weight.mul_(1 - recipe.lr * recipe.decay)
        weight.add_(moved.t() if self.transposed else moved)

    def keep(self, kept: list[int], step: int) -> None:
        self.kept, self.chosen_at = sorted(kept), step
        self.numbers = nn.Parameter(torch.zeros(len(kept), dtype=torch.float64))
        self.optimizer = optimizer_of([self.numbers], self.recipe)


def optimizer_of(parameters: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.momentum is not None:
        return torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.decay)


class Reference:
    """A copy of a model, trained as the formulas say.

    Args:
        chosen: names of the parameters, and whether each is [I, O].
    """

    def __init__(self, model: nn.Module, chosen: dict[str, bool], recipe: Recipe) -> None:
        self.model = copy.deepcopy(model)
        self.recipe = recipe
        named = dict(self.model.named_parameters())
        self.weights = [Weight(named[name], transposed, recipe) for name, transposed in chosen.items()]
        self.ordinary = optimizer_of([p for n, p in named.items() if n not in chosen], recipe)
        self.dense = optimizer_of([named[name] for name in chosen], recipe)
        self.stacks: dict[tuple[int, int], list[Tensor]] = {}
        self.bases: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.steps = 0

    def step(self) -> None:
        """An optimizer step, from the gradients of the model."""
        self.ordinary.step()
        first = self.recipe.steps - self.recipe.steps // 4
        if self.steps < first:
            for weight in self.weights:
                gradient = weight.oriented(weight.parameter.grad).clone()
                self.stacks.setdefault(weight.shape, []).append(gradient)
        else:
            for weight in self.weights:
                if weight.shape not in self.bases:
                    stack = self.stacks[weight.shape]
                    self.bases[weight.shape] = (
                        torch.linalg.svd(torch.cat(stack, dim=1)).U,
                        torch.linalg.svd(torch.cat([g.t() for g in stack], dim=1)).U,
                    )
                weight.step(self.steps, *self.bases[weight.shape])
        if self.steps < self.recipe.steps:
            self.dense.step()
        self.steps += 1
