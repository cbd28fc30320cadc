"""Sites are named by the path that a user sees in `model.named_modules()`, however the model was compiled."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from sparse_compile import Reuse, Schedule, SparseBackend, sparse_backend
from sparse_compile.naming import block_counts, block_of, class_name, clean, is_sharded, module_paths, unwrap
from sparse_compile.report import SiteReport

# Dynamo asks this of every tensor that crosses a graph break.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

HALVES = ["layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b"]


class Layer(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return torch.tanh(self.b(x))


class Net(nn.Module):
    """Layers of two linears each, with or without a graph break between the two."""

    def __init__(self, layers: int = 2, breaks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(breaks) for _ in range(layers))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Wrapper(nn.Module):
    """What DistributedDataParallel does to a path."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def make_backend(schedule: Schedule | None = None) -> SparseBackend:
    return sparse_backend(schedule or Schedule.exact(), compiler="aot_eager", debug=True)


def train(run: Any, steps: int = 1) -> None:
    for _ in range(steps):
        run(torch.ones(2, 5, 6)).sum().backward()


def names(backend: SparseBackend) -> list[str]:
    return [site.name for site in backend.report().sites]


def sites(backend: SparseBackend) -> dict[str, SiteReport]:
    return {site.name: site for site in backend.report().sites}


# Names


def test_graph_breaks_inside_each_layer() -> None:
    """One compiled graph serves both layers, and each has sites of its own."""
    backend = make_backend()
    model = Net(breaks=True)
    train(torch.compile(model, backend=backend), steps=2)
    assert set(HALVES) <= set(names(backend))
    assert len(backend.graphs) < len(HALVES)
    assert all(sites(backend)[name].rows == 2 * 10 for name in HALVES)


@pytest.mark.parametrize("breaks", [False, True])
def test_layers_that_are_compiled_one_by_one(breaks: bool) -> None:
    backend = make_backend()
    model = Net(breaks=breaks)
    for layer in model.layers:
        layer.compile(backend=backend)
    train(model, steps=2)
    assert set(HALVES) <= set(names(backend))
    assert all(sites(backend)[name].rows == 2 * 10 for name in HALVES)


def test_layers_that_are_replaced_by_compiled_ones() -> None:
    backend = make_backend()
    model = Net()
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend=backend)
    train(model)
    assert set(HALVES) <= set(names(backend))


@pytest.mark.parametrize("whole", [False, True])
def test_layers_in_checkpoint_wrappers(whole: bool) -> None:
    backend = make_backend()
    model = Net()
    for i, layer in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(layer)
        if not whole:
            model.layers[i].compile(backend=backend)
    train(torch.compile(model, backend=backend) if whole else model)
    assert names(backend) == [*HALVES, "head"]
    assert all(sites(backend)[name].rows == 10 for name in HALVES)


def test_part_of_a_model_that_is_not_compiled() -> None:
    backend = make_backend()
    model = nn.Sequential(nn.Linear(6, 6), torch.compile(Net(1), backend=backend))
    train(model)
    assert {"1.layers.0.a", "1.layers.0.b", "1.head"} <= set(names(backend))


@pytest.mark.parametrize("breaks", [False, True])
def test_function_that_closes_over_a_module(breaks: bool) -> None:
    backend = make_backend()
    model = Net(breaks=breaks)
    train(torch.compile(lambda x: model(x), backend=backend))
    assert set(HALVES) <= set(names(backend))


@pytest.mark.parametrize("breaks", [False, True])
def test_data_parallel_wrapper_outside(breaks: bool) -> None:
    backend = make_backend()
    train(Wrapper(torch.compile(Net(breaks=breaks), backend=backend)))
    assert set(HALVES) <= set(names(backend))


@pytest.mark.parametrize("breaks", [False, True])
def test_data_parallel_wrapper_inside(breaks: bool) -> None:
    backend = make_backend()
    train(torch.compile(Wrapper(Net(breaks=breaks)), backend=backend))
    assert set(HALVES) <= set(names(backend))


def test_checkpointed_layers() -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return self.head(x)

    backend = make_backend()
    train(torch.compile(Checkpointed(), backend=backend))
    assert names(backend) == [*HALVES, "head"]


@pytest.mark.parametrize("compiled_before", [True, False])
def test_copy_of_a_model_has_sites_of_its_own(compiled_before: bool) -> None:
    backend = make_backend()
    model = Net(1)
    if compiled_before:
        first = torch.compile(model, backend=backend)
        second = copy.deepcopy(first)
    else:
        first, second = (torch.compile(m, backend=backend) for m in (model, copy.deepcopy(model)))
    train(first, steps=2)
    train(second)
    own = ["layers.0.a", "layers.0.b", "head"]
    assert names(backend) == [*own, *(f"{name}@1" for name in own)]
    assert [site.rows for site in backend.report().sites] == [20] * 3 + [10] * 3


def test_two_modules_of_one_function_have_sites_of_their_own() -> None:
    backend = make_backend()
    one, other = Net(1), Net(1)
    train(torch.compile(lambda x: one(x) + other(x), backend=backend))
    assert len(names(backend)) == 6


def test_linear_that_runs_outside_any_graph_is_in_the_report() -> None:
    """After a graph break in a loop Dynamo runs the rest of the frame, and so the head, uncompiled."""
    backend = make_backend()
    model = Net(breaks=True)
    train(torch.compile(model, backend=backend))
    assert "head" in names(backend)
    assert not sites(backend)["head"].rewritten
    assert sites(backend)["head"].reason


def test_submodule_called_like_a_wrapper_keeps_its_name() -> None:
    model = nn.Sequential()
    model.module, model.other = nn.Linear(6, 6), nn.Linear(6, 6)
    backend = make_backend()
    train(torch.compile(model, backend=backend))
    assert names(backend) == ["module", "other"]


# Which sites a schedule is for


@pytest.fixture(params=["module", "breaks", "regional", "function"])
def compiled(request: pytest.FixtureRequest) -> Any:
    """Compile a model of three layers with a schedule, in each of the ways there are; (backend, run)."""

    def compile_(schedule: Schedule) -> tuple[SparseBackend, Any]:
        backend = make_backend(schedule)
        model = Net(3, breaks=request.param == "breaks")
        if request.param == "regional":
            for layer in model.layers:
                layer.compile(backend=backend)
            return backend, model
        if request.param == "function":
            return backend, torch.compile(lambda x: model(x), backend=backend)
        return backend, torch.compile(model, backend=backend)

    return compile_


def layers(backend: SparseBackend) -> Iterator[SiteReport]:
    yield from (site for site in backend.report().sites if site.name.startswith("layers"))


def test_excluded_site_is_left_alone(compiled: Any) -> None:
    backend, run = compiled(Schedule(linear=Reuse(0.5), exclude="layers.*.b"))
    train(run, steps=2)
    for site in layers(backend):
        excluded = site.name.endswith("b")
        assert (site.rewritten, site.method) == (not excluded, "dense" if excluded else "reuse")
        assert site.reason == ("matches the exclude pattern 'layers.*.b'" if excluded else "")


def test_site_that_is_not_included_is_left_alone(compiled: Any) -> None:
    backend, run = compiled(Schedule(linear=Reuse(0.5), include=["layers.1", "layers.2.a"]))
    train(run, steps=2)
    assert [site.name for site in layers(backend) if site.rewritten] == [
        "layers.1.a",
        "layers.1.b",
        "layers.2.a",
    ]
    reasons = {site.reason for site in layers(backend) if not site.rewritten}
    assert reasons == {"matches no include pattern ('layers.1', 'layers.2.a')"}


@pytest.mark.parametrize(("skip", "skipped"), [([0], 0), ([-1], 2), (1, 1)])
def test_skipped_layer_is_exact(compiled: Any, skip: Any, skipped: int) -> None:
    """Exact is not dense: zero rows are skipped there even so."""
    backend, run = compiled(Schedule(linear=Reuse(0.5), skip_layers=skip))
    train(run, steps=2)
    assert len(list(layers(backend))) == 6
    for site in layers(backend):
        held_back = site.name.startswith(f"layers.{skipped}.")
        assert site.rewritten
        assert (site.method, site.keep) == (("exact", 1.0) if held_back else ("reuse", 0.5))
        reason = f"block {skipped} of 3 is in skip_layers: only zero rows are skipped"
        assert site.reason == (reason if held_back else "")


def test_excluded_sites_gradient_is_dense() -> None:
    torch.manual_seed(0)
    model = Net(1)
    backend = make_backend(Schedule(linear=Reuse(0.9), exclude=["layers", "head"]))
    run = torch.compile(model, backend=backend)
    for _ in range(3):
        x = torch.randn(4, 5, 6)
        model.zero_grad()
        model(x).square().sum().backward()
        expected = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        run(x).square().sum().backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"exclude": "hed"},
            r"Schedule.exclude has the pattern 'hed', which matches none of \d+ module paths; .*'head'",
        ),
        (
            {"include": ["head", "layer.1"]},
            r"Schedule.include has the pattern 'layer.1', which matches none .*'layers.1'",
        ),
        ({"skip_layers": 3}, r"Schedule.skip_layers is 3; allowed is an int in \[-3, 3\) for 3 blocks"),
        (
            {"skip_layers": [0, -4]},
            r"Schedule.skip_layers is -4; allowed is an int in \[-3, 3\) for 3 blocks",
        ),
    ],
    ids=["exclude", "include", "skip_layers", "negative skip_layers"],
)
def test_schedule_that_does_not_fit_the_model_is_refused(compiled: Any, options: Any, message: str) -> None:
    _, run = compiled(Schedule(linear=Reuse(0.5), **options))
    with pytest.raises(ValueError, match=message):
        train(run)


# The parts


@pytest.mark.parametrize(
    ("path", "cleaned"),
    [
        ("layers.0.a", "layers.0.a"),
        ("_orig_mod.layers.0.a", "layers.0.a"),
        ("layers.0._checkpoint_wrapped_module.a.weight", "layers.0.a.weight"),
        ("_fsdp_wrapped_module.head", "head"),
        ("", ""),
    ],
)
def test_clean(path: str, cleaned: str) -> None:
    assert clean(path) == cleaned


def test_unwrap() -> None:
    model = Net(1)
    assert unwrap(model) is model
    assert unwrap(Wrapper(torch.compile(Wrapper(model), backend="eager"))) is model


def test_module_paths_are_those_that_a_pattern_may_match() -> None:
    paths = module_paths(nn.MultiheadAttention(4, 2))
    assert {"out_proj", "in_proj_weight"} <= set(paths)
    assert "" not in paths


@pytest.mark.parametrize(
    ("path", "block"),
    [("layers.1.a", (1, 2)), ("head", None), ("layers.1.experts.7.a", (1, 2)), ("other.4.a", (4, 5))],
)
def test_block_of(path: str, block: tuple[int, int] | None) -> None:
    """The outermost number counts; a module that the model does not have stands for its siblings up to it."""
    assert block_of(path, Net(2)) == block


def test_block_of_without_the_model() -> None:
    seen = ["enc.0.a", "enc.3.a", "dec.7.a"]
    assert block_of("enc.0.a", None, seen) == (0, 4)
    assert block_of("dec.7.a", None, seen) == (7, 8)


def test_block_counts_are_of_the_outermost_lists() -> None:
    model = nn.ModuleDict({"enc": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))})
    model["dec"] = nn.ModuleList(Layer(False) for _ in range(5))
    assert sorted(block_counts(model)) == [3, 5]


def test_names_are_in_the_printed_report() -> None:
    backend = make_backend()
    train(torch.compile(Net(2), backend=backend))
    for name in names(backend):
        assert re.search(rf"^\s*{re.escape(name)}\s", str(backend.report()), re.MULTILINE)


def test_class_that_fsdp2_has_put_before_the_users_own() -> None:
    sharded = type("FSDPLayer", (FSDPModule, Layer), {})
    assert [class_name(kind) for kind in (Layer, sharded, "net.Layer")] == ["Layer"] * 3
    model = Net()
    assert not is_sharded(model)
    model.layers[1].__class__ = sharded
    assert is_sharded(model)
