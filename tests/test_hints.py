"""Sizes that a graph finds out when it runs: Inductor is told what they are about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

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


def test_what_pytorch_2_11_does_not_heed_it_is_made_to_while_it_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocator: Any = torch._inductor.sizevars.SizeVarAllocator
    lowering = torch._inductor.graph.GraphLowering
    monkeypatch.delattr(allocator, "all_unbacked_explicitly_hinted", raising=False)
    monkeypatch.setattr(allocator, "symbolic_hint", lambda self, expr, **how: (expr, how), raising=False)
    before = allocator.symbolic_hint, lowering.get_dep_size_hint
    with compilers.hints_are_heeded():
        assert allocator.symbolic_hint(None, "u0") == ("u0", {"use_user_provided_hint_override": True})
        assert lowering.get_dep_size_hint is not before[1]
    assert (allocator.symbolic_hint, lowering.get_dep_size_hint) == before
