"""Pruning to n of four against its eager reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_compile.kernels.triton import reference
from sparse_compile.kernels.triton.neighbours import keep_of_four

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(24, 36, 6), (3, 5, 1), (64, 64, 64), (70, 37, 14), (1, 1, 1)]  # N, O, T


def problem(
    n: int, outputs: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """dY with some rows zero, P, and which rows live. No two entries of R have the same magnitude: which of
    them is kept would be anybody's choice."""
    dy = torch.randperm(n * outputs, device=device).view(n, outputs).float().add(1) / (n * outputs)
    dy *= torch.randint(0, 2, (n, outputs), device=device) * 2 - 1
    live = torch.rand(n, device=device) < 0.7
    base = torch.zeros(tokens, outputs, device=device)
    if dtype is torch.float32:  # else the difference would be rounded to such entries
        base = torch.rand(tokens, outputs, device=device)
    return [(dy * live.unsqueeze(1)).to(dtype), base.to(dtype), live]


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_keep_of_four(size: tuple[int, int, int], keep: int, device: torch.device) -> None:
    dy, base, live = problem(*size, device, torch.float32)
    for ours, wanted in zip(
        keep_of_four(dy, base, live, keep), reference.keep_of_four(dy, base, live, keep), strict=True
    ):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_keeps_as_many_and_the_largest(dtype: torch.dtype, device: torch.device) -> None:
    dy, base, live = problem(64, 48, 16, device, dtype)
    for ours, wanted in zip(
        keep_of_four(dy, base, live, 2), reference.keep_of_four(dy, base, live, 2), strict=True
    ):
        assert ours.dtype is dtype
        assert int((ours.unflatten(1, (-1, 4)) != 0).sum(2).max()) == 2
        groups = [t.unflatten(1, (-1, 4)).abs().float().sum(2) for t in (ours, wanted)]
        assert torch.equal(*groups), "of equal ones either may be kept, and nothing smaller"


def test_ties_keep_no_more_than_they_may(device: torch.device) -> None:
    dy = torch.ones(32, 32, device=device)
    live = torch.ones(32, dtype=torch.bool, device=device)
    for kept in keep_of_four(dy, torch.zeros(8, 32, device=device), live, 2):
        assert ((kept.unflatten(1, (-1, 4)) != 0).sum(2) == 2).all()


def test_what_is_not_finite_is_kept(device: torch.device) -> None:
    dy = torch.randn(32, 32, device=device)
    dy[3, 5], dy[9, 8] = torch.nan, torch.inf
    live = torch.ones(32, dtype=torch.bool, device=device)
    of_features, of_rows = keep_of_four(dy, torch.zeros(8, 32, device=device), live, 1)
    for kept in (of_features, of_rows.t()):
        assert kept[3, 5].isnan()
        assert kept[9, 8].isinf()


def test_strides_do_not_matter(device: torch.device) -> None:
    dy, base, live = problem(24, 36, 6, device, torch.float32)
    wanted = reference.keep_of_four(dy, base, live, 2)
    for ours, theirs in zip(keep_of_four(dy.t().contiguous().t(), base, live, 2), wanted, strict=True):
        assert torch.equal(ours, theirs)
