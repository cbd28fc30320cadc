"""Every way of writing a linear becomes one op, with the gradients of the two products that it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.utils.checkpoint import checkpoint
from tracing import Linear, Model, Trace, assert_close, differentiable, layer, step, trace, value
from transformers.pytorch_utils import Conv1D

from sparse_compile import Reuse, Schedule, sparse_backend


@pytest.fixture(params=[None, "inductor"], ids=["as traced", "with Inductor's decompositions"])
def tracing(request: pytest.FixtureRequest) -> Callable[..., Trace]:
    """`trace`, on the graphs that ``compiler="aot_eager"`` and Inductor give the passes; nothing may be
    left of the backward's products."""
    decompositions = select_decomp_table() if request.param else None

    def run(*arguments: Any, **options: Any) -> Trace:
        found = trace(*arguments, decompositions=decompositions, **options)
        assert found.products_before == sum(len(linear.gradients.split()) for linear in found.linears)
        assert found.backward_products == 0
        return found

    return run


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "rows", "tokens"), [((5,), 5, 1), ((2, 5), 10, 5), ((2, 3, 5), 30, 15), ((2, 3, 1, 5), 30, 15)]
)
def test_linear_of_any_input_rank(
    tracing: Callable[..., Trace], shape: tuple[int, ...], rows: int, tokens: int, bias: bool
) -> None:
    """`tokens` are all sizes of the input but the first, which is the batch, and the last."""
    model = Model(lambda m, x: m.lin(x), lin=layer(bias=bias))
    assert tracing(model, value(*shape, 6)).linears == [Linear("lin", (rows, 6, 4), tokens)]


def test_input_flattened_by_the_model_keeps_its_tokens(tracing: Callable[..., Trace]) -> None:
    """As in a mixture of experts, whose gate sees [batch * tokens, features]."""
    model = Model(lambda m, x: m.gate(torch.tanh(x).view(-1, 6)), gate=layer())
    assert tracing(model, value(2, 5, 6)).linears == [Linear("gate", (10, 6, 4), tokens=5)]


def test_features_regrouped_before_the_product_are_no_tokens(tracing: Callable[..., Trace]) -> None:
    model = Model(lambda m, x: m.lin(x.view(4, 6)), lin=layer())
    assert tracing(model, value(2, 4, 3)).linears == [Linear("lin", (4, 6, 4), tokens=1)]


def test_conv1d_of_gpt2(tracing: Callable[..., Trace]) -> None:
    model = Model(lambda m, x: m.c_fc(x), c_fc=Conv1D(4, 6))
    assert tracing(model, value(2, 5, 6)).linears == [Linear("c_fc", (10, 6, 4), 5, dw="I O")]


def test_head_tied_to_the_embedding(tracing: Callable[..., Trace]) -> None:
    """The site is the module that multiplies, wherever its weight lives. The gradient has both parts."""
    model = Model(lambda m, ids: m.head(torch.tanh(m.emb(ids))), emb=nn.Embedding(9, 6), head=layer(6, 9))
    model.head.weight = model.emb.weight
    found = tracing(model, torch.randint(9, (2, 5)))
    assert found.linears == [Linear("head", (10, 6, 9), 5)]


@pytest.mark.parametrize(
    ("forward", "shape", "dw"),
    [
        (lambda m, x: F.linear(x, m.proj), (4, 6), "O I"),
        (lambda m, x: x @ m.proj, (6, 4), "I O"),
        (lambda m, x: torch.tensordot(x, m.proj, dims=1), (6, 4), "I O"),
    ],
    ids=["F.linear", "matmul", "tensordot"],
)
def test_product_with_a_parameter_of_the_module(
    tracing: Callable[..., Trace], forward: Callable[..., Tensor], shape: tuple[int, int], dw: str
) -> None:
    """The parameter's own name is that of the site."""
    found = tracing(Model(forward, proj=value(*shape)), value(2, 5, 6))
    assert found.linears == [Linear("proj", (10, 6, 4), 5, dw=dw)]


def test_linear_used_twice(tracing: Callable[..., Trace]) -> None:
    model = Model(lambda m, x: m.lin(torch.tanh(m.lin(x))), lin=layer(6, 6))
    found = tracing(model, value(2, 5, 6))
    assert found.linears == [Linear("lin", (10, 6, 6), 5, call=0), Linear("lin", (10, 6, 6), 5, call=1)]


def test_linear_used_twice_is_one_row_of_the_report_and_has_two_bases() -> None:
    model = Model(lambda m, x: m.lin(torch.tanh(m.lin(x))), lin=layer(6, 6))
    backend = sparse_backend(Schedule(linear=Reuse(0.5)), compiler="aot_eager")
    step(torch.compile(model, backend=backend), [value(2, 5, 6)], {})
    (site,) = backend.report().sites
    assert (site.name, site.calls, site.rows) == ("lin", 2, 20)
    first, second = (base for base, *_ in backend.state_dict()["sites"]["lin"]["bases"].values())
    assert first.shape == second.shape == (5, 6)
    assert not torch.equal(first, second)


def test_frozen_weight(tracing: Callable[..., Trace]) -> None:
    model = Model(lambda m, x: m.lin(x), lin=layer().requires_grad_(False))
    assert tracing(model, value(2, 5, 6)).linears == [Linear("lin", (10, 6, 4), 5, "dX")]


def test_first_layer(tracing: Callable[..., Trace]) -> None:
    model = Model(lambda m, x: m.lin(x), lin=layer())
    assert tracing(model, value(2, 5, 6, grad=False)).linears == [Linear("lin", (10, 6, 4), 5, "dW")]


def test_only_the_bias_is_trained(tracing: Callable[..., Trace]) -> None:
    """As in BitFit: the gradient passes through every layer, and no weight has one."""
    model = Model(lambda m, x: m.b(m.a(x)), a=layer(), b=layer(4, 3))
    model.a.weight.requires_grad_(False)
    model.b.weight.requires_grad_(False)
    found = tracing(model, value(2, 5, 6, grad=False))
    assert found.linears == [Linear("b", (10, 4, 3), 5, "dX")]
    assert found.left_alone == {"a": "no gradient flows through it"}


def test_queries_keys_and_values_share_an_input(tracing: Callable[..., Trace]) -> None:
    model = Model(lambda m, x: m.q(x) * m.k(x) + m.v(x), q=layer(), k=layer(bias=False), v=layer())
    found = tracing(model, value(2, 5, 6))
    assert found.linears == [Linear(name, (10, 6, 4), 5) for name in ("q", "k", "v")]


def test_one_output_gradient_for_two_linears(tracing: Callable[..., Trace]) -> None:
    """a(x) + b(x): both read the very same dY, and have the same shapes."""
    model = Model(lambda m, x: m.a(x) + m.b(x), a=layer(bias=False), b=layer(bias=False))
    assert [linear.name for linear in tracing(model, value(5, 6)).linears] == ["a", "b"]


def test_square_layer_and_batch(tracing: Callable[..., Trace]) -> None:
    """All five matrices have one shape, so that only the nodes themselves tell them apart."""
    model = Model(lambda m, x: m.lin(x) * x, lin=layer(6, 6, bias=False))
    assert tracing(model, value(6, 6)).linears == [Linear("lin", (6, 6, 6))]


@pytest.mark.parametrize(
    ("view", "shape", "rows", "tokens"),
    [
        (lambda x: x.t(), (6, 5), 5, 1),
        (lambda x: x[:, ::2], (2, 10, 6), 10, 5),
        (lambda x: x.transpose(0, 1), (5, 2, 6), 10, -5),  # five samples, whose rows alternate
        (lambda x: x[..., 3:9], (2, 5, 12), 10, 5),
        (lambda x: x.expand(2, 5, 6), (1, 5, 6), 10, 5),
    ],
    ids=["column-major", "strided", "transposed", "slice of the features", "expanded"],
)
def test_input_that_is_not_contiguous(
    tracing: Callable[..., Trace], view: Callable[..., Tensor], shape: tuple[int, ...], rows: int, tokens: int
) -> None:
    model = Model(lambda m, x: m.lin(view(x)), lin=layer())
    assert tracing(model, value(*shape)).linears == [Linear("lin", (rows, 6, 4), tokens)]


@pytest.mark.parametrize("use", [lambda y: y.transpose(1, 2).tanh(), lambda y: y.sum(1), lambda y: y[:, 0]])
def test_output_gradient_that_is_not_contiguous(
    tracing: Callable[..., Trace], use: Callable[..., Tensor]
) -> None:
    model = Model(lambda m, x: use(m.lin(x)), lin=layer())
    assert tracing(model, value(2, 5, 6)).linears == [Linear("lin", (10, 6, 4), 5)]


def test_bf16_autocast(tracing: Callable[..., Trace]) -> None:
    """The weight is a cast of the parameter; the gradients are float32 again."""

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.b(torch.tanh(m.a(x)))

    model = Model(forward, a=layer(), b=layer(4, 3)).float()
    found = tracing(model, value(2, 5, 6).detach().float().requires_grad_(), rtol=0.02)
    assert found.linears == [Linear("a", (10, 6, 4), 5), Linear("b", (10, 4, 3), 5)]
    assert {op.args[1].meta["val"].dtype for op in found.ops} == {torch.bfloat16}


@pytest.mark.parametrize(("shape", "tokens"), [((2, 5), 5), ((2, 3, 5), 15)])
def test_dynamic_shapes(tracing: Callable[..., Trace], shape: tuple[int, ...], tokens: int) -> None:
    """`tokens` is computed in the graph, which serves all batch sizes and lengths."""
    model = Model(lambda m, x: m.lin(x), lin=layer())
    found = tracing(model, value(*shape, 6), dynamic=True)
    assert found.linears == [Linear("lin", (2 * tokens, 6, 4), tokens)]
    assert isinstance(found.ops[0].args[5], torch.fx.Node)


def test_one_dynamic_graph_serves_all_batch_sizes_and_lengths() -> None:
    model = Model(lambda m, x: m.b(torch.tanh(m.a(x))), a=layer(), b=layer(4, 3))
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager", debug=True)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for batch, length in ((2, 5), (3, 5), (7, 4), (2, 9)):
        x = value(batch, length, 6)
        with torch.no_grad():
            x[:, 1] = 0
        wanted = differentiable(model, [x])
        assert_close(step(compiled, [x], wanted), step(model, [x], wanted))
        assert [site.shape[0] for site in backend.report().sites] == [batch * length] * 2
    assert len(backend.graphs) == 1


def test_weight_computed_from_parameters(tracing: Callable[..., Trace]) -> None:
    lin = nn.utils.parametrizations.weight_norm(layer())
    assert tracing(Model(lambda m, x: m.lin(x), lin=lin), value(2, 5, 6)).linears == [
        Linear("lin", (10, 6, 4), 5)
    ]


def test_packed_weight(tracing: Callable[..., Trace]) -> None:
    model = Model(lambda m, x: F.linear(x, m.qk[:4]) * F.linear(x, m.qk[4:]), qk=value(8, 6))
    found = tracing(model, value(2, 5, 6))
    assert found.linears == [Linear("qk", (10, 6, 4), 5, call=0), Linear("qk", (10, 6, 4), 5, call=1)]
    assert found.left_alone == {}


def test_low_rank_adapter(tracing: Callable[..., Trace]) -> None:
    model = Model(lambda m, x: m.base(x) + m.up(m.down(x)), base=layer(), down=layer(6, 2), up=layer(2, 4))
    model.base.requires_grad_(False)
    assert tracing(model, value(5, 6)).linears == [
        Linear("base", (5, 6, 4), gradients="dX"),
        Linear("down", (5, 6, 2)),
        Linear("up", (5, 2, 4)),
    ]


def test_activation_checkpointing(tracing: Callable[..., Trace]) -> None:
    """The forward is traced twice, and the linear of the recomputed one is the same site."""
    model = Model(
        lambda m, x: checkpoint(lambda y: torch.tanh(m.b(torch.tanh(m.a(y)))), x, use_reentrant=False),
        a=layer(),
        b=layer(4, 3),
    )
    assert tracing(model, value(2, 5, 6)).linears == [
        Linear("a", (10, 6, 4), 5),
        Linear("b", (10, 4, 3), 5),
    ]


def test_one_feature() -> None:
    """Inductor's decompositions turn some of the products into elementwise work, and leave the others."""
    model = Model(lambda m, x: m.b(m.a(x)), a=layer(6, 1), b=layer(1, 3))
    linears = [Linear("a", (10, 6, 1), 5), Linear("b", (10, 1, 3), 5)]
    assert trace(model, value(2, 5, 6)).linears == linears
    decomposed = trace(model, value(2, 5, 6), decompositions=select_decomp_table())
    assert [linear.name for linear in decomposed.linears] == ["a", "b"]
    assert decomposed.backward_products == 0


def test_graph_keeps_values_and_module_paths() -> None:
    """Passes that run later read them."""
    model = Model(lambda m, x: m.lin(x), lin=layer())
    for op in trace(model, value(2, 3, 5, 6)).ops:
        assert [v.shape for v in op.meta["val"]] == [(30, 6), (30,), (4, 6)]
        assert "lin" in str(op.meta["fwd_nn_module_stack"])
        assert op.meta["partitioner_tag"] == "is_backward"
        for user in op.users:
            assert user.meta["val"].shape in [(30, 6), (30,), (4, 6)]
