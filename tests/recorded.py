"""Backwards for a controller to look at, drawn at random, and their gradients item by item."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from reference_vcas import ToyBlock
from torch import nn

from sparse_compile.controller import Controller
from sparse_compile.methods import sample

F64 = torch.float64
BATCH, TOKENS = 16, 3
BLOCKS = ["layer.0", "layer.1", "layer.2"]
WEIGHTS = [f"{block}.{name}" for block in BLOCKS for name in ("up", "down")]


class Recorded:
    """What the backward of one step would show, in the order of a backward, drawn at random.

    Attributes:
        head: (dY, X) of a linear behind the last block.
        norms: of the samples behind each block.
        linears: (dY, X) of each weight, [N, O] and [N, I].
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        scale = self._normal(BATCH, 1, 1).exp()
        self.head = self._linear(scale)
        self.norms = {block: scale.flatten() * self._normal(BATCH).mul(0.3).exp() for block in BLOCKS}
        self.linears = {name: self._linear(scale) for name in WEIGHTS}

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=F64)

    def _linear(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        common = 0.5 * self._normal(1, TOKENS, 4)
        dy = (common + self._normal(BATCH, TOKENS, 4)) * scale * self._normal(BATCH, TOKENS, 1).exp()
        dy[:, -1] = 0  # padding
        return dy.flatten(0, 1), self._normal(BATCH * TOKENS, 5)

    def draw(self, block: str) -> sample.Draw:
        return sample.Draw(f"{self.seed} {block}")

    def show(self, controller: Controller) -> None:
        observe(controller, "head", *self.head)
        for block in reversed(BLOCKS):
            controller.observe_samples(block, self.norms[block], self.draw(block))
            for name in reversed(WEIGHTS):
                if name.startswith(block):
                    observe(controller, name, *self.linears[name])


class OfTraining(Recorded):
    """The same of a step in which a model was trained: attributes as above, filled by hooks."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.norms, self.linears = {}, {}


def training(steps: int) -> Iterator[OfTraining]:
    """Three blocks and a head learn the mean of a sample's tokens, the last of which is padding. Some samples
    matter more than others."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layers = [ToyBlock() for _ in BLOCKS]
    model = nn.Sequential(*layers, nn.Linear(6, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    named = {
        f"layer.{i}.{name}": getattr(layer, name) for i, layer in enumerate(layers) for name in ("up", "down")
    }
    inputs: dict[str, torch.Tensor] = {}
    seen = OfTraining(0)

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _, x, __: inputs.update({name: x[0].detach().flatten(0, 1)}))
        module.register_full_backward_hook(
            lambda _, __, dy: seen.linears.update({name: (dy[0].flatten(0, 1), inputs[name])})
        )

    for name, module in {**named, "head": model[-1]}.items():
        watch(name, module)
    for name, layer in zip(BLOCKS, layers, strict=True):
        layer.register_full_backward_hook(
            lambda _, __, dy, name=name: seen.norms.update({name: dy[0].flatten(1).norm(dim=1)})
        )
    for step in range(steps):
        seen = OfTraining(step)
        x = torch.randn(BATCH, TOKENS, 6, generator=generator, dtype=F64).requires_grad_()
        scale = torch.randn(BATCH, 1, 1, generator=generator, dtype=F64).exp()
        error = model(x)[:, :-1] - x.detach()[:, :-1, :4].mean(1, keepdim=True)
        optimizer.zero_grad()
        (scale * error).square().mean().backward()
        optimizer.step()
        seen.head = seen.linears.pop("head")
        yield seen


def observe(controller: Controller, name: str, dy: torch.Tensor, x: torch.Tensor) -> None:
    controller.observe_rows(name, dy, x, dy.t() @ x, TOKENS)


def per_item(dy: torch.Tensor, x: torch.Tensor, rows_each: int) -> list[torch.Tensor]:
    """The gradient of every item of some rows each, by outer products."""
    outer = [torch.outer(dy[i], x[i]) for i in range(len(dy))]
    return [sum(outer[i : i + rows_each]) for i in range(0, len(dy), rows_each)]


def count(share: float, total: int) -> int:
    return max(1, math.floor(share * total + 0.5))
