"""Only the needed rows are carried from op to op: gradients are those of carrying all, in float64 to
rounding, and where it cannot be done nothing is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from carried import (
    INDUCTORS,
    LENGTHS,
    WIDTH,
    B,
    Padded,
    T,
    assert_equal,
    batch,
    compile_and_compare,
    counts,
    gradients,
)
from padded import classes
from sparse_compile.passes import layouts
from torch import Tensor, nn
from tracing import DOUBLE, Model, Tracer, layer

ops = torch.ops.sparse_compile
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_FEWEST_ROWS", 2)
    torch._dynamo.reset()
    torch.manual_seed(0)


def root_mean_square(x: Tensor) -> Tensor:
    """Tanh and Llama's norm, whose gradient is multiplied and divided by numbers."""
    return torch.tanh(x) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("between", [torch.tanh, root_mean_square])
def test_all_that_is_between_two_linears_is_done_on_few_rows(between, decomposed):
    tracer = compile_and_compare(Padded(between), *batch(), decomposed=decomposed)
    assert counts(tracer) == (4, 5)
    graph = tracer.trace.graph
    whole = {
        node.target
        for node in graph.nodes
        if node.op == "call_function"
        and isinstance(node.meta.get("val"), Tensor)
        and node.meta["val"].is_floating_point()
        and isinstance(node.meta["val"].shape[0] if node.meta["val"].dim() else None, int)
        and node.meta["val"].shape[:-1] in ((B, T), (B * T,))
    }
    # What gathers rows of the input; the masked mean and its gradient; what writes rows out for it.
    assert whole <= {
        *(aten.mul.Tensor, aten.expand.default, aten.view.default, aten.clone.default),
        *(aten._unsafe_index.Tensor, aten.unsqueeze.default),
    }
    tanh = graph.find_nodes(op="call_function", target=aten.tanh.default)
    assert len(tanh) == 2
    assert all(isinstance(node.meta["val"].shape[0], torch.SymInt) for node in tanh)


@pytest.mark.parametrize("decomposed", [False, True])
def test_one_graph_serves_any_number_of_rows(decomposed):
    model, tracer = Padded(), Tracer(INDUCTORS() if decomposed else None, compact=True)
    compiled = torch.compile(model, backend=tracer, fullgraph=True)
    for lengths in (LENGTHS, (T,) * B, (0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 2, 0), (T, 0, 0, 0)):
        inputs = batch(lengths)
        assert_equal(gradients(model, compiled, *inputs), gradients(model, model, *inputs))
    assert counts(tracer) == (4, 5)


def test_dropout_draws_what_it_draws_without():
    """As Inductor takes dropout apart: the random numbers of the rows are those they have among all."""
    model, inputs, found = Padded(dropout=0.4), batch(), []
    for compact in (False, True):
        torch._dynamo.reset()
        tracer = Tracer(INDUCTORS(), compact=compact)
        found.append(gradients(model, torch.compile(model, backend=tracer, fullgraph=True), *inputs))
        assert counts(tracer)[0] == (4 if compact else 0)
        # Written out nowhere: the dropped rows are taken of the random numbers alone.
        assert len(tracer.trace.graph.find_nodes(op="call_function", target=aten.rand.default)) == 2
    assert_equal(found[1], found[0])


def test_what_is_needed_twice():
    """The hidden state goes into the mean, and into another layer: its gradients are added up."""

    def forward(m: nn.Module, x: Tensor, shown: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        g = torch.tanh(m.b(h))
        flags = shown.unsqueeze(-1)
        return ((h * flags).sum(1) * (g * flags).sum(1)).square().sum()

    tracer = compile_and_compare(Model(forward, a=layer(WIDTH, 6), b=layer(6, 6)), *batch())
    assert counts(tracer) == (2, 2)


class Towers(nn.Module):
    """Questions and passages, of other numbers and lengths, through the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Padded()

    def forward(self, x: Tensor, shown: Tensor, y: Tensor, shown_y: Tensor) -> Tensor:
        means = [(self.layers.body(h) * m.unsqueeze(-1)).sum(1) for h, m in ((x, shown), (y, shown_y))]
        return F.cross_entropy(means[0] @ means[1].T, torch.arange(len(x)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_two_kinds_of_sequences(dynamic):
    lengths = torch.tensor([3, 11, 1, 7, 2, 5])
    passages = (torch.randn(6, 11, WIDTH, dtype=DOUBLE), torch.arange(11) < lengths.unsqueeze(1))
    tracer = compile_and_compare(Towers(), *batch(), *passages, dynamic=dynamic)
    assert counts(tracer) == (4, 4)
    rows = tracer.trace.graph.find_nodes(op="call_function", target=ops.needed_rows.default)
    assert len(rows) == 2


def test_tokens_and_samples_of_which_some_are_needed(monkeypatch):
    """Rows of one kind are tokens, of the other samples; where both read a tensor, one that needs all of its
    samples must get their gradients."""

    def forward(m: nn.Module, x: Tensor, shown: Tensor, wanted: Tensor) -> Tensor:
        h = torch.tanh(m.a(x)) + x
        mean = (h * shown.unsqueeze(-1)).sum(1)
        pooled = torch.tanh(m.b(mean))
        both = ((pooled.unsqueeze(1) * h) * shown.unsqueeze(-1)).sum(1)
        alone = torch.einsum("btf,f->b", h * shown.unsqueeze(-1), m.v)
        return (m.c(both) * wanted.unsqueeze(-1)).square().sum() + alone.square().sum()

    monkeypatch.setattr(layouts, "_SMALLEST_SHARE", 0.0)
    model = Model(
        forward, a=layer(WIDTH, WIDTH), b=layer(WIDTH, WIDTH), c=layer(WIDTH, 5), v=torch.randn(WIDTH)
    )
    for wanted in ([True, False, True, False], [False] * 4, [True] * 4):
        torch._dynamo.reset()
        tracer = compile_and_compare(model, *batch(), torch.tensor(wanted))
        assert counts(tracer)[0] >= 2


def test_rows_that_meet_between():
    """Tokens are mixed by a product that is no attention: it gets all of a sample, if any is needed."""

    def forward(m: nn.Module, x: Tensor, shown: Tensor) -> Tensor:
        h = torch.tanh(m.a(x)) * shown.unsqueeze(-1)
        mixed = torch.einsum("ts,bsf->btf", m.mix, h) + h
        return (torch.tanh(m.b(mixed)) * shown.unsqueeze(-1)).sum(1).square().sum()

    model = Model(forward, a=layer(WIDTH, 6), b=layer(6, 6), mix=torch.randn(T, T))
    tracer = compile_and_compare(model, *batch((5, 0, 1, 0)))
    assert counts(tracer) == (2, 2)


def frozen(model: Padded) -> Padded:
    model.down.requires_grad_(False)
    return model


def test_a_frozen_layer_between():
    tracer = compile_and_compare(frozen(Padded()), *batch())
    assert counts(tracer) == (4, 5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_first_layer_that_is_not_trained(bias):
    """It has no backward, and is no site; its product is computed on few rows all the same."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.a, self.b = nn.Embedding(20, 6), nn.Linear(6, 5, bias=bias), nn.Linear(5, 4)
            self.double()
            self.table.requires_grad_(False)
            self.a.requires_grad_(False)

        def forward(self, ids: Tensor, shown: Tensor) -> Tensor:
            return (self.b(torch.tanh(self.a(self.table(ids)))) * shown.unsqueeze(-1)).sum(1).square().sum()

    tracer = compile_and_compare(Frozen(), torch.randint(20, (B, T)), batch()[1])
    assert counts(tracer) == (1, 1)
    (product,) = (
        node for node in tracer.trace.graph.nodes if node.target in (aten.mm.default, aten.addmm.default)
    )
    assert isinstance(product.meta["val"].shape[0], torch.SymInt)


class Shift(torch.autograd.Function):
    """A gradient that is no derivative, and not zero where the output's is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy + 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_a_gradient_that_is_not_zero_where_nothing_is_needed():
    """Its rows are not all carried; at a linear whose rows are known to have none, they end."""
    model = Padded(between=lambda h: Shift.apply(h))
    tracer = Tracer(compact=True)
    torch.compile(model, backend=tracer, fullgraph=True)(*batch()).backward()
    shifted = [
        node
        for node in tracer.trace.graph.find_nodes(op="call_function", target=aten.add.Tensor)
        if 1 in node.args
    ]
    assert len(shifted) == 2
    assert all(isinstance(node.meta["val"].shape[0], int) for node in shifted)


@pytest.mark.parametrize("what", ["all read", "unknown op", "not masked"])
def test_near_misses_carry_all_rows(what):
    class Shown(Padded):
        def forward(self, x: Tensor, shown: Tensor) -> Tensor:
            h = self.body(x)
            if what == "unknown op":
                h = torch.linalg.qr(h).Q @ torch.ones(WIDTH, WIDTH, dtype=DOUBLE)
            mean = (self.body(h) * shown.unsqueeze(-1)).sum(1)
            if what == "not masked":
                mean = self.body(h).sum(1)
            loss = self.head(mean).square().mean()
            return loss + h.square().mean() if what == "all read" else loss

    tracer = compile_and_compare(Shown(), *batch())
    assert counts(tracer)[0] == 0
    assert not tracer.trace.graph.find_nodes(op="call_function", target=ops.needed_rows.default)


@pytest.mark.parametrize("decomposed", [False, True])
def test_one_graph_serves_batches_of_any_size(decomposed):
    model, tracer = Padded(), Tracer(INDUCTORS() if decomposed else None, compact=True)
    compiled = torch.compile(model, backend=tracer, fullgraph=True, dynamic=True)
    for samples, tokens in ((4, 16), (3, 7), (5, 2), (2, 30)):
        x, shown = torch.randn(samples, tokens, WIDTH, dtype=DOUBLE), torch.rand(samples, tokens) > 0.6
        assert_equal(gradients(model, compiled, x, shown), gradients(model, model, x, shown))
    assert counts(tracer) == (4, 5)
    assert not [
        node
        for node in tracer.trace.graph.find_nodes(op="call_function", target=aten.sym_size.int)
        if node.args[0].target in (aten.view.default, aten._unsafe_index.Tensor)
    ]


def test_a_small_batch_carries_all_rows(monkeypatch):
    monkeypatch.setattr(layouts, "_FEWEST_ROWS", B * T + 1)
    assert counts(compile_and_compare(Padded(), *batch()))[0] == 0


def test_one_sample():
    """[1, T, …] then looks like what is broadcast over samples."""
    x, shown = batch((5,))
    assert counts(compile_and_compare(Padded(), x, shown)) == (4, 5)


def test_widths_that_are_numbers_of_rows():
    """A weight [N, N], and a gradient of it, are no rows."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(B * T, B * T), nn.Linear(B * T, B * T)
            self.double()

        def forward(self, x: Tensor, shown: Tensor) -> Tensor:
            h = self.b(torch.tanh(self.a(x)))
            return (h * shown.unsqueeze(-1)).sum(1).square().mean()

    _, shown = batch()
    assert counts(compile_and_compare(Square(), torch.randn(B, T, B * T, dtype=DOUBLE), shown)) == (2, 2)


def test_packed_projections_and_gates():
    """Split, sliced, concatenated and cast on the way."""

    def forward(m: nn.Module, x: Tensor, shown: Tensor) -> Tensor:
        q, k = m.a(x).split(6, dim=-1)
        gate, up = torch.cat([F.silu(q), k[..., :2]], -1), m.b(k.float().double())
        h = (gate * up).unflatten(-1, (2, 4)).softmax(-1).flatten(-2)
        return (m.c(h) * shown.unsqueeze(-1)).sum(1).square().sum()

    model = Model(forward, a=layer(WIDTH, 12), b=layer(6, 8), c=layer(8, 5))
    tracer = Tracer(compact=True)
    inputs = batch()
    compiled = torch.compile(model, backend=tracer, fullgraph=True)
    found, expected = (gradients(model, run, *inputs) for run in (compiled, model))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # one cast to float32 on the way
    assert counts(tracer) == (3, 3)


def test_an_input_that_wants_a_gradient():
    """What else reads it, and which rows of it, is not all known."""
    x, shown = batch()
    x.requires_grad_()
    model = Padded()
    tracer = Tracer(compact=True)
    found = []
    for run in (torch.compile(model, backend=tracer, fullgraph=True), model):
        x.grad = None
        gradients(model, run, x, shown)
        found.append(x.grad)
    torch.testing.assert_close(*found)
    assert counts(tracer)[0] == 0


def test_a_learned_prefix():
    """A parameter with rows, read by a layer that needs some of them and by one that needs others."""

    def forward(m: nn.Module, x: Tensor, shown: Tensor) -> Tensor:
        prefix = m.prefix.expand(B, -1, -1)
        h = torch.tanh(m.a(prefix * x)) + prefix
        first = m.b(prefix[:, 0] + h[:, 0])
        return ((h * shown.unsqueeze(-1)).sum(1) * first).square().sum()

    model = Model(forward, a=layer(WIDTH, WIDTH), b=layer(WIDTH, WIDTH), prefix=torch.randn(1, T, WIDTH))
    assert counts(compile_and_compare(model, *batch((0, 4, 1, 0)))) == (1, 2)


def test_a_hidden_state_that_is_returned():
    class Returned(Padded):
        def forward(self, x: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x)
            mean = (self.body(h) * shown.unsqueeze(-1)).sum(1)
            return self.head(mean).square().mean(), h

    model, tracer = Returned(), Tracer(compact=True)
    compiled = torch.compile(model, backend=tracer, fullgraph=True)
    inputs, found = batch(), []
    for run in (compiled, model):
        found.append(gradients(model, lambda *args, run=run: sum(t.sum() for t in run(*args)), *inputs))
    assert_equal(*found)
    assert counts(tracer)[0] == 0


def test_many_parts_of_one_tensor():
    def forward(m: nn.Module, x: Tensor, shown: Tensor) -> Tensor:
        i, f, g, o, r = m.a(x).split(3, dim=-1)
        h = i.sigmoid() * f.tanh() + g.tanh() * o.sigmoid() + r
        return (m.b(h) * shown.unsqueeze(-1)).sum(1).square().sum()

    model = Model(forward, a=layer(WIDTH, 15), b=layer(3, 5))
    assert counts(compile_and_compare(model, *batch())) == (2, 2)


def test_heads_as_many_as_tokens():
    """[B, heads, T, …] then looks like [B, T, …]."""
    sizes = {"vocab_size": 99, "hidden_size": 24, "num_attention_heads": 12, "intermediate_size": 20}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = hf.BertConfig(**sizes, **rates, num_hidden_layers=2, max_position_embeddings=12)

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = hf.BertModel(config, add_pooling_layer=False).double()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
            return F.normalize((hidden * attention_mask.unsqueeze(-1)).sum(1)).cos().sum()

    inputs = classes()
    assert inputs["input_ids"].shape[1] == 12
    tracer = compile_and_compare(Mean(), inputs["input_ids"], inputs["attention_mask"])
    assert counts(tracer) == (12, 12)
