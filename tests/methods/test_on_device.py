"""The choice of rows that stays on the device, against the one that the host makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_compile.methods import on_device, reuse, sample
from sparse_compile.methods.rows import Rows, number_kept

N, OUTPUTS, TOKENS = 24, 5, 6


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(4)


def gradient(dead: float, device: torch.device) -> Tensor:
    """dY [N, O] in float64, with a share of its rows zero."""
    dy = torch.randn(N, OUTPUTS, dtype=torch.float64, device=device)
    dy[: round(dead * N)] = 0
    return dy[torch.randperm(N, device=device)]


def live_part(rows: Rows) -> Tensor:
    assert rows.count is not None
    return rows.kept[: int(rows.count)]


@pytest.mark.parametrize("dead", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("keep", [0.01, 0.25, 0.5, 1.0])
def test_largest_are_the_rows_that_reuse_keeps(keep: float, dead: float, device: torch.device) -> None:
    dy = gradient(dead, device)
    base = torch.randn(TOKENS, OUTPUTS, dtype=torch.float64, device=device)
    live = (dy != 0).any(1)
    squares = (dy.view(-1, TOKENS, OUTPUTS) - base).square().sum(2).view(-1)
    ours, theirs = on_device.largest(squares, live, keep, base), reuse.rows(dy, base, keep, live)
    assert torch.equal(live_part(ours), theirs.kept)
    assert len(ours.kept) == number_kept(keep, N)
    assert torch.equal(ours.dropped, theirs.dropped)
    torch.testing.assert_close(ours.dense(dy), theirs.dense(dy), rtol=0, atol=0)


def test_a_residual_that_is_not_finite_is_kept(device: torch.device) -> None:
    scores = torch.rand(N, device=device)
    scores[7] = torch.nan
    rows = on_device.largest(scores, torch.ones(N, dtype=torch.bool, device=device), 0.1, scores[:1, None])
    assert 7 in live_part(rows).tolist()


@pytest.mark.parametrize("dead", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("keep", [0.01, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 1.5])
def test_drawn_are_the_rows_that_sampling_draws(
    keep: float, dead: float, clip: float | None, device: torch.device
) -> None:
    dy = gradient(dead, device)
    scores = dy.norm(dim=1)
    k = number_kept(keep, N)
    ours, theirs = (form(scores, k, clip, sample.Draw("seed")) for form in (on_device.drawn, sample.rows))
    assert torch.equal(live_part(ours), theirs.kept)
    assert len(ours.kept) == k
    torch.testing.assert_close(ours.dense(dy), theirs.dense(dy), rtol=1e-12, atol=0)
    assert not ours.scale[int(ours.count) :].any(), "what fills the buffer has no weight"


def test_some_rows_are_certain(device: torch.device) -> None:
    """Scores so uneven that the largest are capped at probability 1."""
    scores = torch.tensor([100.0, 50.0, 1, 1, 1, 1, 1, 1, 0, 0], device=device, dtype=torch.float64)
    for seed in range(20):
        ours, theirs = (
            form(scores, 4, None, sample.Draw(str(seed))) for form in (on_device.drawn, sample.rows)
        )
        assert live_part(ours)[:2].tolist() == [0, 1]
        assert torch.equal(live_part(ours), theirs.kept)
        torch.testing.assert_close(ours.scale, theirs.scale)


def test_equal_scores_of_as_many_rows_as_are_drawn(device: torch.device) -> None:
    scores = torch.tensor([0.0, 2.0, 2.0, 2.0, 0.0, 0.0], device=device)
    rows = on_device.drawn(scores, 3, None, sample.Draw("seed"))
    assert live_part(rows).tolist() == [1, 2, 3]
    assert rows.scale.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("keep", [0.25, 1.0])
def test_what_is_not_finite_spoils_every_weight(bad: float, keep: float, device: torch.device) -> None:
    scores = torch.rand(N, device=device)
    scores[3] = bad
    rows = on_device.drawn(scores, number_kept(keep, N), None, sample.Draw("seed"))
    assert rows.scale.isnan().all()
    assert ((rows.kept >= 0) & (rows.kept < N)).all()
    assert int(rows.count) > 0


def test_of_no_rows_none_are_chosen(device: torch.device) -> None:
    """Those of an expert without tokens."""
    scores = torch.empty(0, device=device)
    drawn = on_device.drawn(scores, number_kept(0.3, 0), None, sample.Draw("seed"))
    base = torch.ones(TOKENS, OUTPUTS, device=device)
    largest = on_device.largest(scores, scores != 0, 0.3, base)
    for rows in (drawn, largest):
        assert (rows.kept.shape, rows.kept.dtype, rows.count.tolist()) == ((0,), torch.int64, [0])
        assert rows.dense(torch.empty(0, OUTPUTS, device=device)).shape == (0, OUTPUTS)
    assert drawn.scale.shape == (0,)
    assert largest.base is base
    assert largest.dropped.shape == (0,)
