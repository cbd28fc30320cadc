"""The backward of a few query rows is that of all of them where dO is zero in the others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.kernels.attention import Forward, groups
from sparse_compile.kernels.attention_chain import Chain
from sparse_compile.kernels.attention_fused import Fused
from sparse_compile.methods import exact

SAMPLES, HEADS, QUERIES, FEATURES = 5, 3, 40, 8
ROWS = {
    "one group": [3, 20, 5, 1, 12],
    "two groups, apart": [40, 2, 39, 0, 3],
    "one sample": [0, 0, 7, 0, 0],
    "none": [0, 0, 0, 0, 0],
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def chosen(counts: list[int], queries: int = QUERIES) -> Tensor:
    """bool [B, T] with so many rows of each sample, at random."""
    return torch.stack([torch.randperm(queries) < count for count in counts])


def heads(tokens: int, *, apart: bool = False) -> Tensor:
    """[B, H, tokens, D]; heads lie side by side in memory, as a model has it, or apart."""
    x = torch.randn(SAMPLES, tokens, HEADS, FEATURES, dtype=torch.float64).transpose(1, 2)
    return x.contiguous() if apart else x


def masks(keys: int) -> dict[str, Tensor | None]:
    lengths = torch.tensor([keys, keys - 3, 5, 4, keys])
    padding = torch.arange(keys) >= lengths.view(-1, 1, 1, 1)
    zeros = torch.zeros(SAMPLES, 1, 1, keys, dtype=torch.float64)
    return {
        "none": None,
        "padding": zeros.masked_fill(padding, -torch.inf),
        "each query's": torch.randn(SAMPLES, 1, QUERIES, keys, dtype=torch.float64),
        "each head's": torch.randn(1, HEADS, QUERIES, keys, dtype=torch.float64),
        "two dimensions": torch.randn(QUERIES, keys, dtype=torch.float64),
    }


def fused(keys: int = QUERIES, mask: str = "none", causal: bool = False, apart: bool = False) -> Fused:
    q, k, v = heads(QUERIES, apart=apart), heads(keys, apart=apart), heads(keys, apart=apart)
    scale, added = 0.3, masks(keys)[mask]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=added, scale=scale
    )
    return Fused(q, k, v, out, lse, causal, added, scale)


def chain(keys: int = QUERIES, dropout: bool = False) -> Chain:
    q, kt, v = heads(QUERIES, apart=True), heads(keys).transpose(2, 3), heads(keys, apart=True)
    a = torch.softmax(0.3 * q @ kt, -1)
    dropped = a * (torch.rand_like(a) < 0.8) / 0.8
    return Chain(dropped if dropout else a, a if dropout else None, v, q, kt, 0.3)


FORMS = {
    "fused": fused,
    "fused, heads apart": lambda: fused(apart=True),
    "fused, causal": lambda: fused(causal=True),
    "fused, other keys": lambda: fused(keys=17),
    "fused, padding": lambda: fused(mask="padding"),
    "fused, padding, other keys": lambda: fused(mask="padding", keys=17),
    "fused, a mask of each query": lambda: fused(mask="each query's", apart=True),
    "fused, a mask of each head": lambda: fused(mask="each head's"),
    "fused, a mask of two dimensions": lambda: fused(mask="two dimensions"),
    "fused, causal and a mask": lambda: fused(mask="each query's", causal=True),
    "chain": chain,
    "chain, dropout": lambda: chain(dropout=True),
    "chain, dropout, other keys": lambda: chain(keys=17, dropout=True),
}


def true_gradients(form: Forward, do: Tensor) -> tuple[Tensor, ...]:
    """By autograd, from the scores on."""
    if isinstance(form, Fused):
        leaves = [x.clone().requires_grad_() for x in (form.q, form.k, form.v)]
        q, k, v = leaves
        later = torch.ones(form.shape[2], form.keys, dtype=torch.bool).triu(1) & form.causal
        scores = (q @ k.mT * form.scale).masked_fill(later, -torch.inf)
        a = torch.softmax(scores if form.mask is None else scores + form.mask, -1)
    else:
        assert isinstance(form, Chain)
        leaves = [x.clone().requires_grad_() for x in (form.q, form.kt.mT, form.v)]
        q, k, v = leaves
        a = torch.softmax(q @ k.mT * form.scale, -1)
        if form.probabilities is not None:
            a = a * (form.dropped / form.probabilities)
    return torch.autograd.grad(a @ v, leaves, do)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Forward:
    return FORMS[request.param]()


def test_all_rows(form: Forward) -> None:
    do = heads(QUERIES, apart=True)
    for gradient, wanted in zip(form.backward(do), true_gradients(form, do), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("rows", ROWS)
def test_rows_give_the_gradients_of_a_gradient_that_is_zero_elsewhere(form: Forward, rows: str) -> None:
    """Also if it is not: rows that fill up a group add nothing."""
    live = chosen(ROWS[rows])
    do = heads(QUERIES, apart=True)
    found = form.backward_of_rows(do, groups(live))
    expected = true_gradients(form, do * live[:, None, :, None])
    for gradient, wanted, dense in zip(found, expected, form.backward(do), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-13)
        assert gradient.stride() == dense.stride()
    assert not found[0].transpose(1, 2)[~live].any()


def test_written_out(form: Forward) -> None:
    f, do = form.written_out(), heads(QUERIES, apart=True)
    da = do @ f.v.mT
    a = f.dropped if f.probabilities is None else f.probabilities
    ds = (f.dropped * da - a * (f.dropped * da).sum(-1, keepdim=True)) * f.scale
    found = form.like_gradients((ds @ f.k, ds.mT @ f.q, f.dropped.mT @ do))
    for gradient, dense in zip(found, form.backward(do), strict=True):
        torch.testing.assert_close(gradient, dense, rtol=1e-11, atol=1e-13)
        assert gradient.stride() == dense.stride()


def test_grouped_query_heads() -> None:
    q, do = torch.randn(2, 6, 10, 4).double(), torch.randn(2, 6, 10, 4).double()
    k, v = torch.randn(2, 2, 2, 7, 4).double()
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    form = Fused(q, k, v, out, lse, False, None, None)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, enable_gqa=True), leaves, do)
    f = form.written_out()
    ds = f.dropped * (do @ f.v.mT - (do * out).sum(-1, keepdim=True)) * f.scale
    written_out = form.like_gradients((ds @ f.k, ds.mT @ f.q, f.dropped.mT @ do))
    every = groups(torch.ones(2, 10, dtype=torch.bool))
    for found in (form.backward(do), form.backward_of_rows(do, every), written_out):
        for gradient, each in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, each, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("rows", "sizes"), [("one group", [20]), ("two groups, apart", [40, 3]), ("none", [])]
)
def test_samples_with_few_rows_do_not_pay_for_those_with_many(rows: str, sizes: list[int]) -> None:
    live = chosen(ROWS[rows])
    found = groups(live)
    assert [group.queries.shape[1] for group in found] == sizes
    taken = torch.zeros_like(live)
    for group in found:
        assert all(len(set(queries.tolist())) == len(queries) for queries in group.queries)
        taken[group.index] = True
    assert bool(taken[live].all())
    samples = [sample for group in found for sample in group.samples.tolist()]
    assert sorted(samples) == live.any(1).nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("apart", [False, True])
def test_live_queries(apart: bool) -> None:
    """A query counts if it is not zero in any one head and feature."""
    do = torch.zeros_like(heads(QUERIES, apart=apart))
    assert not exact.live_queries(do).any()
    do[1, 2, 3, 7], do[4, 0, 0, 0], do[2, 1, 9, 3] = 1e-300, torch.nan, torch.inf
    assert exact.live_queries(do).nonzero().tolist() == [[1, 3], [2, 9], [4, 0]]
    assert exact.live_queries(heads(QUERIES, apart=apart)) is None
    do[:] = 0
    do[:, 1, :, 7] = 1
    assert exact.live_queries(do) is None


@pytest.mark.parametrize("keys", [8, 128, 4096])
@pytest.mark.parametrize("stored", [False, True])
def test_skipping_pays_from_the_number_on_at_which_it_saves_more_than_it_moves(
    stored: bool, keys: int
) -> None:
    fewest = exact.fewest_to_skip_in_attention(100, keys, 64, stored=stored)
    for computed in range(101):
        saved = (8 if stored else 10) * keys * 64 * (100 - computed)
        moved = computed * (4 * 64 + (2 * keys if stored else 0)) + 100 * 64
        assert (100 - computed >= fewest) == (saved > 80 * moved)


@pytest.mark.parametrize(("stored", "fewest"), [(False, 26), (True, 44)])
def test_skipping_pays_if_enough_rows_are_zero(stored: bool, fewest: int) -> None:
    """A quarter of them with 128 keys, and more if there are probabilities to gather."""
    assert exact.fewest_to_skip_in_attention(100, 128, 64, stored=stored) == fewest


@pytest.mark.parametrize("zero", [0, 4, 5, 20])
def test_too_few_zero_queries_are_not_told_of(zero: int) -> None:
    do = heads(QUERIES)
    rows = [(b, t) for b in range(do.shape[0]) for t in range(do.shape[2])][:zero]
    for b, t in rows:
        do[b, :, t] = 0
    live = exact.live_queries(do, fewest=5)
    if zero < 5:
        assert live is None
    else:
        assert live is not None
        assert [tuple(row) for row in (~live).nonzero().tolist()] == rows
