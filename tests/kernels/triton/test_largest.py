"""The k live rows with the largest score, against their eager reference and what reuse keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sparse_compile.kernels.triton import reference
from sparse_compile.kernels.triton.largest import largest
from sparse_compile.methods import reuse


def check(scores: Tensor, live: Tensor, k: int, tokens: int) -> Tensor:
    """The rows that were kept, as the reference keeps them."""
    tally = torch.tensor([5, 0, 0], device=scores.device)
    kept, count, slot, dropped = largest(scores, live, k, tokens, tally)
    wanted, places, others = reference.largest(scores, live, k, tokens)
    assert int(count) == len(wanted) == min(k, int(live.sum()))
    assert torch.equal(kept[: len(wanted)].long(), wanted)
    assert not live[kept[len(wanted) :].long()].any(), "what fills the buffer is zero"
    assert kept.unique().numel() == k, "and no row is in it twice"
    assert torch.equal(slot, places)
    assert torch.equal(dropped, others)
    assert int(tally[0]) == 5 + int((~live).sum())
    return wanted


@pytest.mark.parametrize("n", [1, 2, 24, 37, 4097, 9000])
@pytest.mark.parametrize("dead", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("keep", [0.01, 0.25, 1.0])
def test_selection(n: int, dead: float, keep: float, device: torch.device) -> None:
    live = torch.rand(n, device=device) >= dead
    check(torch.randn(n, device=device).exp(), live, max(1, round(keep * n)), 6)


@pytest.mark.parametrize("k", [1, 7, 20, 37])
def test_of_rows_with_the_same_score_the_first_are_kept(k: int, device: torch.device) -> None:
    live = torch.rand(37, device=device) > 0.3
    for scores in (torch.zeros(37), torch.ones(37), torch.randint(0, 3, (37,)).float()):
        check(scores.to(device), live, k, 5)


def test_what_is_hardly_larger_is_larger(device: torch.device) -> None:
    """Down to the last bit, and below what float32 holds with all of its digits."""
    for start in (1.0, 3e-39, 1e30):
        bits = torch.tensor(start, device=device).view(torch.int32) + torch.randperm(300, device=device)
        scores = bits.int().view(torch.float32)
        kept = check(scores, torch.ones(300, dtype=torch.bool, device=device), 40, 10)
        assert sorted(bits[kept].tolist()) == sorted(bits.tolist())[-40:]


def test_what_is_not_a_number_comes_first(device: torch.device) -> None:
    scores = torch.rand(24, device=device)
    scores[5], scores[7], scores[9] = torch.inf, torch.nan, 1e38
    live = torch.ones(24, dtype=torch.bool, device=device)
    assert [check(scores, live, k, 6).tolist() for k in (1, 2, 3)] == [[7], [5, 7], [5, 7, 9]]


@pytest.mark.parametrize("dead", [0.0, 0.4, 1.0])
def test_they_are_the_rows_that_reuse_keeps(dead: float, device: torch.device) -> None:
    dy, base = torch.randn(24, 5, device=device), torch.randn(6, 5, device=device)
    dy[torch.randperm(24, device=device)[: round(dead * 24)]] = 0
    live = (dy != 0).any(1)
    squares = (dy.view(-1, 6, 5) - base).square().sum(2).view(-1)
    wanted = reuse.rows(dy, base, 0.3, live)
    assert torch.equal(check(squares, live, 7, 6), wanted.kept)
