"""Rows that are carried on a GPU: the products over them are the graph's own, and gradients those of all
rows, in float64 to rounding. The CPU's graphs are rewritten as a GPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from carried import INDUCTORS, LENGTHS, WIDTH, B, Padded, T, assert_equal, batch, gradients
from sparse_compile.passes import forward, layouts, own_products
from torch import Tensor, nn
from torch.fx import Node
from tracing import DOUBLE, Model, Tracer, layer

ops = torch.ops.sparse_compile
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_FEWEST_ROWS", 2)
    monkeypatch.setattr(forward, "_CPU", ())
    monkeypatch.setattr(forward, "_GPU", ("cpu",))
    torch.manual_seed(0)


def rewritten(
    model: nn.Module, *inputs: Any, decomposed: bool = False, dynamic: bool | None = None
) -> Tracer:
    """What the passes made of a model, whose gradients have been found to be those without them."""
    tracer = Tracer(INDUCTORS() if decomposed else None, compact=True, gpu_carries=True)
    compiled = torch.compile(model, backend=tracer, fullgraph=True, dynamic=dynamic)
    assert_equal(gradients(model, compiled, *inputs), gradients(model, model, *inputs))
    return tracer


def products(tracer: Tracer) -> list[Node]:
    """Those of few rows, whose number the graph does not know."""
    return [
        node
        for node in tracer.trace.graph.nodes
        if node.target in (aten.mm.default, aten.addmm.default)
        and any(isinstance(size, torch.SymInt) for arg in node.args for size in arg.meta["val"].shape)
    ]


def found(tracer: Tracer, op: Any) -> list[Node]:
    return tracer.trace.graph.find_nodes(op="call_function", target=op.default)


def carried(tracer: Tracer) -> set[str]:
    """The linears that an op counts; and no other says that its rows are carried."""
    records = tracer.trace.records
    counted = {i for op in found(tracer, ops.backward_rows) for i in op.args[3]}
    asked = {op.args[4] for op in found(tracer, ops.linear_backward)}
    assert {i for i, record in enumerate(records) if record.carried and i not in asked} == counted
    return {records[i].name for i in counted}


@pytest.mark.parametrize("decomposed", [False, True])
def test_products_of_few_rows_are_the_graphs_own(decomposed):
    tracer = rewritten(Padded(), *batch(), decomposed=decomposed)
    assert carried(tracer) == {"up", "down"}
    # Each of two layers runs twice: forward, dX and dW; but the input of the first wants no gradient.
    assert len(products(tracer)) == 4 * 3 - 1
    assert not found(tracer, ops.linear_forward)
    assert not found(tracer, ops.linear_forward_rows)
    assert len(found(tracer, ops.linear_backward)) == 1, "the head has one row a sample"
    assert len(found(tracer, ops.needed_rows)) == len(found(tracer, ops.backward_rows)) == 1


@pytest.mark.parametrize("decomposed", [False, True])
def test_one_graph_serves_any_number_of_rows(decomposed):
    model = Padded()
    tracer = rewritten(model, *batch(), decomposed=decomposed)
    compiled = torch.compile(model, backend=tracer, fullgraph=True)
    for lengths in ((T,) * B, (0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 2, 0), LENGTHS):
        inputs = batch(lengths)
        assert_equal(gradients(model, compiled, *inputs), gradients(model, model, *inputs))
    assert len(tracer.traces) <= 2


def test_sizes_that_are_symbols():
    tracer = rewritten(Padded(), *batch(), dynamic=True)
    assert carried(tracer) == {"up", "down"}
    assert not found(tracer, ops.linear_forward_rows)


def classify(m: nn.Module, x: Tensor, shown: Tensor, labels: Tensor) -> Tensor:
    """Tokens see each other's mean, and some have a label."""
    h = torch.tanh(m.a(x))
    h = h + ((h * shown.unsqueeze(-1)).sum(1, keepdim=True) @ m.v) * shown.unsqueeze(-1)
    h = torch.tanh(m.b(h))
    return F.cross_entropy(m.c(h).flatten(0, 1), labels.flatten(), ignore_index=-100)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_that_needs_fewer_rows_gathers_those(bias):
    x, shown = batch()
    labels = torch.full((B, T), -100)
    labels[:, 0] = torch.tensor([1, 2, 0, 1])
    labels[1, 5] = 2
    model = Model(
        classify,
        a=layer(WIDTH, WIDTH, bias=bias),
        b=layer(WIDTH, WIDTH, bias=bias),
        c=layer(WIDTH, 3, bias=bias),
        v=torch.randn(WIDTH, WIDTH),
    )
    tracer = rewritten(model, x, shown, labels)
    assert carried(tracer) == {"a", "b", "c"}
    rows = found(tracer, ops.backward_rows)
    counted = [sorted(tracer.trace.records[i].name for i in op.args[3]) for op in rows]
    assert sorted(counted) == [["a"], ["b", "c"]]
    assert len(found(tracer, ops.needed_rows)) == 2, "those of all tokens shown, and of these with a label"
    assert len(found(tracer, ops.linear_backward)) == 1, "v has one row a sample"


def test_a_frozen_weight_and_a_transposed_one():
    def forward(m: nn.Module, x: Tensor, shown: Tensor) -> Tensor:
        h = torch.tanh(F.linear(torch.tanh(m.a(x)) @ m.w, m.b.weight, m.b.bias))
        return (h * shown.unsqueeze(-1)).sum(1).square().sum()

    model = Model(forward, a=layer(WIDTH, 6), b=layer(5, 4), w=torch.randn(6, 5))
    model.b.weight.requires_grad_(False)
    tracer = rewritten(model, *batch())
    assert len(carried(tracer)) == 3
    assert len(products(tracer)) == 3 + 2 + 2  # no dX of the first, no dW of the last


def test_what_is_not_carried_is_as_without(monkeypatch: pytest.MonkeyPatch):
    """A hidden state is returned: all rows of it are needed, and those of what it is made of."""
    monkeypatch.setattr(forward, "_WORTH_ASKING", 0)

    def run(m: nn.Module, x: Tensor, shown: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        g = (torch.tanh(m.b(h)) * shown.unsqueeze(-1)).sum(1)
        return g.square().sum() + h.square().sum()

    tracer = rewritten(Model(run, a=layer(WIDTH, 6), b=layer(6, 6)), *batch())
    assert carried(tracer) == set()
    assert not found(tracer, ops.needed_rows)
    assert len(found(tracer, ops.linear_forward_rows)) == 1
    assert len(found(tracer, ops.linear_backward)) == 2


def test_where_no_gradient_is_gathered_ops_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_products, "_entries", lambda graph, rows: [])
    tracer = rewritten(Padded(), *batch())
    assert carried(tracer) == set()
    assert len(found(tracer, ops.linear_forward)) == 4
    assert {op.args[4] for op in found(tracer, ops.linear_backward)} == set(range(len(tracer.trace.records)))


def test_a_product_too_small_to_be_asked_is_left_as_it_is():
    def run(m: nn.Module, x: Tensor, shown: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        return (torch.tanh(m.b(h)) * shown.unsqueeze(-1)).sum() + h.square().sum()

    tracer = rewritten(Model(run, a=layer(WIDTH, 6), b=layer(6, 6)), *batch())
    assert not found(tracer, ops.linear_forward_rows)
    assert not found(tracer, ops.linear_forward)


def test_in_bfloat16_products_are_of_that():
    model = Padded().to(torch.bfloat16)
    x, shown = batch()
    tracer = Tracer(compact=True, gpu_carries=True)
    compiled = torch.compile(model, backend=tracer, fullgraph=True)
    compiled(x.to(torch.bfloat16), shown).backward()
    assert {node.meta["val"].dtype for node in products(tracer)} == {torch.bfloat16}
    assert DOUBLE not in {p.grad.dtype for p in model.parameters()}
