"""Layers that are compiled once for all of them (`nested_compile_region`) are rewritten one by one; branches
and loops are not, and the report says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import nested_compile_region
from torch.utils.checkpoint import checkpoint
from training import backend_for

from sparse_compile import Report, Sample, Schedule

LAYERS, TOKENS, WIDTH = 3, 16, 64
LINEARS = {f"layers.{layer}.{name}" for layer in range(LAYERS) for name in ("a", "b")} | {"head"}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)

    def mlp(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class RegionOfALayer(Layer):
    @nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class WithACheckpoint(Layer):
    @nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.mlp, x, use_reentrant=False)


class WithARegion(Layer):
    """One within the other."""

    @nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + region(self.mlp, x)


class Branches(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + self.mlp(x), lambda x: x - self.mlp(x), (x,))


@nested_compile_region
def region(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


class Chain(nn.Module):
    """The loss of a head over layers, called by ``call``."""

    def __init__(self, layer: type[Layer], call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 20)
        self.call = call

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.call(layer, x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=-100)


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


FORMS: dict[str, tuple[type[Layer], Any]] = {
    "a method": (RegionOfALayer, plain),
    "a function": (Layer, region),
    "a checkpoint alone": (Layer, lambda layer, x: checkpoint(layer, x, use_reentrant=False)),
    "within a checkpoint": (Layer, lambda layer, x: checkpoint(region, layer, x, use_reentrant=False)),
    "around a checkpoint": (WithACheckpoint, plain),
    "around a region": (WithARegion, plain),
}


def run(schedule: Schedule, layer: type[Layer], call: Any) -> tuple[nn.Module, nn.Module, Report]:
    """The compiled model, and an eager copy, after a backward each. Half of the tokens have no label."""
    model = Chain(layer, call)
    eager = copy.deepcopy(model)
    x, labels = torch.randn(8, TOKENS, WIDTH), torch.randint(20, (8, TOKENS))
    labels[:, TOKENS // 2 :] = -100
    backend = backend_for(schedule)
    torch.compile(model, backend=backend, fullgraph=True)(x, labels).backward()
    eager(x, labels).backward()
    return model, eager, backend.report()


def assert_same(model: nn.Module, eager: nn.Module) -> None:
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_is_rewritten_under_its_own_name(form: str) -> None:
    model, eager, report = run(Schedule.exact(), *FORMS[form])
    assert_same(model, eager)
    assert {site.name for site in report.sites} == LINEARS
    assert all(site.rewritten and site.calls == 1 for site in report.sites)
    # As without regions: what comes after a token is not read by its loss.
    assert {site.rows_unneeded / site.rows for site in report.sites} == {0.5}


@pytest.mark.parametrize("form", FORMS)
def test_layers_are_blocks(form: str) -> None:
    """Samples are dropped at the end of each but the last, as without regions."""
    *_, without = run(Schedule(blocks=Sample(0.5)), Layer, plain)
    *_, report = run(Schedule(blocks=Sample(0.5)), *FORMS[form])
    blocks = [site.name for site in report.sites if site.kind == "block"]
    assert blocks == [site.name for site in without.sites if site.kind == "block"]
    assert len(blocks) >= LAYERS - 1


def test_branches_are_left_alone_with_the_reason() -> None:
    model, eager, report = run(Schedule.exact(), Branches, plain)
    assert_same(model, eager)
    sites = {site.name: site for site in report.sites}
    assert set(sites) == LINEARS
    assert [name for name, site in sites.items() if site.rewritten] == ["head"]
    reasons = {site.reason for name, site in sites.items() if name != "head"}
    assert reasons == {"it is called within the op cond, whose graph is not rewritten"}
