"""A linear that is no plain product in the joint graph is listed even so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparse_compile.passes import CalledLinear
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.utils.checkpoint import checkpoint
from tracing import Model, Tracer, layer, trace, value

from sparse_compile import naming, passes

ELEMENTWISE = "it is no matrix product in the joint graph, but elementwise work"


def grouped(m: Any, x: Tensor) -> Tensor:
    """Two experts, four rows for the one and six for the other."""
    ends = torch.tensor([4, 10], dtype=torch.int32)
    return F.grouped_mm(x.bfloat16(), m.experts.bfloat16(), offs=ends).to(x)


def test_grouped_product_of_experts() -> None:
    model = Model(
        lambda m, x: m.moe(m.gate(x)), gate=layer(16, 16), moe=Model(grouped, experts=value(2, 16, 8))
    )
    found = trace(model, value(10, 16), rtol=0.05)
    assert [linear.name for linear in found.linears] == ["gate"]
    (record,) = (record for record in found.records if not record.rewritten)
    assert (record.name, record.kind, record.shape) == ("moe.experts", "linear", (10, 16, 8))
    assert record.flops_forward == 2 * 10 * 16 * 8
    assert record.reason == "its product is the op aten._grouped_mm.default, which is not rewritten"


def test_product_with_a_vector() -> None:
    score = Model(lambda m, x: x @ m.v, v=value(6))
    found = trace(Model(lambda m, x: m.score(x), score=score), value(5, 6))
    assert [record.shape for record in found.records] == [(5, 6, 1)]
    assert found.left_alone == {"score.v": "its product is the op aten.mv.default, which is not rewritten"}


@pytest.mark.parametrize(
    ("model", "shape", "names"),
    [
        (Model(lambda m, x: m.head(x), head=layer(6, 1)), (1, 6), ["head"]),
        (Model(lambda m, x: m.head(torch.tanh(x)), head=layer(6, 4)), (6,), ["head"]),
        (
            Model(lambda m, x: F.linear(torch.tanh(x), m.w[:1] * 2, m.b), w=value(2, 6), b=value(1)),
            (1, 6),
            ["w"],
        ),
        (
            Model(
                lambda m, x: checkpoint(lambda y: m.head(torch.tanh(y)), x, use_reentrant=False),
                head=layer(6, 1),
            ),
            (1, 6),
            ["head"],
        ),
    ],
    ids=["one row, one feature", "a vector", "computed weight", "in a checkpointed region"],
)
def test_linear_that_inductor_takes_apart(model: nn.Module, shape: tuple[int, ...], names: list[str]) -> None:
    """A product of one row is elementwise work to Inductor. Without its decompositions it is a site."""
    found = trace(model, value(*shape), decompositions=select_decomp_table())
    assert found.left_alone == dict.fromkeys(names, ELEMENTWISE)
    assert [linear.name for linear in trace(model, value(*shape)).linears] == names


def test_no_linear_is_listed_twice() -> None:
    """Dynamo sees a linear, and the joint graph its product: the names agree, however the weight is made."""
    low_rank = Model(lambda m, x: F.linear(x, m.w + m.a * m.b), w=value(4, 6), a=value(6), b=value(4, 1))
    parts = {
        "plain": layer(),
        "normed": nn.utils.parametrizations.weight_norm(layer()),
        "packed": Model(lambda m, x: F.linear(x, m.w[:4]) + F.linear(x, m.w[4:]), w=value(8, 6)),
        "halved": Model(lambda m, x: F.linear(x.float(), m.w.float()).to(x), w=value(4, 6)),
        "merged": low_rank,
    }
    model = Model(lambda m, x: sum(getattr(m, name)(x) for name in parts), **parts)
    for decompositions in (None, select_decomp_table()):
        found = trace(model, value(5, 6), decompositions=decompositions, rtol=1e-5)
        assert found.left_alone == {}
        assert sorted({linear.name for linear in found.linears}) == [
            "halved.w",
            "merged",
            "normed",
            "packed.w",
            "plain",
        ]


def test_product_of_two_parameters_by_another_op_is_no_linear() -> None:
    model = Model(lambda m, x: x * (m.w @ m.v), w=value(4, 6), v=value(6))
    assert trace(model, value(5, 4)).records == []


def test_product_of_activations_by_another_op_is_no_linear() -> None:
    model = Model(lambda m, x, v: m.scale * (x @ v), scale=value(5))
    assert trace(model, value(5, 6), value(6)).records == []


def test_ops_whose_names_only_contain_mm_or_linear_are_not_taken_for_products() -> None:
    """lerp, comm and the like: a name is read by its parts."""
    model = Model(lambda m, x: torch.lerp(x, m.w, 0.5) + F.relu(m.w) * F.logsigmoid(x), w=value(5, 6))
    assert trace(model, value(5, 6)).records == []


class Called(Tracer):
    def __call__(self, gm: Any, inputs: Any) -> Any:
        names = {parameter.position: parameter.name for parameter in naming.find_parameters(gm, inputs)}
        self.called = list(passes.linears_called(gm, names))
        return super().__call__(gm, inputs)


def test_linears_called() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(m.b(checkpoint(m.a, x, use_reentrant=False)), m.proj)

    tracer = Called()
    model = Model(forward, a=layer(6, 4), b=layer(4, 4), proj=value(3, 4))
    torch.compile(model, backend=tracer)(value(5, 6))
    within = "tag_activation_checkpoint"
    assert tracer.called == [CalledLinear("a", within), CalledLinear("b"), CalledLinear("proj")]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_linears_of_a_backward_are_not_called() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return F.linear(x, w)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            x, w = ctx.saved_tensors
            return F.linear(dy, w.t()), F.linear(dy.t(), x.t())

    tracer = Called()
    model = Model(lambda m, x: m.a(Product.apply(x, m.w)), a=layer(4, 4), w=value(4, 6))
    torch.compile(model, backend=tracer)(value(5, 6))
    assert tracer.called == [CalledLinear("w", "autograd_function_apply"), CalledLinear("a")]
