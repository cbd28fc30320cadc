"""The backward of a few query rows is that of all of them where dO is zero in the others."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.kernels import attention as kernel
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


def forward_of(
    keys: int = QUERIES, mask: str = "none", causal: bool = False, apart: bool = False
) -> kernel.Fused:
    q, k, v = heads(QUERIES, apart=apart), heads(keys, apart=apart), heads(keys, apart=apart)
    scale, added = 0.3, masks(keys)[mask]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=added, scale=scale
    )
    return kernel.Fused(q, k, v, out, lse, added, causal, scale)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"apart": True},
        {"causal": True},
        {"keys": 17},
        {"mask": "padding"},
        {"mask": "padding", "keys": 17},
        {"mask": "each query's", "apart": True},
        {"mask": "each head's"},
        {"mask": "two dimensions"},
    ],
    ids=str,
)
def test_rows_give_the_gradients_of_a_gradient_that_is_zero_elsewhere(options: dict, rows: str) -> None:
    forward, live = forward_of(**options), chosen(ROWS[rows])
    do = heads(QUERIES) * live[:, None, :, None]
    found = kernel.fused_backward_of_rows(do, forward, kernel.groups(live))
    leaves = [x.clone().requires_grad_() for x in (forward.q, forward.k, forward.v)]
    out = F.scaled_dot_product_attention(
        *leaves, attn_mask=forward.mask, is_causal=forward.causal, scale=forward.scale
    )
    expected = torch.autograd.grad(out, leaves, do)
    for gradient, wanted, dense in zip(found, expected, kernel.fused_backward(do, forward), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)
        assert gradient.stride() == dense.stride()
    assert not found[0].transpose(1, 2)[~live].any()


@pytest.mark.parametrize(
    ("rows", "sizes"), [("one group", [20]), ("two groups, apart", [40, 3]), ("none", [])]
)
def test_samples_with_few_rows_do_not_pay_for_those_with_many(rows: str, sizes: list[int]) -> None:
    live = chosen(ROWS[rows])
    groups = kernel.groups(live)
    assert [group.queries.shape[1] for group in groups] == sizes
    taken = torch.zeros_like(live)
    for group in groups:
        assert all(len(set(queries.tolist())) == len(queries) for queries in group.queries)
        taken[group.index] = True
    assert bool(taken[live].all())
    samples = [sample for group in groups for sample in group.samples.tolist()]
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


@pytest.mark.parametrize(("stored", "computed"), [(False, 74), (True, 56)])
def test_skipping_pays_if_enough_rows_are_zero(stored: bool, computed: int) -> None:
    """A quarter of them with 128 keys, and more if there are probabilities to gather."""
    pays = functools.partial(exact.skip_pays_in_attention, features=64, stored=stored)
    assert pays(computed, 100, keys=128)
    assert not pays(computed + 2, 100, keys=128)
    assert not pays(100, 100, keys=4096)
    assert not pays(10, 100, keys=8)
