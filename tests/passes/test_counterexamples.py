"""Models in which a row seems to be needed by nothing, or a gradient to be zero, and is not: loss and
gradients are eager's, in float64 to rounding, as the CPU carries rows and as a GPU does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparse_compile.passes import forward, layouts
from sparse_compile.passes.masks import Masks
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph
from tracing import DOUBLE, Model, layer

from sparse_compile import Schedule, SparseBackend, sparse_backend
from sparse_compile.kernels import on_device

B, T, D = 4, 16, 8
LENGTHS = torch.tensor([9, 3, 4, 6])

Forward = Callable[..., Tensor]


def shown(length: int | None = None) -> Tensor:
    """Of each sample the first tokens, [B, T, 1]."""
    lengths = LENGTHS if length is None else torch.full((B,), length)
    return (torch.arange(T) < lengths.unsqueeze(1)).unsqueeze(2)


def given(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x)))  # type: ignore[no-any-return]


def masked(h: Tensor, length: int | None = None) -> Tensor:
    return (h * shown(length)).square().sum()


class StraightThrough(torch.autograd.Function):
    """A mask whose gradient is not masked."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return h * mask

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return g, None


def read_without_gradient(m: nn.Module, x: Tensor) -> Tensor:
    """h is read after a product with p, and has its number."""
    h, scaled = given(m, x), x.detach().cos() * m.p
    with torch.no_grad():
        norm = (h * shown()).norm()
    return masked(h) + scaled.pow(3).sum() * norm


def gathered_before_it_is_needed(m: nn.Module, x: Tensor) -> Tensor:
    """Three tokens of x are needed for a residual sum, and nine elsewhere."""
    loss = masked(m.b(torch.tanh(m.a(x)) + x), 3)
    return loss + masked((x + m.p).tanh(), 9)


def normed_elsewhere(m: nn.Module, x: Tensor) -> Tensor:
    loss = masked(m.b(torch.tanh(m.a(x)) + x), 3)
    return loss + (F.layer_norm(x, [D], m.p) * shown(9)).pow(3).sum()


def attend(m: nn.Module, x: Tensor, extra: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The loss is of one query, and of something between the products of an attention."""
    h = torch.tanh(m.a(x))
    scores = m.b(h) @ m.c(h).mT
    probabilities = (scores + torch.full((T, T), -torch.inf, dtype=DOUBLE).triu(1)).softmax(-1)
    y = m.d(probabilities @ h)
    return y[:, 3].square().sum() + extra(scores, probabilities)


def weights() -> Tensor:
    return torch.linspace(0, 1, T, dtype=DOUBLE)


CASES: dict[str, Forward] = {
    "a learned token where the mask hides": lambda m, x: (
        m.c(torch.where(shown(), given(m, x), m.p)).square().sum()
    ),
    "a learned token where it shows": lambda m, x: m.c(torch.where(shown(), m.p, given(m, x))).square().sum(),
    "read without a gradient": read_without_gradient,
    "gathered before it is needed": gathered_before_it_is_needed,
    "gathered, and normed elsewhere": normed_elsewhere,
    "a slice from before the beginning": lambda m, x: given(m, x)[:, -20:-1].square().sum(),
    "a short slice from before the beginning": lambda m, x: given(m, x)[:, -100:5].square().sum(),
    "probabilities that are read": lambda m, x: attend(m, x, lambda s, p: (p * weights()).square().sum()),
    "their entropy": lambda m, x: attend(m, x, lambda s, p: (p * (p + 1e-9).log())[:, 6:9].sum()),
    "scores that are read": lambda m, x: attend(m, x, lambda s, p: s.logsumexp(-1).square().mean()),
    "a gradient of one's own": lambda m, x: StraightThrough.apply(given(m, x), shown()).add(x).pow(3).sum(),
}


def as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_CPU", ())
    monkeypatch.setattr(forward, "_GPU", ("cpu",))
    monkeypatch.setattr(on_device, "available", lambda device: True)


@pytest.fixture(autouse=True)
def few_rows_are_carried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_FEWEST_ROWS", 2)


def compare(model: nn.Module, *inputs: Tensor) -> SparseBackend:
    """Under `exact()` and in eager."""
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager", debug=True)
    found = []
    for run in (model, torch.compile(model, backend=backend, fullgraph=True)):
        model.zero_grad()
        loss = run(*inputs)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **gradients})
    eager, ours = found
    assert ours.keys() == eager.keys()
    for name, gradient in eager.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-12, msg=name)
    return backend


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo itself
@pytest.mark.parametrize("gpu", [False, True], ids=["CPU", "GPU"])
@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str, gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if gpu:
        as_a_gpu(monkeypatch)
    torch.manual_seed(0)
    model = Model(CASES[case], **{name: layer(D, D) for name in "abcd"}, p=torch.randn(D))
    backend = compare(model, torch.randn(B, T, D, dtype=DOUBLE))
    assert any(site.rewritten for site in backend.report().sites)


def test_an_embedding_whose_gradient_is_by_frequency() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(7, D, scale_grad_by_freq=True)
    model = Model(
        lambda m, ids: masked(m.b(torch.tanh(m.a(m.table(ids))))), a=layer(D, D), b=layer(D, D), table=table
    )
    compare(model, torch.randint(7, (B, T)))


def test_masks_are_made_where_the_tensor_is_that_they_are_of() -> None:
    """Not where the first input is: lengths on the CPU, say, and all else on a GPU."""
    graph = Graph()
    lengths, h = graph.placeholder("lengths"), graph.placeholder("h")
    with FakeTensorMode():
        lengths.meta["val"], h.meta["val"] = torch.empty(B), torch.empty(B, T, D, device="cuda")
    after = graph.call_function(torch.ops.aten.neg.default, (h,))
    after.meta = dict(h.meta)
    made = Masks(graph, after=after, below={}).positions(T, 1, like=h)
    assert made.meta["val"].device.type == "cuda"


def test_a_linear_whose_result_nothing_reads() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.conv(x)
        m.a(h)
        return h.square().sum()

    model = Model(run, conv=nn.Conv1d(T, 4, 1), a=layer(D, D))
    compare(model, torch.randn(B, T, D, dtype=DOUBLE))
