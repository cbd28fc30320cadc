"""For the tests of carried rows: a small padded model, and the comparison with carrying all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tracing import DOUBLE, Tracer

from sparse_compile.linear_site import LinearSite

ops = torch.ops.sparse_compile
INDUCTORS = functools.cache(lambda: torch._inductor.decomposition.select_decomp_table())

B, T, WIDTH = 4, 16, 8
LENGTHS = (5, 16, 1, 9)


def gradients(model: nn.Module, run: Callable[..., Tensor], *args: Any, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(2)
    loss = run(*args, **inputs)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 100 roundings of each gradient's largest entry, or to one of the largest of all: some are zero but
    for rounding, as the biases of keys."""
    assert found.keys() == expected.keys()
    eps = torch.finfo(DOUBLE).eps
    noise = eps * max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        error = (found[name] - value).abs().max().item()
        assert error <= 100 * eps * value.abs().max().item() + noise, name


def counts(tracer: Tracer) -> tuple[int, int]:
    """Of how many linears the rows are carried, and how many are rewritten."""
    found = tracer.trace.graph.find_nodes(op="call_function", target=ops.linear_backward.default)
    carried = [len(op.args) > 9 for op in found]
    assert [tracer.trace.records[op.args[4]].carried for op in found] == carried
    return sum(carried), len(carried)


def masks_of_forwards(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Grows with every forward of a linear that leaves rows out: which of them are needed."""
    masks: list[Tensor] = []
    whole = LinearSite.linear_forward

    def watch(self: LinearSite, x: Tensor, w: Tensor, bias: Any, needed: Tensor, **options: Any) -> Any:
        masks.append(needed)
        return whole(self, x, w, bias, needed, **options)

    monkeypatch.setattr(LinearSite, "linear_forward", watch)
    return masks


class Padded(nn.Module):
    """Two layers with all that is between them in a transformer but attention; a mean of the shown tokens."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH), nn.Linear(WIDTH, 3)
        self.norm, self.dropout, self.between = nn.LayerNorm(WIDTH), nn.Dropout(dropout), between
        self.double()

    def body(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.down(self.between(self.up(x)))))

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        h = self.body(self.body(x))
        return self.head((h * shown.unsqueeze(-1)).sum(1)).square().mean()


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    shown = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)
    return torch.randn(len(lengths), T, WIDTH, dtype=DOUBLE), shown


def compile_and_compare(model: nn.Module, *inputs: Any, decomposed: bool = False, **options: Any) -> Tracer:
    tracer = Tracer(INDUCTORS() if decomposed else None, compact=True)
    compiled = torch.compile(model, backend=tracer, fullgraph=True, **options)
    assert_equal(gradients(model, compiled, *inputs), gradients(model, model, *inputs))
    return tracer
