"""Attention is in the report, once for each, whatever form it reaches the graph in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from tracing import Model, layer, trace, value

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
