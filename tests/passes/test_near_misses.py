"""What looks like a linear and is none, or none that we know: left alone, with the reason on record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparse_compile.passes.linear import NoMatch, match_linear
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Node
from tracing import DOUBLE, Model, Tracer, layer, trace, value

aten = torch.ops.aten

ACTIVATIONS = "both operands are activations"
PARAMETERS = "both operands are parameters"
LEFT_OPERAND = "the weight is the left operand"
BATCH = "a batched product"


class Attend(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y


@pytest.mark.parametrize("decompositions", [None, select_decomp_table()], ids=["as traced", "decomposed"])
@pytest.mark.parametrize(
    ("model", "inputs", "kind", "name", "reason"),
    [
        (Model(lambda m, x, y: m.a(x, y), a=Attend()), [(5, 6), (6, 4)], "matmul", "a", ACTIVATIONS),
        (Model(lambda m, x, y: m.a(x, y), a=Attend()), [(3, 5, 6), (3, 6, 4)], "matmul", "a", ACTIVATIONS),
        (Model(lambda m, x: m.w @ x, w=value(4, 6)), [(6, 5)], "linear", "w", LEFT_OPERAND),
        (
            Model(lambda m, x: (m.a @ m.b) * x, a=value(4, 6), b=value(6, 5)),
            [(4, 5)],
            "matmul",
            "b",
            PARAMETERS,
        ),
        (
            Model(lambda m, x: torch.einsum("bthi,hio->btho", x, m.w), w=value(3, 6, 4)),
            [(2, 5, 3, 6)],
            "linear",
            "w",
            BATCH,
        ),
        (
            Model(lambda m, x: torch.bmm(x, m.experts), experts=value(3, 6, 4)),
            [(3, 5, 6)],
            "linear",
            "experts",
            BATCH,
        ),
        (
            Model(lambda m, x: torch.einsum("bti,io->bto", x, m.w), w=value(6, 4)),
            [(2, 5, 6)],
            "linear",
            "w",
            BATCH,
        ),
        (
            Model(lambda m, x: F.linear(torch.complex(x, x), torch.complex(m.w, m.w)).abs(), w=value(4, 6)),
            [(5, 6)],
            "linear",
            "w",
            "dtype torch.complex128 is not supported",
        ),
    ],
    ids=[
        "two activations",
        "two batches of activations",
        "weight on the left",
        "two parameters",
        "one matrix per head",
        "one matrix per expert",
        "einsum with one matrix",
        "complex",
    ],
)
def test_near_miss(
    model: nn.Module, inputs: list[tuple[int, ...]], kind: str, name: str, reason: str, decompositions: Any
) -> None:
    """Nothing is inserted, the products stay, and the gradients are the uncompiled model's."""
    found = trace(model, *(value(*shape) for shape in inputs), decompositions=decompositions)
    assert [(r.kind, r.name, r.reason) for r in found.records] == [(kind, name, reason)]
    assert found.ops == []
    assert found.backward_products == found.products_before > 0


def test_integer_product() -> None:
    model = Model(lambda m, x, ids: m.lin(x) + F.linear(ids, m.codes), lin=layer())
    model.register_buffer("codes", torch.randint(9, (4, 6)))
    found = trace(model, value(5, 6), torch.randint(9, (5, 6)))
    assert [linear.name for linear in found.linears] == ["lin"]
    assert found.left_alone == {"": ACTIVATIONS}


def test_merged_adapter_is_a_linear_and_the_product_of_its_factors_is_none() -> None:
    model = Model(lambda m, x: m.part(x), part=Model(_merged, w=value(4, 6), a=value(2, 6), b=value(4, 2)))
    found = trace(model, value(5, 6))
    assert [(r.kind, r.name, r.rewritten, r.reason) for r in found.records] == [
        ("matmul", "part.a", False, PARAMETERS),
        ("linear", "part", True, ""),
    ]
    assert len(found.ops) == 1
    assert found.backward_products == 2  # of the factors


def _merged(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w + m.b @ m.a)


def test_linear_without_a_gradient() -> None:
    model = Model(lambda m, x: m.b(m.a(x)), a=layer(), b=layer(4, 3))
    model.a.requires_grad_(False)
    found = trace(model, value(5, 6, grad=False))
    assert [linear.name for linear in found.linears] == ["b"]
    assert found.left_alone == {"a": "no gradient flows through it"}


@pytest.mark.parametrize("first", ["student", "teacher"])
def test_linear_under_no_grad(first: str) -> None:
    """Also where it follows a linear with a gradient, whose sequence number autograd gives it, too."""

    def forward(m: Any, x: Tensor) -> Tensor:
        student = m.student(x) if first == "student" else 0
        with torch.no_grad():
            target = m.teacher(x)
        return (m.student(x) if first == "teacher" else student) - target

    found = trace(Model(forward, teacher=layer(), student=layer()), value(5, 6))
    assert [linear.name for linear in found.linears] == ["student"]
    assert found.left_alone == {"teacher": "no gradient flows through it"}


def test_inference_graph_is_not_touched() -> None:
    model = Model(lambda m, x: m.lin(x), lin=layer())
    tracer = Tracer()
    with torch.no_grad():
        torch.compile(model, backend=tracer)(value(5, 6))
    assert tracer.traces == []
    (graph,) = tracer.inference_graphs
    before = str(graph)
    assert tracer.rewrite(graph) == ([], [])
    assert str(graph) == before


# Backwards that AOTAutograd does not write today, built by hand.


class Hand:
    """A joint graph of one product y = x · wᵗ, x [5, 6] and w [4, 6], and the backward a test gives it."""

    def __init__(self, dtype: torch.dtype = DOUBLE) -> None:
        self.graph = Graph()
        self.dtype = dtype
        self.x, self.w = self.input("x", 5, 6), self.input("w", 4, 6)
        self.dy, self.other = self.input("dy", 5, 4), self.input("other", 5, 4)
        self.forward = self.call(aten.mm.default, self.x, self.t(self.w))

    def input(self, name: str, *shape: int) -> Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(*shape, dtype=self.dtype, device="meta")
        return node

    def call(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
        if target is aten.mm.default:  # operands are on CPU as far as the match can tell
            node.meta["val"] = torch.empty_like(node.meta["val"], device="cpu")
        return node

    def t(self, node: Node) -> Node:
        return self.call(aten.permute.default, node, [1, 0])

    def mm(self, a: Node, b: Node) -> Node:
        return self.call(aten.mm.default, a, b)

    def match(self, *backward: Node) -> Any:
        return match_linear(self.forward, list(backward), {self.w: frozenset("w"), **self._casts()})

    def _casts(self) -> dict[Node, frozenset[str]]:
        return {node: frozenset("w") for node in self.graph.nodes if self.w in node.all_input_nodes}


@pytest.mark.parametrize(
    ("build", "dx_transposed", "dw_transposed"),
    [
        (lambda h: (h.mm(h.dy, h.w), h.mm(h.t(h.dy), h.x)), False, False),
        (lambda h: (h.mm(h.t(h.w), h.t(h.dy)), h.mm(h.t(h.dy), h.x)), True, False),
        (lambda h: (h.mm(h.dy, h.t(h.t(h.w))), h.mm(h.t(h.x), h.dy)), False, True),
        (lambda h: (h.mm(h.t(h.w), h.t(h.dy)), h.mm(h.t(h.x), h.t(h.t(h.dy)))), True, True),
    ],
    ids=["dX, dW", "transposed dX", "transposed dW", "both transposed"],
)
def test_all_layouts_of_a_backward_match(
    build: Callable[[Hand], tuple[Node, Node]], dx_transposed: bool, dw_transposed: bool
) -> None:
    hand = Hand()
    dx, dw = build(hand)
    match = hand.match(dx, dw)
    assert (match.x, match.dy, match.dx, match.dw, match.first) == (hand.x, hand.dy, dx, dw, dx)
    assert (match.dx_transposed, match.dw_transposed) == (dx_transposed, dw_transposed)
    assert not match.dy_transposed


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda h: [], "no gradient flows through it"),
        (
            lambda h: [h.mm(h.dy, h.w), h.mm(h.t(h.other), h.x)],
            "its backward products do not share one output gradient",
        ),
        (
            lambda h: [h.mm(h.dy, h.w), h.mm(h.dy, h.w)],
            "its backward products do not share one output gradient",
        ),
        (
            lambda h: [h.mm(h.dy, h.t(h.input("v", 6, 4)))],
            "a backward product reads neither its weight nor its input",
        ),
        # The right nodes, but not as the gradient has them: x · wᵗ once more, as in a recomputed forward.
        (lambda h: [h.mm(h.x, h.t(h.w))], "a backward product reads neither its weight nor its input"),
    ],
    ids=["none", "two output gradients", "dX twice", "another weight", "the forward again"],
)
def test_backward_of_another_form_is_left_alone(build: Callable[[Hand], list[Node]], reason: str) -> None:
    hand = Hand()
    with pytest.raises(NoMatch, match=f"^{reason}$"):
        hand.match(*build(hand))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_dtype_that_is_not_supported(dtype: torch.dtype) -> None:
    hand = Hand()
    hand.forward.meta["val"] = torch.empty(5, 4, dtype=dtype)
    with pytest.raises(NoMatch, match=f"^dtype {dtype} is not supported$"):
        hand.match(hand.mm(hand.dy, hand.w))


def test_device_that_is_not_supported() -> None:
    hand = Hand()
    hand.forward.meta["val"] = torch.empty(5, 4, device="meta")
    with pytest.raises(NoMatch, match=r"^device meta is not supported$"):
        hand.match(hand.mm(hand.dy, hand.w))
