"""What is too small to gain anything, or has too few rows, is never approximated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparse_compile import Reuse, Schedule, SparseBackend, sparse_backend
from sparse_compile.report import SiteReport


def make_backend(schedule: Schedule) -> SparseBackend:
    return sparse_backend(schedule, compiler="aot_eager", debug=True)


def sites(backend: SparseBackend) -> dict[str, SiteReport]:
    return {site.name: site for site in backend.report().sites}


class Classifier(nn.Module):
    """A body that runs on 512 tokens, and a head that reads one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[:, 0])


def test_layer_of_negligible_cost_is_never_approximated() -> None:
    backend = make_backend(Schedule(linear=Reuse(0.5)))
    model = Classifier()
    run = torch.compile(model, backend=backend)
    for _ in range(2):
        run(torch.randn(2, 512, 64)).sum().backward()
    report = sites(backend)
    assert report["body"].method == "reuse"
    assert (report["head"].method, report["head"].rewritten) == ("exact", True)
    assert "under 1% of the FLOPs of a mean site" in report["head"].reason


class Pooled(nn.Module):
    """Layers of all tokens, then a pooler and a head of one row a sample, in graphs of their own."""

    def __init__(self, layers: int, tokens: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
        self.pooler, self.head, self.tokens = nn.Linear(16, 16), nn.Linear(16, 2), tokens

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        torch._dynamo.graph_break()
        return self.head(torch.tanh(self.pooler(x[:, 0])))


@pytest.mark.parametrize(("tokens", "layers", "exact"), [(512, 4, True), (4, 4, False)])
def test_a_pooler_in_a_graph_of_its_own_is_never_approximated(tokens: int, layers: int, exact: bool) -> None:
    """DDP gives the last layers one: there the pooler is nearly all of the FLOPs. With few tokens it is no
    small part of the model."""
    backend = make_backend(Schedule(linear=Reuse(0.5)))
    run = torch.compile(Pooled(layers, tokens), backend=backend)
    for _ in range(2):
        run(torch.randn(4, tokens, 16)).sum().backward()
    report = sites(backend)
    assert len(backend.graphs) == 2
    assert report["layers.0"].method == "reuse"
    assert (report["pooler"].method == "exact") is exact


def test_a_projection_that_is_a_small_share_of_a_deep_model_is_approximated() -> None:
    """As the keys' and values' of a large one: all of them together are no small share."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 64)) for _ in range(2)))
    model.append(nn.Sequential(*(nn.Linear(64, 64) for _ in range(50))))
    backend = make_backend(Schedule(linear=Reuse(0.5)))
    run = torch.compile(model, backend=backend)
    for _ in range(2):
        run(torch.randn(4, 8, 64)).sum().backward()
    report = backend.report()
    small = next(site for site in report.sites if site.name == "0.0")
    assert small.flops_backward_dense < 0.002 * report.totals["flops_backward_dense"]
    assert small.method == "reuse"
