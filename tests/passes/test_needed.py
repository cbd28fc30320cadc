"""Which rows of a forward are left out: what each op needs of its operands, and near misses. (Whole models:
tests/passes/test_padded_models.py.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from carried import masks_of_forwards
from padded import MeanOfTokens, bert, classes
from sparse_compile.passes import visible
from torch import Tensor, nn
from tracing import DOUBLE, Model, Tracer

from sparse_compile.kernels import linear as kernel

ops = torch.ops.sparse_compile


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def gradients(model: nn.Module, run: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(2)
    loss = run(**inputs)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()}


def count(model: nn.Module, *inputs: Tensor) -> int:
    """How many linears of a model have a forward that leaves rows out."""
    tracer = Tracer()
    torch.compile(model, backend=tracer, fullgraph=True)(*inputs).sum().backward()
    return len(tracer.trace.graph.find_nodes(op="call_function", target=ops.linear_forward.default))


def x() -> Tensor:
    return torch.randn(3, 8, 32, dtype=DOUBLE, requires_grad=True)


def shown() -> Tensor:
    return torch.arange(24).view(3, 8) % 5 > 1


class Doubled(torch.autograd.Function):
    """The identity, with a gradient that reads a product of all rows."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(h.flatten(0, 1).t() @ h.flatten(0, 1))
        return h.clone()

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Tensor:  # type: ignore[override]
        (product,) = ctx.saved_tensors
        return dh * product.sum()


def layer() -> nn.Linear:
    return nn.Linear(32, 32)


def hidden(shown: Tensor, value: float) -> Tensor:
    """What to add to scores [B, T, T]."""
    return torch.where(shown, 0.0, torch.tensor(value, dtype=DOUBLE)).unsqueeze(1)


def attend(m: nn.Module, h: Tensor, bias: Tensor) -> Tensor:
    q = m.a(h)
    return m.b(((q @ q.mT + bias).softmax(-1) @ q)[:, 0])


def attend_dropped(m: nn.Module, h: Tensor, bias: Tensor) -> Tensor:
    """With the dropout of CUDA, whose mask is a second result, and read by the backward alone; and a bias
    that is learned, for which an attention is left as it is."""
    q = m.a(h)
    p, _ = torch.ops.aten.native_dropout((q @ q.mT + (bias + m.p)).softmax(-1), 0.5, True)
    return m.b((p @ q)[:, 0])


def attend_twice(m: nn.Module, h: Tensor, bias: Tensor) -> Tensor:
    """Scores from two products, of which a rule that knows one would forget the other's keys."""
    k = m.b(h)
    return ((h @ h.mT + h @ k.mT + bias).softmax(-1) @ m.a(h))[:, 0]


def attend_fused(m: nn.Module, h: Tensor) -> Tensor:
    """The bias of a score is needed of every row of b; its gradient is not asked for."""
    q = m.a(h).unsqueeze(1)
    bias = m.b(h)[..., :8].unsqueeze(1).detach()
    return F.scaled_dot_product_attention(q, h.unsqueeze(1), h.unsqueeze(1), attn_mask=bias)[:, 0, 0]


RULES: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "a mask": (1, lambda m, x, s: m.a(x) * s.unsqueeze(-1)),
    "a mask of numbers": (1, lambda m, x, s: m.a(x) * s.unsqueeze(-1).double()),
    "where": (1, lambda m, x, s: torch.where(s.unsqueeze(-1), m.a(x), 0)),
    "where not": (1, lambda m, x, s: torch.where(s.unsqueeze(-1), 0, m.a(x))),
    "filled": (1, lambda m, x, s: m.a(x).masked_fill(s.unsqueeze(-1), 0)),
    "one token": (1, lambda m, x, s: m.a(x)[:, -1]),
    "some tokens": (1, lambda m, x, s: m.a(x)[:, 2:5]),
    "by index": (1, lambda m, x, s: m.a(x)[torch.arange(3), s.long().argmax(1)]),
    "in two layers": (2, lambda m, x, s: m.b(m.a(x).relu())[:, 0]),
    "halves put together": (2, lambda m, x, s: torch.cat([m.a(x), m.b(x)], -1)[:, 0]),
    "split": (1, lambda m, x, s: m.a(x).split(16, -1)[1][:, 0]),
    "unbound": (1, lambda m, x, s: m.a(x).unflatten(-1, (2, 16)).unbind(2)[1][:, 0]),
    "a norm": (1, lambda m, x, s: F.layer_norm(m.a(x), [32])[:, 0]),
    "the mean of each row": (1, lambda m, x, s: m.a(x).mean(-1)[:, 0]),
    "turned about": (1, lambda m, x, s: m.a(x).transpose(0, 1).unsqueeze(0).squeeze(0)[0]),
    "attention": (1, lambda m, x, s: attend(m, x, hidden(s, -torch.inf))),
    "attention, the least number": (1, lambda m, x, s: attend(m, x, hidden(s, torch.finfo(DOUBLE).min))),
    "a norm by hand": (1, lambda m, x, s: (h := m.a(x))[:, 0] / h.square().mean(-1, True).sqrt()[:, 0]),
    "filled with a value that is learned": (
        2,
        lambda m, x, s: m.a(x).masked_fill(s.unsqueeze(-1), m.b(x)[0, 0, 0]) * s.unsqueeze(-1),
    ),
    "a bias that is learned": (1, lambda m, x, s: attend_fused(m, x)),
    # Near misses: everything is needed, or may be.
    "attention, a sum of products": (0, lambda m, x, s: attend_twice(m, x, hidden(s, -torch.inf))),
    "everything": (0, lambda m, x, s: m.a(x)),
    "everything, beside": (0, lambda m, x, s: torch.cat([(y := m.a(x))[:, :1], y], 1)),
    "a mean over tokens": (0, lambda m, x, s: m.a(x).mean(1)),
    "a factor that is no mask": (0, lambda m, x, s: m.a(x) * s.double().cumsum(1).unsqueeze(-1)),
    "a mask that is learned": (0, lambda m, x, s: m.a(x) * (m.b(x)[..., :1] > 0)),
    "a mask of features": (0, lambda m, x, s: m.a(x) * s[:1].repeat(1, 4)),
    "a sum over tokens before": (0, lambda m, x, s: m.a(x).cumsum(1)[:, 0]),
    "rolled": (0, lambda m, x, s: m.a(x).roll(1, 1)[:, 0]),
    "turned round": (0, lambda m, x, s: m.a(x).flip(1)[:, 0]),
    "what a gradient reads": (0, lambda m, x, s: Doubled.apply(m.a(x))[:, 0]),
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo itself
@pytest.mark.parametrize("case", RULES)
def test_rules(case):
    """How many linears leave rows out; and loss and gradients are eager's, whatever is in those rows."""
    linears, forward = RULES[case]
    model = Model(lambda m, x, s: forward(m, x, s), a=layer(), b=layer())
    assert count(model, x(), shown()) == linears
    inputs, weights = x(), None
    found = []
    for run in (model, torch.compile(model, backend=Tracer(), fullgraph=True)):
        out = run(inputs, shown())
        weights = torch.randn_like(out) if weights is None else weights
        parameters = [inputs, *model.parameters()]
        found.append(torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True))
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-12)


def test_an_attention_with_dropout():
    parts = {"a": layer(), "b": layer(), "p": torch.randn(8, 8)}
    model = Model(lambda m, x, s: attend_dropped(m, x, hidden(s, -torch.inf)), **parts)
    tracer = Tracer()
    torch.compile(model, backend=tracer, fullgraph=True)(x(), shown()).sum().backward()
    (chain,) = visible.find(tracer.trace.graph)
    assert len(chain.biases) == 1


def test_a_mask_of_any_large_number_hides_nothing(monkeypatch):
    """With -10,000 added, a score may still be the largest of its row."""
    model = Model(lambda m, x, s: attend(m, x, hidden(s, -1e4)).sum(), a=layer(), b=layer())
    masks = masks_of_forwards(monkeypatch)
    torch.compile(model, backend=Tracer(), fullgraph=True)(x(), shown())
    assert masks
    assert all(mask.all() for mask in masks)


def test_what_is_needed_under_dynamic_shapes():
    """One graph serves several lengths and numbers of samples. (Two: Dynamo traces the second time anew.)"""
    model = MeanOfTokens(layers=1)
    tracer = Tracer()
    compiled = torch.compile(model, backend=tracer, fullgraph=True, dynamic=True)
    for samples, length in ((4, 12), (3, 9), (2, 11)):
        inputs = {k: v[:samples, :length] if v.dim() == 2 else v[:samples] for k, v in classes().items()}
        inputs = {name: value.contiguous() for name, value in inputs.items()}
        truth, found = (gradients(model, run, inputs) for run in (model, compiled))
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)
    assert len(tracer.traces) == 2
    for trace in tracer.traces:
        assert len(trace.graph.find_nodes(op="call_function", target=ops.linear_forward.default)) == 7


def test_a_deep_model():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x)
        for _ in range(1100):  # deeper than Python's stack
            h = h.sin()
        return m.b(h)[:, 0]

    assert count(Model(forward, a=layer(), b=layer()), x()) == 2


def test_masks_that_nothing_reads_are_not_left_behind():
    tracer = Tracer()
    model = bert("SequenceClassification", "sdpa", 0.0)
    torch.compile(model, backend=tracer, fullgraph=True)(**classes()).backward()
    unread = [
        n
        for n in tracer.trace.graph.nodes
        if n.meta.get("val") is not None and not n.users and n.op != "output"
    ]
    assert [
        n for n in unread if isinstance(n.meta["val"], Tensor) and n.meta["val"].dtype == torch.bool
    ] == []


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kept", [[], [4], [1, 2, 5], list(range(10))])
def test_forward_of_rows(kept, bias):
    x, w, b = torch.randn(10, 6), torch.randn(4, 6), torch.randn(4) if bias else None
    y, truth = kernel.forward(x, w, b, torch.tensor(kept, dtype=torch.int64)), F.linear(x, w, b)
    torch.testing.assert_close(y[kept], truth[kept])
    others = [i for i in range(10) if i not in kept]
    expected = truth[kept[0]] if kept else torch.zeros(4)
    torch.testing.assert_close(y[others], expected.expand(len(others), 4))
