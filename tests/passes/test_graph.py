"""The small questions, on graphs built by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sparse_compile.passes import graph as g
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from tracing import Model, layer, trace, value

aten = torch.ops.aten


class Built:
    """A graph with a value of the right shape at every node."""

    def __init__(self) -> None:
        self.graph = Graph()

    def input(self, *shape: int) -> Node:
        node = self.graph.placeholder(f"input_{len(self.graph.nodes)}")
        node.meta["val"] = torch.empty(*shape, device="meta")
        return node

    def call(self, target: Any, *args: Any, backward: bool = False) -> Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
        if backward:
            node.meta["partitioner_tag"] = "is_backward"
        return node


@pytest.fixture
def built() -> Built:
    return Built()


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        (aten.t.default, (), True),
        (aten.permute.default, ([1, 0],), True),
        (aten.permute.default, ([-1, 0],), True),
        (aten.permute.default, ([0, 1],), False),
        (aten.transpose.int, (0, 1), True),
        (aten.transpose.int, (-2, -1), True),
        (aten.transpose.int, (1, -1), False),
        (aten.relu.default, (), False),
    ],
)
def test_transpose(built: Built, target: Any, args: tuple[Any, ...], expected: bool) -> None:
    assert g.is_transpose(built.call(target, built.input(3, 4), *args)) is expected


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        (aten.transpose.int, (1, 2), True),
        (aten.transpose.int, (-1, 1), True),
        (aten.transpose.int, (0, 1), False),
        (aten.permute.default, ([0, 2, 1],), True),
        (aten.permute.default, ([1, 0, 2],), False),
        (aten.permute.default, ([1, 2, 0],), False),
    ],
)
def test_transpose_of_each_matrix_of_a_batch(
    built: Built, target: Any, args: tuple[Any, ...], expected: bool
) -> None:
    assert g.is_transpose(built.call(target, built.input(2, 3, 4), *args)) is expected


def test_transpose_of_more_dimensions_is_none(built: Built) -> None:
    assert not g.is_transpose(built.call(aten.transpose.int, built.input(2, 3, 4, 5), 2, 3))


def test_transposes_and_aliases_are_stripped(built: Built) -> None:
    w = built.input(3, 4)
    once = built.call(aten.t.default, built.call(aten.detach.default, w))
    twice = built.call(aten.permute.default, built.call(aten.alias.default, once), [1, 0])
    assert g.strip_transposes(w) == (w, False)
    assert g.strip_transposes(once) == (w, True)
    assert g.strip_transposes(twice) == (w, False)


def test_nothing_else_is_stripped(built: Built) -> None:
    """A view, a cast or a copy is another matrix as far as the match is concerned."""
    for target, args in [(aten.view.default, ([4, 3],)), (aten.relu.default, ()), (aten.clone.default, ())]:
        node = built.call(target, built.input(3, 4), *args)
        assert g.strip_transposes(node) == (node, False)


def test_parameters_below(built: Built) -> None:
    w, scale, x = built.input(4, 6), built.input(4, 1), built.input(5, 6)
    scaled = built.call(aten.mul.Tensor, w, scale)
    cut = built.call(aten.slice.Tensor, scaled, 0, 0, 2)
    y = built.call(aten.mm.default, x, built.call(aten.t.default, cut))
    gradient = built.call(aten.mul.Tensor, w, w, backward=True)
    below = g.parameters_below(built.graph, {w: "lin.weight", scale: "lin.scale"})
    assert below[w] == {"lin.weight"}
    assert below[scaled] == below[cut] == {"lin.weight", "lin.scale"}
    assert not {x, y, gradient} & below.keys()


def test_what_is_made_of_constants_alone_is_no_parameter(built: Built) -> None:
    zeros = built.graph.call_function(aten.zeros.default, ([2, 2],))
    assert g.parameters_below(built.graph, {}) == {}
    assert zeros not in g.parameters_below(built.graph, {built.input(1): "w"})


@pytest.mark.parametrize(
    ("recorded", "path"),
    [
        ("L['self'].bert.pooler.dense", "bert.pooler.dense"),
        ("L['self']", ""),
        ("L['self']._modules['layers']._modules['0']._modules['fc']", "layers.0.fc"),
        ("L['self'].layers[0].fc", "layers.0.fc"),
        ("L['self'].blocks['a-b'].fc", "blocks.a-b.fc"),
        ("L['self']._orig_mod.fc", "fc"),
        ("L['model'].fc", "fc"),
        ("G['model'].fc", "fc"),
    ],
)
def test_module_path(built: Built, recorded: str, path: str) -> None:
    node = built.input(1)
    node.meta["nn_module_stack"] = {"outer": ("L['self']", None), "inner": (recorded, None)}
    assert g.module_path(node) == path


def test_module_path_of_a_backward_node_is_that_of_its_forward(built: Built) -> None:
    node = built.input(1)
    assert g.module_path(node) == ""
    node.meta["fwd_nn_module_stack"] = {"a": ("L['self'].fc", None)}
    assert g.module_path(node) == "fc"


@pytest.mark.parametrize(
    ("path", "weights", "name"),
    [
        ("enc.fc", ["enc.fc.weight"], "enc.fc"),
        ("attn", ["attn.in_proj_weight"], "attn.in_proj_weight"),
        # A weight read by the parent of its module belongs to that module.
        ("attn", ["attn.out_proj.weight"], "attn.out_proj"),
        # A head tied to the embedding is named as the head.
        ("head", ["emb.weight"], "head"),
        # "fc1" is not inside "fc".
        ("fc", ["fc1.weight"], "fc"),
        # A weight computed from several parameters has no name of its own.
        ("fc", ["fc.original0", "fc.original1"], "fc"),
        ("fc", [], "fc"),
        # The compiled module is itself the linear, or a function was compiled.
        ("", ["weight"], "weight"),
        ("", ["proj"], "proj"),
        ("", ["enc.fc.weight"], "enc.fc"),
    ],
)
def test_site_name(built: Built, path: str, weights: list[str], name: str) -> None:
    node = built.input(1)
    node.meta["nn_module_stack"] = {"a": (f"L['self'].{path}" if path else "L['self']", None)}
    assert g.site_name(node, frozenset(weights)) == name


def test_products_of_one_side(built: Built) -> None:
    a, b, bias = built.input(2, 3), built.input(3, 4), built.input(4)
    forward = [built.call(aten.mm.default, a, b), built.call(aten.addmm.default, bias, a, b)]
    backward = [built.call(aten.mm.default, a, b, backward=True)]
    built.call(aten.mul.Tensor, a, a)
    batch = built.call(aten.bmm.default, built.input(5, 2, 3), built.input(5, 3, 4), backward=True)
    assert list(g.products(built.graph, backward=False)) == forward
    assert list(g.products(built.graph, backward=True)) == [*backward, batch]
    assert g.operands(forward[1]) == (a, b)


def test_product_flops(built: Built) -> None:
    a, b, bias = built.input(2, 3), built.input(3, 4), built.input(4)
    assert g.product_flops(built.call(aten.addmm.default, bias, a, b)) == 2 * 2 * 3 * 4
    batch = built.call(aten.bmm.default, built.input(5, 2, 3), built.input(5, 3, 4))
    assert g.product_flops(batch) == 2 * 5 * 2 * 3 * 4


def test_symbolic_sizes_become_those_of_the_trace() -> None:
    shapes = ShapeEnv()
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    fake = FakeTensorMode(shape_env=shapes).from_tensor(
        torch.empty(7, 3), symbolic_context=context, source=ConstantSource("x")
    )
    assert not isinstance(fake.shape[0], int)
    assert g.sizes(fake.shape) == (7, 3)
    assert g.same_size(fake.shape[0], fake.shape[0])
    assert not g.same_size(fake.shape[0], fake.shape[1])
    assert g.same_size(7, 7)
    assert not shapes.guards


def test_begin_is_the_forwards_first_op_and_stays_there() -> None:
    """Its result is saved; in the backward it would answer for whatever forward ran last."""
    found = trace(Model(lambda m, x: m.lin(x), lin=layer()), value(5, 6))
    first = next(node for node in found.graph.nodes if node.op == "call_function")
    assert first.target is torch.ops.sparse_compile.begin.default
    assert first.meta["partitioner_tag"] == "must_be_in_forward"
    assert (first.meta["val"].shape, first.meta["val"].dtype) == ((4,), torch.int64)
    assert [op.args[0] for op in found.ops] == [first]
