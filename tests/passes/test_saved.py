"""What is packed in a joint graph, and what must not be. Gradients are compared in test_prune_training.py."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sparse_compile.passes.saved import SMALLEST
from torch import Tensor, nn
from torch.fx import Graph
from tracing import DOUBLE, Model, Tracer

from sparse_compile import PruneSaved
from sparse_compile.sites import SavedRecord

aten = torch.ops.aten
ops = torch.ops.sparse_compile
INDUCTORS = functools.cache(lambda: torch._inductor.decomposition.select_decomp_table())


def packed(
    run: nn.Module, *inputs: Tensor, ratio: float = 0.5, decomposed: bool = False, as_published: bool = False
) -> tuple[list, Graph]:
    """The records of what the passes pack of a module's joint graph, and that graph."""
    tracer = Tracer(INDUCTORS() if decomposed else None)
    method = PruneSaved(ratio, as_published=as_published)
    compiled = torch.compile(run, backend=lambda gm, example: trace_with(tracer, gm, example, method))
    compiled(*inputs).square().sum().backward()
    return tracer.trace.saved, tracer.trace.graph


def trace_with(tracer: Tracer, gm: torch.fx.GraphModule, inputs: list, method: PruneSaved) -> Callable:
    return tracer(gm, inputs, saved=method)


def count(graph: Graph, op: torch._ops.OpOverload) -> int:
    return len(graph.find_nodes(op="call_function", target=op))


def linear() -> nn.Linear:
    return nn.Linear(32, 32)


def x() -> Tensor:
    return torch.randn(4, 8, 32, dtype=DOUBLE, requires_grad=True)


def shared(h: Tensor, layer: nn.Linear) -> Tensor:
    return layer(h * 3) + h.tanh()


CASES: dict[str, tuple[Callable, list[str]]] = {
    "linear input": (lambda m, x: m.b(m.a(x)), ["linear input"]),
    "gelu": (lambda m, x: m.b(F.gelu(m.a(x))), ["activation input"]),
    "gelu by tanh": (lambda m, x: m.b(F.gelu(m.a(x), approximate="tanh")), ["activation input"]),
    "silu": (lambda m, x: m.b(F.silu(m.a(x))), ["activation input"]),
    "relu": (lambda m, x: m.b(F.relu(m.a(x))), ["linear input", "mask"]),
    "norm": (lambda m, x: F.layer_norm(m.a(x), [32]) * 2, ["norm input"]),
    "norm by hand": (lambda m, x: m.norm(m.a(x)), ["norm input"]),
    "softmax": (lambda m, x: m.a(x).softmax(-1) * 2, ["attention"]),
    "gated": (lambda m, x: m.b(m.a(x) * m.b(x)), ["linear input", "other", "other"]),
    "dropout": (lambda m, x: F.dropout(m.a(x), 0.5), ["mask"]),
    "a view": (lambda m, x: m.b(m.a(x).flatten(0, 1)), ["linear input"]),
    "two readers": (lambda m, x: shared(m.a(x), m.b), ["activation input"]),
    # Near misses.
    "an input of the graph": (lambda m, x: m.a(x), []),
    "a loss": (lambda m, x: (m.a(x) - x).pow(2) * m.b(x), []),
    "a log-probability": (lambda m, x: m.a(x).log_softmax(-1), []),
    "a parameter": (lambda m, x: m.a(x) @ (m.b.weight * 2) + m.b.weight.sin().sum(), ["linear input"]),
    "too small": (lambda m, x: m.b(m.a(x[:, :-1])), []),
    "an integer": (lambda m, x: m.a(x) * (x > 9).long(), []),
    "a statistic": (lambda m, x: m.a(x) + m.b(x).amax(-1, keepdim=True), []),
}


@pytest.mark.parametrize("decomposed", [False, True], ids=["as traced", "decomposed"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_packed(case, decomposed):
    forward, kinds = CASES[case]
    records, graph = packed(
        Model(forward, a=linear(), b=linear(), norm=nn.RMSNorm(32)), x(), decomposed=decomposed
    )
    assert sorted(record.kind for record in records) == kinds
    masks, rounded = kinds.count("mask"), kinds.count("activation input")
    pruned = len(kinds) - masks - rounded
    assert count(graph, ops.pack.default) == count(graph, ops.unpack.default) == pruned
    assert count(graph, aten.round.default) == rounded
    products = [n for n in graph.nodes if n.target is aten.mul.Tensor]
    restored = [n for n in products if n.args[0].meta["val"].dtype == torch.int8]
    assert len(restored) == rounded
    assert count(graph, ops.pack_bits.default) == count(graph, ops.unpack_bits.default) == masks


@pytest.mark.parametrize("decomposed", [False, True], ids=["as traced", "decomposed"])
@pytest.mark.parametrize("as_published", [False, True], ids=["ours", "as published"])
@pytest.mark.parametrize("norm", [nn.LayerNorm(32), nn.RMSNorm(32)], ids=["layer", "rms"])
def test_statistics_of_a_norm_are_left_whole(norm, as_published, decomposed):
    """Means and scales have an entry a row, and of many rows enough entries to be worth packing. The linear
    behind a norm reads what is packed for the norm, unless it has to be as published."""
    many = torch.randn(4, SMALLEST, 32, dtype=DOUBLE, requires_grad=True)
    model = Model(lambda m, x: m.b(m.norm(m.a(x))), a=linear(), b=linear(), norm=norm.double())
    records, _ = packed(model, many, decomposed=decomposed, as_published=as_published)
    expected = [("linear input", 32), ("norm input", 32)] if as_published else [("norm input", 32)]
    assert sorted((record.kind, record.shape[-1]) for record in records) == expected


@pytest.mark.parametrize(("tokens", "kinds"), [(99, ["linear input"] * 2), (101, ["linear input"])])
def test_what_is_small_beside_the_largest_is_left_whole(tokens, kinds):
    """What a head reads is one token a sample: little memory, and most of the gradient."""
    x = torch.randn(64, tokens, 32, dtype=DOUBLE, requires_grad=True)
    model = Model(lambda m, x: m.b(m.b(m.a(x))[:, 0].sin()), a=linear(), b=linear())
    records, graph = packed(model, x)
    assert [record.kind for record in records] == kinds
    assert count(graph, ops.pack.default) == len(kinds)


def test_logits_are_not_what_others_are_small_beside():
    """They may be hundreds of times as wide as what the model works with, and are the loss's."""
    head = nn.Linear(32, 200 * 32)
    model = Model(lambda m, x: m.b(m.a(x)).log_softmax(-1), a=linear(), b=head)
    records, _ = packed(model, x())
    assert [record.kind for record in records] == ["linear input"]


def test_an_activation_of_one_dimension_is_packed():
    """It has no rows, and so no means."""
    vector = torch.randn(2 * SMALLEST, dtype=DOUBLE, requires_grad=True)
    weight = nn.Linear(2 * SMALLEST, 1, dtype=DOUBLE)
    records, graph = packed(
        Model(lambda m, x: (x * m.a.weight[0]).sin() * m.a.weight[0] * 2, a=weight), vector
    )
    assert [(record.kind, record.shape) for record in records] == [("other", (2 * SMALLEST,))]
    (pack,) = graph.find_nodes(op="call_function", target=ops.pack.default)
    assert pack.args[2] == 0


def test_ratio_0_packs_masks_only():
    model = Model(lambda m, x: F.dropout(F.relu(m.b(F.gelu(m.a(x)))), 0.5), a=linear(), b=linear())
    records, _ = packed(model, x(), ratio=0.0)
    assert [record.kind for record in records] == ["mask", "mask"]


def test_a_record_gives_sizes():
    (record,), _ = packed(Model(lambda m, x: m.b(m.a(x)), a=linear(), b=linear()), x())
    assert record == SavedRecord(
        name="a", kind="linear input", shape=(32, 32), bytes_dense=8 * SMALLEST, bytes_packed=128 + 8 * 512
    )


def test_the_batch_is_found_behind_views():
    """A linear's output is [N, O] in the graph; the samples are those of the [B, T, O] that is read."""
    _, graph = packed(Model(lambda m, x: m.b(m.a(x)), a=linear(), b=linear()), x())
    (pack,) = graph.find_nodes(op="call_function", target=ops.pack.default)
    assert (tuple(pack.args[0].meta["val"].shape), pack.args[1]) == ((32, 32), 4)


def test_fused_attention_runs_again_in_the_backward():
    def forward(m, x):
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in (m.a(x), m.b(x), m.c(x)))
        return F.scaled_dot_product_attention(q, k, v)

    model = Model(forward, a=linear(), b=linear(), c=linear())
    records, graph = packed(model, x())
    assert [record.kind for record in records] == ["attention"] * 3
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert count(graph, attention) == 2
