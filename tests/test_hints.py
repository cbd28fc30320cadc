"""Sizes that a graph finds out when it runs: Inductor is told what they are about."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from sparse_compile import Schedule, compilers, sparse_backend


class Net(nn.Module):
    """Rows of a norm between two layers, and the mean of those that a mask shows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64)

    def forward(self, x: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        h = self.down(self.norm(x + torch.tanh(self.up(x))))
        return (h * shown.unsqueeze(-1)).sum(1).square().mean()


def test_the_graph_says_about_how_many_rows_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    with_inductor = compilers.compile_fx

    def compile_fx(gm: object, inputs: object, **options: object) -> object:
        compiled = with_inductor(gm, inputs, **options)
        seen.append(dict(torch._guards.TracingContext.get().fake_mode.shape_env.var_to_hint_override))
        return compiled

    monkeypatch.setattr(compilers, "compile_fx", compile_fx)
    shown = (torch.arange(32) < 8).expand(4, -1)
    backend = sparse_backend(Schedule.exact(), debug=True)
    torch.compile(Net(), backend=backend)(torch.randn(4, 32, 64), shown).backward()
    assert [*seen[0].values()] == [4 * 32 // 2]


def test_what_inductor_is_told_is_forgotten_when_it_is_done() -> None:
    lowering = torch._inductor.graph.GraphLowering
    before = lowering.get_dep_size_hint
    with compilers.hints_are_heeded():
        pass
    assert lowering.get_dep_size_hint is before


def test_a_norm_of_few_rows_is_one_loop() -> None:
    """Its sums and what they are for are fused, as they are for all rows."""
    found = []
    for backend in ("inductor", sparse_backend(Schedule.exact(), debug=True)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = Net(), torch.randn(4, 32, 64)
        shown = (torch.arange(32) < 8).expand(4, -1)
        compiled = torch.compile(model, backend=backend)
        _, codes = run_and_get_code(compiled, x, shown)
        found.append(sum(len(re.findall(r"= async_compile\.\w+\(", code)) for code in codes))
    plain, ours = found
    assert ours <= plain + 3, "masks and their rows come on top"
