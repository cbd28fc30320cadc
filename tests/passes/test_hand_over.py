"""Which weight gradients the graph hands over, and which look as if it could and stay dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracing import DOUBLE, Model, layer, value

from sparse_compile import RotatedTopK, Schedule, SparseBackend, sparse_backend

USED_ELSEWHERE = "its weight gradient stays dense: the weight has another use, or is part of a parameter"
FROZEN = "its weight gradient is not computed: the weight is frozen"


def frozen(linear: nn.Linear) -> nn.Linear:
    linear.weight.requires_grad_(False)
    return linear


def compiled(model: nn.Module, where: str = "*", **options) -> tuple[nn.Module, SparseBackend]:
    schedule = Schedule(weight_gradients=RotatedTopK(0.5, where=where), **options)
    backend = sparse_backend(schedule, compiler="aot_eager")
    return torch.compile(model, backend=backend, fullgraph=True), backend  # type: ignore[return-value]


def gradients(run: Callable[..., Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    y = run(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def handed_over(backend: SparseBackend) -> dict[str, str]:
    """The layers whose gradient is handed over, each with the layout of its weight."""
    records = [record for records in backend._runtime.records.values() for record in records]
    return {record.name: record.handed_over for record in records if record.handed_over}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Model(lambda m, x: m.a(x), a=layer(6, 4)), {"a": "O I"}),
        (Model(lambda m, x: m.a(x), a=nn.Linear(6, 4, bias=False)), {"a": "O I"}),
        (Model(lambda m, x: m.b(torch.tanh(m.a(x))), a=layer(6, 4), b=layer(4, 3)), {"a": "O I", "b": "O I"}),
        (Model(lambda m, x: x @ m.w, w=value(6, 4)), {"w": "I O"}),
        (Model(lambda m, x: x @ m.w, w=value(6, 6)), {"w": "I O"}),
        (Model(lambda m, x: F.linear(x, m.w), w=value(6, 6)), {"w": "O I"}),
        (Model(lambda m, x: m.b(m.a(x)), a=frozen(nn.Linear(6, 4)), b=layer(4, 3)), {"b": "O I"}),
    ],
    ids=["linear", "no bias", "two", "[I, O]", "square [I, O]", "square [O, I]", "one frozen"],
)
def test_handed_over(model, expected):
    x = torch.randn(2, 5, 6, dtype=DOUBLE)
    run, backend = compiled(model)
    dense = gradients(model, model, x)
    found = gradients(run, model, x)
    assert handed_over(backend) == expected
    for name, gradient in dense.items():
        if gradient is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-13, msg=name)


def twice(m: Model, x: Tensor) -> Tensor:
    return m.a(torch.tanh(m.a(x)))


NEAR_MISSES = {
    "used twice": (Model(twice, a=layer(6, 6)), "a"),
    "sliced": (Model(lambda m, x: F.linear(x, m.w[:4]) + F.linear(x, m.w[4:]), w=value(8, 6)), "w"),
    "scaled": (Model(lambda m, x: F.linear(x, 2 * m.w), w=value(4, 6)), "w"),
    "penalised": (Model(lambda m, x: m.a(x) + m.a.weight.sum(), a=layer(6, 4)), "a"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_keeps_its_dense_gradient(name):
    (model, layer_name), x = NEAR_MISSES[name], torch.randn(2, 5, 6, dtype=DOUBLE)
    run, backend = compiled(model)
    dense = gradients(model, model, x)
    found = gradients(run, model, x)
    assert handed_over(backend) == {}
    for parameter, gradient in dense.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-12, atol=1e-13, msg=parameter)
    site = {site.name: site for site in backend.report().sites}[layer_name]
    assert site.reason == USED_ELSEWHERE


def test_tied_weight_is_not_chosen():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.body = nn.Embedding(7, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 7, bias=False)
            self.head.weight = self.words.weight
            self.double()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(self.words(tokens))))

    model, tokens = Tied(), torch.randint(7, (2, 5))
    run, backend = compiled(model)
    dense = gradients(model, model, tokens)
    found = gradients(run, model, tokens)
    assert handed_over(backend) == {"body": "O I"}
    for name, gradient in dense.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-13, msg=name)


def test_frozen_weight_has_no_gradient():
    model = Model(lambda m, x: m.b(m.a(x)), a=layer(6, 4), b=frozen(nn.Linear(4, 3)))
    run, backend = compiled(model)
    gradients(run, model, torch.randn(2, 5, 6, dtype=DOUBLE))
    assert handed_over(backend) == {"a": "O I"}
    sites = {site.name: site for site in backend.report().sites}
    assert sites["b"].reason == FROZEN


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"exclude": "a"}, {"b"}), ({"include": "a"}, {"a"}), ({"where": "b"}, {"b"})],
    ids=["exclude", "include", "where"],
)
def test_patterns_leave_layers_out(options, expected):
    model = Model(lambda m, x: m.b(torch.tanh(m.a(x))), a=layer(6, 4), b=layer(4, 3))
    run, backend = compiled(model, **options)
    gradients(run, model, torch.randn(2, 5, 6, dtype=DOUBLE))
    assert set(handed_over(backend)) == expected


def test_gradient_under_autocast_comes_in_the_dtype_of_the_weight():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    run, backend = compiled(model)

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    x = torch.randn(2, 5, 8)
    dense = gradients(lambda x: loss(model, x).float(), model, x)
    found = gradients(lambda x: loss(run, x).float(), model, x)
    assert set(handed_over(backend)) == {"0", "2"}
    for name, gradient in dense.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], gradient, rtol=2e-2, atol=2e-2, msg=name)


def test_without_its_backend_a_gradient_is_not_lost_in_silence():
    op = torch.ops.sparse_compile.linear_backward.default
    dy, x, w = torch.randn(4, 3), torch.randn(4, 5), torch.randn(3, 5)
    with pytest.raises(RuntimeError, match="the model or backend that its graph was compiled for is gone"):
        op(torch.tensor([10**9, 0, 0, 0]), dy, x, w, 0, 1, False, True)


def test_schedule_without_the_method_hands_nothing_over():
    model = Model(lambda m, x: m.a(x), a=layer(6, 4))
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager")
    gradients(torch.compile(model, backend=backend), model, torch.randn(2, 5, 6, dtype=DOUBLE))
    assert handed_over(backend) == {}
    assert backend.rotation is None
