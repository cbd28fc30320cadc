"""Names of layers whose parameters have several, or are held by several variables of a frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_compile import Reuse, RotatedTopK, Sample, Schedule, SparseBackend, sparse_backend
from sparse_compile.naming import Owner, find_owner, without_common_end

# Dynamo asks this of every tensor that crosses a graph break.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Adapted(nn.Module):
    """As PEFT's DoRA: after a graph break local variables hold modules of containers, and none holds self."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 16)
        self.down, self.up = nn.ModuleDict({"x": nn.Linear(16, 8)}), nn.ModuleDict({"x": nn.Linear(8, 16)})

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.down["x"], self.up["x"]
        result = self.base(x)
        torch._dynamo.graph_break()
        return result + up(down(x))


class Half(nn.Module):
    """An encoder or a decoder, which begins with the embedding."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding, self.up, self.down = embedding, nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.embedding(ids) + memory)))


class TwoHalves(nn.Module):
    """They share their embedding, and are compiled each by itself."""

    def __init__(self, backend: SparseBackend) -> None:
        super().__init__()
        embedding = nn.Embedding(20, 16)
        self.shared, self.encoder, self.decoder = embedding, Half(embedding), Half(embedding)
        self.encoder.compile(backend=backend)
        self.decoder.compile(backend=backend)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(ids, self.encoder(ids, torch.zeros(16)))


class HeldTwice(nn.Module):
    """As PEFT's prompt tuning: the embedding of the body has a name at the top, too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Half(nn.Embedding(20, 16))
        self.embedding, self.head = self.body.embedding, nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(ids, self.embedding(ids)))


def make_backend(schedule: Schedule | None = None) -> SparseBackend:
    return sparse_backend(schedule or Schedule.exact(), compiler="aot_eager")


def names(backend: SparseBackend) -> list[str]:
    return [site.name for site in backend.report().sites]


def ids() -> Tensor:
    return torch.randint(20, (6, 8))


def test_modules_that_local_variables_hold() -> None:
    backend = make_backend(Schedule(linear=Sample(0.3), exclude="1"))
    model = nn.Sequential(Adapted(), Adapted())
    x = torch.randn(6, 8, 16)
    torch.compile(model, backend=backend)(x).square().sum().backward()
    assert names(backend) == [f"{layer}.{name}" for layer in (0, 1) for name in ("base", "down.x", "up.x")]
    assert [site.calls for site in backend.report().sites] == [1] * 6
    rewritten = [site.name for site in backend.report().sites if site.rewritten]
    assert rewritten == ["0.base", "0.down.x", "0.up.x"]


def test_halves_with_one_embedding_get_their_own_gradients() -> None:
    """The weights of the one are not taken for those of the other, though both graphs begin with it."""
    backend = make_backend(
        Schedule(weight_gradients=RotatedTopK(0.1, where="*coder.*"), exclude="decoder.down")
    )
    model = TwoHalves(backend)
    model(batch := ids()).square().sum().backward()
    layers = [f"{half}.{name}" for half in ("encoder", "decoder") for name in ("up", "down")]
    assert names(backend) == layers
    assert {site.name for site in backend.report().sites if not site.rewritten} == {"decoder.down"}
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.compiler.set_stance("force_eager"):
        model(batch).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=lambda said, name=name: f"{name}: {said}")


def test_module_that_is_held_twice() -> None:
    backend = make_backend(Schedule(linear=Reuse(0.5), exclude="body"))
    torch.compile(HeldTwice(), backend=backend)(ids()).square().sum().backward()
    assert names(backend) == ["body.up", "body.down", "head"]
    assert [site.name for site in backend.report().sites if site.rewritten] == ["head"]


class Scaled(nn.Module):
    """Its first parameter may be another one's, too."""

    def __init__(self, scale: nn.Parameter) -> None:
        super().__init__()
        self.scale, self.linear = scale, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale)


def test_layers_of_one_graph_that_share_its_first_parameter() -> None:
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager", debug=True)
    scale = nn.Parameter(torch.ones(16))
    model = nn.Sequential(*(Scaled(scale) for _ in range(3)))
    for layer in model:
        layer.compile(backend=backend)
    model(torch.randn(6, 8, 16, requires_grad=True)).sum().backward()
    assert [(site.name, site.calls) for site in backend.report().sites] == [
        (f"{i}.linear", 1) for i in range(3)
    ]
    assert len(backend.graphs) == 1


def test_linears_that_are_compiled_one_by_one() -> None:
    """Their frames have a weight, and no layer."""
    backend = make_backend(Schedule(linear=Reuse(0.5), exclude="2"))
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32))
    layers = [torch.compile(layer, backend=backend) for layer in model]
    wrapped = nn.Sequential(*layers)
    wrapped(torch.randn(64, 16)).square().sum().backward()
    assert names(backend) == ["0", "2"]
    assert [site.rewritten for site in backend.report().sites] == [True, False]


# The parts


def owner_of(root: nn.Module, named: dict[str, Tensor]) -> Owner:
    class Running(nn.Module):
        def forward(self) -> Owner:
            return find_owner([(parameter, name) for name, parameter in named.items()])

    running = Running()
    running.one, running.other = root, nn.Linear(2, 2)
    return running()


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"0.weight": "0.weight", "1.bias": "1.bias"}, {"": "one", "0": "one.0", "1.x": "one.1.x"}),
        ({"weight": "1.weight"}, {"": "one.1", "up": "one.1.up"}),
        ({"model.0.weight": "0.weight"}, {"model": "one", "model.1": "one.1", "head": "one.head"}),
        ({"a.weight": "0.weight", "b.weight": "1.weight"}, {"a": "one.0", "b.x": "one.1.x", "": "one"}),
        ({"w": "0.weight"}, {"w": "one.0.weight"}),
    ],
    ids=["whole", "a layer", "a variable", "two variables", "another name"],
)
def test_find_owner(named: dict[str, str], expected: dict[str, str]) -> None:
    root = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    parameters = dict(root.named_parameters())
    owner = owner_of(root, {name: parameters[full] for name, full in named.items()})
    assert {name: owner.full_name(name) for name in expected} == expected


def test_find_owner_of_parameters_that_nothing_has() -> None:
    found = owner_of(nn.Linear(2, 2), {"weight": torch.ones(2)})
    assert (found.moved, found.full_name("x.y"), found.path) == ((), "x.y", "")


def test_of_several_names_that_of_the_others_place_is_meant() -> None:
    """Of a tied weight; and where two places have the same names, each keeps its own."""
    root: Any = nn.Module()
    root.a, root.b = nn.Linear(2, 2), nn.Linear(2, 2)
    root.a.tied = root.b.tied = root.tied = nn.Linear(2, 2)
    named = {"tied.weight": root.tied.weight, "weight": root.b.weight, "bias": root.b.bias}
    assert owner_of(root, named).full_name("tied") == "one.b.tied"
    swapped = {"x.y.weight": root.a.weight, "z.y.weight": root.b.weight, "y.bias": root.b.bias}
    owner = owner_of(root, swapped)
    assert [owner.full_name(name) for name in ("x.y", "z.y", "y")] == ["one.a", "one.b", "one.b"]


def test_modules_of_one_frame_from_two_places() -> None:
    root: Any = nn.Module()
    root.a, root.b = nn.ModuleDict({"p": nn.Linear(2, 2)}), nn.ModuleDict({"q": nn.Linear(2, 2)})
    p, q = root.a["p"], root.b["q"]
    owner = owner_of(root, {"p.weight": p.weight, "p.bias": p.bias, "q.weight": q.weight})
    assert [owner.full_name(name) for name in ("p", "q")] == ["one.a.p", "one.b.q"]


def test_without_common_end() -> None:
    assert without_common_end("layers.0.a.weight", "layers.1.a.weight") == ("layers.0", "layers.1")
    assert without_common_end("a.weight", "model.a.weight") == ("", "model")
    assert without_common_end("a", "a") == ("", "")
