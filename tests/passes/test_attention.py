"""Every attention becomes one op and one record, whatever form it comes in; near-misses do not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.nn.attention.flex_attention import flex_attention
from tracing import DOUBLE, Model, layer, trace, value

SAMPLES, HEADS, TOKENS, WIDTH = 2, 3, 5, 4
FEATURES = HEADS * WIDTH
PRODUCT = 2 * SAMPLES * HEADS * TOKENS * TOKENS * WIDTH  # FLOPs of Q·Kᵀ, or of A·V


class Attention(nn.Module):
    """Self-attention; `core` computes softmax(Q·Kᵀ)·V from the heads [samples, heads, tokens, width]."""

    def __init__(self, core: Any) -> None:
        super().__init__()
        self.qkv, self.out = layer(FEATURES, 3 * FEATURES), layer(FEATURES, FEATURES)
        self.softmax = nn.Softmax(-1)
        self._core = core

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).view(SAMPLES, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        return self.out(self._core(self, *heads).transpose(1, 2).reshape(x.shape))


def fused(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def fused_with_dropout(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """On CPU this is taken apart. (At this rate nothing is ever dropped.)"""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=1e-12)


def function(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(torch.softmax(q @ k.transpose(-1, -2), -1), 0.0) @ v


def submodule(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return m.softmax(q @ k.transpose(-1, -2)) @ v


def einsum(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


@pytest.mark.parametrize("decompositions", [None, select_decomp_table()], ids=["as traced", "decomposed"])
@pytest.mark.parametrize(
    ("core", "shape"),
    [
        (fused, (SAMPLES, HEADS, TOKENS, WIDTH)),
        (fused_with_dropout, (SAMPLES * HEADS, TOKENS, WIDTH)),
        (function, (SAMPLES * HEADS, TOKENS, WIDTH)),
        (submodule, (SAMPLES * HEADS, TOKENS, WIDTH)),
        (einsum, (SAMPLES * HEADS, TOKENS, WIDTH)),
    ],
)
def test_attention_is_one_record_under_its_modules_name(core: Any, shape: Any, decompositions: Any) -> None:
    model = Model(lambda m, x: m.two(m.one(x)), one=Attention(core), two=Attention(core))
    found = trace(model, value(SAMPLES, TOKENS, FEATURES), decompositions=decompositions, rtol=1e-10)
    assert [linear.name for linear in found.linears] == ["one.qkv", "one.out", "two.qkv", "two.out"]
    attentions = [record for record in found.records if record.kind == "attention"]
    assert [(r.name, r.shape, r.reason) for r in attentions] == [(name, shape, "") for name in ("one", "two")]
    assert len(found.attention_ops) == 2
    assert {record.flops_forward for record in attentions} == {2 * PRODUCT}
    # A fused op computes Q·Kᵀ again.
    assert {record.flops_backward for record in attentions} == {(5 if core is fused else 4) * PRODUCT}


def test_sites_keep_their_numbers_when_the_products_of_an_attention_become_one_record() -> None:
    """The records after the attention move up, and every op must still find its own."""
    model = Model(lambda m, x: m.last(m.attention(x)), attention=Attention(function), last=layer(FEATURES, 7))
    found = trace(model, value(SAMPLES, TOKENS, FEATURES))
    assert [record.name for record in found.records] == [
        "attention.qkv",
        "attention",
        "attention.out",
        "last",
    ]
    assert [linear.shape[2] for linear in found.linears] == [3 * FEATURES, FEATURES, 7]


def test_grouped_queries_count_every_head() -> None:
    """One head of keys and values for three of queries: the FLOPs are those of the queries' heads."""

    def forward(m: Any, q: Tensor, kv: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, kv, kv, enable_gqa=True)

    q, kv = value(SAMPLES, HEADS, TOKENS, WIDTH), value(SAMPLES, 1, TOKENS, WIDTH)
    (record,) = trace(Model(lambda m, q, kv: m.core(q, kv), core=Model(forward)), q, kv).records
    assert (record.name, record.kind, record.flops_forward) == ("core", "attention", 2 * PRODUCT)


def test_cross_attention_counts_queries_and_keys() -> None:
    q, k, v = value(1, 1, 3, 4), value(1, 1, 7, 4), value(1, 1, 7, 4)
    core = Model(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v))
    (record,) = trace(Model(lambda m, *x: m.core(*x), core=core), q, k, v).records
    assert (record.shape, record.flops_forward) == ((1, 1, 3, 4), 2 * 2 * 3 * 7 * 4)


def test_two_products_of_activations_are_no_attention_without_a_softmax() -> None:
    core = Model(lambda m, a, b, c: (a @ b) @ c)
    inputs = value(3, 5, 6), value(3, 6, 4), value(3, 4, 2)
    found = trace(Model(lambda m, *x: m.core(*x), core=core), *inputs)
    assert [(r.kind, r.name, r.reason) for r in found.records] == [
        ("matmul", "core", "both operands are activations")
    ] * 2


def test_one_product_beside_a_softmax_is_no_attention() -> None:
    core = Model(lambda m, a, b: torch.softmax(a @ b, -1))
    found = trace(Model(lambda m, *x: m.core(*x), core=core), value(3, 5, 6), value(3, 6, 4))
    assert [record.kind for record in found.records] == ["matmul"]


def test_softmax_over_the_queries_makes_no_attention() -> None:
    core = Model(lambda m, q, k, v: scores(q, k).softmax(-2) @ v)
    found = trace(Model(lambda m, *x: m.core(*x), core=core), *heads())
    assert [record.kind for record in found.records] == ["matmul", "matmul"]


def test_softmax_that_is_not_between_the_products() -> None:
    core = Model(lambda m, a, b, c: torch.softmax((a @ b) @ c, -1) * torch.softmax(a, -1)[..., :2])
    inputs = value(3, 5, 6), value(3, 6, 4), value(3, 4, 2)
    found = trace(Model(lambda m, *x: m.core(*x), core=core), *inputs)
    assert [record.kind for record in found.records] == ["matmul", "matmul"]


DECOMPOSITIONS = pytest.mark.parametrize(
    "decompositions", [None, select_decomp_table()], ids=["as traced", "decomposed"]
)


def heads(keys: int = TOKENS) -> list[Tensor]:
    """Q, K and V."""
    return [value(SAMPLES, HEADS, tokens, WIDTH) for tokens in (TOKENS, keys, keys)]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
# Of every head some keys are masked; of the first sample all, and of the second all for a few queries.
SOME = torch.zeros(SAMPLES, 1, TOKENS, TOKENS, dtype=torch.bool)
SOME[..., -2:], SOME[0], SOME[1, :, 1:3] = True, True, True
CHAINS: dict[str, Any] = {
    "plain": lambda q, k, v: scores(q, k).softmax(-1) @ v,
    "scaled": lambda q, k, v: (scores(q, k) * 0.5).softmax(-1) @ v,
    "divided": lambda q, k, v: (scores(q, k) / 3).softmax(-1) @ v,
    "scaled queries": lambda q, k, v: scores(q * 0.5, k).softmax(-1) @ v,
    "added mask": lambda q, k, v: (scores(q, k) * 0.5 + torch.arange(TOKENS) * 0.1).softmax(-1) @ v,
    "scaled after the mask": lambda q, k, v: ((scores(q, k) * 2 + torch.arange(TOKENS)) / 8).softmax(-1) @ v,
    "filled": lambda q, k, v: scores(q, k).masked_fill(~CAUSAL, -torch.inf).softmax(-1) @ v,
    "where": lambda q, k, v: torch.where(CAUSAL, scores(q, k), -torch.inf).softmax(-1) @ v,
    "filled with a number": lambda q, k, v: scores(q, k).masked_fill(~CAUSAL, -1e9).softmax(-1) @ v,
    "where with a number": lambda q, k, v: (torch.where(CAUSAL, scores(q, k), -1e9) / 8).softmax(-1) @ v,
    "filled in all of a row": lambda q, k, v: scores(q, k).masked_fill(SOME, -1e9).softmax(-1) @ v,
    "filled twice": lambda q, k, v: (
        scores(q, k).masked_fill(SOME, -1e9).masked_fill(~CAUSAL, -torch.inf).softmax(-1) @ v
    ),
    "filled and dropped": lambda q, k, v: (
        F.dropout(torch.where(SOME, -1e9, scores(q, k)).softmax(-1), 1e-12) @ v
    ),
    "softmax in float32": lambda q, k, v: scores(q, k).softmax(-1, dtype=torch.float32).to(DOUBLE) @ v,
    "dropped": lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 1e-12) @ v,
    "weighted": lambda q, k, v: (scores(q, k).softmax(-1) * torch.arange(TOKENS)) @ v,
    "one of three dimensions": lambda q, k, v: scores(q[0], k[0]).softmax(-1) @ v[0],
}


@DECOMPOSITIONS
@pytest.mark.parametrize("name", CHAINS)
def test_chain(name: str, decompositions: Any) -> None:
    core = Model(lambda m, *x: CHAINS[name](*x))
    rtol = 1e-6 if "float32" in name else 1e-10
    found = trace(
        Model(lambda m, *x: m.core(*x), core=core), *heads(), decompositions=decompositions, rtol=rtol
    )
    assert [(r.name, r.kind, r.rewritten) for r in found.records] == [("core", "attention", True)]
    assert found.backward_products == 0
    (op,) = found.attention_ops.values()
    assert op.args[-1] == (1 if "three" in name else HEADS)
    assert (op.args[4] is not None) == (
        name in ("softmax in float32", "dropped", "filled and dropped", "weighted")
    )


@DECOMPOSITIONS
def test_scores_that_are_a_sum_of_products(decompositions: Any) -> None:
    """As with DeBERTa's positions: it is one attention, which is left alone, and all products are listed."""
    core = Model(lambda m, q, k, v: (scores(q, k) + scores(q, k * 2) + scores(q, k * 3)).softmax(-1) @ v)
    found = trace(
        Model(lambda m, *x: m.core(*x), core=core), *heads(), decompositions=decompositions, rtol=1e-10
    )
    kinds = ["attention", "matmul", "matmul"]
    assert [(r.name, r.kind, r.rewritten) for r in found.records] == [("core", kind, False) for kind in kinds]
    assert all(record.reason for record in found.records)
    assert found.backward_products == found.products_before


FINITE = "the op .*(where|masked_fill).* stands between its products"
ELSEWHERE = "a gradient flows into its scores or probabilities from elsewhere, too"
OTHER_USE = "the gradient of its scores or probabilities is used for something else, too"


@DECOMPOSITIONS
@pytest.mark.parametrize(
    ("core", "reason"),
    [
        (lambda q, k, v: scores(q, k).tanh().softmax(-1) @ v, "the op aten.tanh.default stands between"),
        (lambda q, k, v: scores(q, k).masked_fill(~CAUSAL, -100.0).softmax(-1) @ v, FINITE),
        (lambda q, k, v: (scores(q, k).masked_fill(~CAUSAL, -1e5) / 64).softmax(-1) @ v, FINITE),
        (
            lambda q, k, v: (scores(q, k).masked_fill(SOME, -1e9) + torch.arange(TOKENS)).softmax(-1) @ v,
            "filled with a finite number, and something is added",
        ),
        (lambda q, k, v: (scores(q, k) + q[..., :1] * 2).softmax(-1) @ v, OTHER_USE),
        (lambda q, k, v: (scores(q, k) * q.sum()).softmax(-1) @ v, "the op aten.mul.Tensor stands between"),
        (lambda q, k, v: (a := scores(q, k).softmax(-1)) @ v + a.square().sum(-1, True), ELSEWHERE),
        (lambda q, k, v: (s := scores(q, k)).softmax(-1) @ v + s.square().sum(-1, True), ELSEWHERE),
        (lambda q, k, v: (scores(q, k).softmax(-1) * q.sum()) @ v, OTHER_USE),
        (lambda q, k, v: scores(q.detach(), k.detach()).softmax(-1) @ v, "queries and keys want no gradient"),
    ],
)
def test_near_misses_are_attentions_that_are_left_alone(core: Any, reason: str, decompositions: Any) -> None:
    found = trace(
        Model(lambda m, *x: m.core(*x), core=Model(lambda m, *x: core(*x))),
        *heads(),
        decompositions=decompositions,
        rtol=1e-10,
    )
    (record,) = found.records
    assert (record.name, record.kind, record.rewritten) == ("core", "attention", False)
    assert re.search(reason, record.reason)
    assert found.backward_products == found.products_before
    assert not found.attention_ops


@DECOMPOSITIONS
@pytest.mark.parametrize("frozen", ["q", "k", "v"])
def test_a_gradient_that_is_not_asked_for(frozen: str, decompositions: Any) -> None:
    inputs = heads()
    inputs["qkv".index(frozen)].requires_grad_(False)
    core = Model(lambda m, *x: CHAINS["scaled"](*x))
    found = trace(Model(lambda m, *x: m.core(*x), core=core), *inputs, decompositions=decompositions)
    assert [record.rewritten for record in found.records] == [True]
    assert found.backward_products == 0


@DECOMPOSITIONS
@pytest.mark.parametrize("fused_op", [True, False])
def test_several_attentions_in_one_module(fused_op: bool, decompositions: Any) -> None:
    """Each has its call. Here the second attends to what the first made, with the same keys and values."""
    attend = F.scaled_dot_product_attention if fused_op else CHAINS["scaled"]
    core = Model(lambda m, q, k, v: attend(attend(q, k, v), k, v))
    model = Model(lambda m, *x: m.core(*x), core=core)
    found = trace(model, *heads(keys=7), decompositions=decompositions, rtol=1e-10)
    assert [(r.name, r.rewritten, r.call) for r in found.records] == [("core", True, 0), ("core", True, 1)]
    assert len(found.attention_ops) == 2


@pytest.mark.parametrize("name", ["fused", "scaled", "dropped"])
def test_sizes_that_are_not_known_when_it_is_traced(name: str) -> None:
    attend = F.scaled_dot_product_attention if name == "fused" else CHAINS[name]
    core = Model(lambda m, *x: attend(*x))
    found = trace(Model(lambda m, *x: m.core(*x), core=core), *heads(keys=7), dynamic=True, rtol=1e-10)
    assert [(record.name, record.rewritten) for record in found.records] == [("core", True)]
    assert found.backward_products == 0


def test_an_attention_and_a_linear_of_one_name() -> None:
    core = Model(
        lambda m, x: F.scaled_dot_product_attention(*[F.linear(x, m.weight)] * 3), weight=value(4, 4)
    )
    found = trace(Model(lambda m, x: m.core(x), core=core), value(SAMPLES, HEADS, TOKENS, WIDTH))
    assert [(r.name, r.kind) for r in found.records] == [("core", "linear"), ("core.attention", "attention")]


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_flex_attention_is_reported() -> None:
    """With no gradient: PyTorch has none for it on CPU."""
    core = Model(lambda m, *x: flex_attention(*x) * m.scale, scale=value(1))
    inputs = [value(1, 2, 16, 16, grad=False) for _ in range(3)]
    (record,) = trace(Model(lambda m, *x: m.core(*x), core=core), *inputs, rtol=1e-6).records
    assert (record.name, record.kind, record.rewritten) == ("core", "attention", False)
    assert record.reason.startswith("the backward of FlexAttention is generated")


def test_learned_queries_attend() -> None:
    """A product with a parameter is else a linear, batched."""
    core = Model(lambda m, k, v: CHAINS["scaled"](m.latents, k, v), latents=value(SAMPLES, HEADS, 2, WIDTH))
    _, k, v = heads()
    found = trace(Model(lambda m, *x: m.core(*x), core=core), k, v)
    assert [(r.name, r.kind, r.rewritten) for r in found.records] == [("core", "attention", True)]
