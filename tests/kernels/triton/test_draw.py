"""Drawing on a GPU: the rows that sampling draws, in an order that is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sparse_compile.kernels.triton import reference
from sparse_compile.kernels.triton.draw import draw
from sparse_compile.methods import sample
from sparse_compile.methods.rows import Rows, number_kept

SIZES = (1, 2, 24, 37, 4097, 9000)


def run(
    scores: Tensor,
    k: int,
    cap: float | None = None,
    seed: str = "seed",
    slots: bool = True,
    share: float | None = None,
) -> tuple[list[Rows], Tensor, int]:
    """Estimates, one for each row of ``scores`` [D, N]; the weight of every row; how many had no score."""
    tally = torch.zeros(3, dtype=torch.int64, device=scores.device)
    random = sample.Draw(seed)
    numbers = [(random.number(), random.number()) for _ in scores]
    kept, scale, count, slot, weights, alive = draw(
        scores, k, cap, numbers, slots=slots, tally=tally, share=share
    )
    assert alive.tolist() == scores.count_nonzero(dim=1).tolist()
    rows = [
        Rows(kept[i], scale=scale[i], count=count[i : i + 1], slot=slot if slots and i == 0 else None)
        for i in range(len(scores))
    ]
    return rows, weights, int(tally[0])


def uneven(n: int, dead: float, device: torch.device) -> Tensor:
    """Scores [N] of which some are a hundred times as large as others, and a share is zero."""
    scores = (2 * torch.randn(n, device=device)).exp()
    scores[torch.randperm(n, device=device)[: round(dead * n)]] = 0
    return scores


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dead", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("keep", [0.01, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_the_rows_that_sampling_draws(
    n: int, dead: float, keep: float, cap: float | None, device: torch.device
) -> None:
    scores, k = uneven(n, dead, device), max(1, round(keep * n))
    (rows,), weights, zero = run(scores.unsqueeze(0), k, cap)
    wanted = reference.draw(scores, k, cap, reference.Numbers("seed"))
    alive = int((scores != 0).sum())
    count = int(rows.count)
    assert zero == n - alive
    assert count == min(alive, k)
    assert torch.equal(rows.kept[:count].long(), wanted.kept)
    torch.testing.assert_close(rows.scale[:count], wanted.scale.float())
    assert rows.kept.unique().numel() == k, "no row is in the buffer twice"
    assert not scores[rows.kept[count:].long()].any(), "what fills it is zero"
    assert not rows.scale[count:].any(), "and has no weight"
    torch.testing.assert_close(weights[0][rows.kept.long()], rows.scale, rtol=0, atol=0)
    assert int(weights.count_nonzero()) == count
    places = torch.full((n,), n - 1, device=device)
    places[wanted.kept] = torch.arange(count, device=device)
    assert torch.equal(rows.slot, places)


@pytest.mark.parametrize("n", [1, 37, 4097])
@pytest.mark.parametrize("dead", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.95])
@pytest.mark.parametrize("room", [0.5, 1.0])
def test_a_share_of_the_rows_that_have_a_score(
    n: int, dead: float, share: float, room: float, device: torch.device
) -> None:
    """As many as were drawn if somebody had counted them; what room is left holds rows without weight."""
    scores, most = uneven(n, dead, device).unsqueeze(0), max(1, round(room * n))
    k = min(most, number_kept(share, int(scores.count_nonzero())))
    (wanted,), weights, _ = run(scores, k)
    (rows,), found, _ = run(scores, most, share=share)
    assert torch.equal(found, weights)
    assert int(rows.count) == int(wanted.count)
    assert torch.equal(rows.slot, wanted.slot)
    assert torch.equal(rows.kept[:k], wanted.kept)
    assert torch.equal(rows.scale[:k], wanted.scale)
    assert rows.kept.shape == rows.scale.shape == (most,)
    assert not rows.kept[k:].any()
    assert not rows.scale[k:].any()


def test_no_more_rows_than_there_is_room_for(device: torch.device) -> None:
    """Lengths of 2/3 are rounded up, so that a line of three has a place for a third reading from 0 on."""
    scores, tally = torch.ones(2, 3, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    kept, scale, count, *_ = draw(scores, 2, None, [(5, 0), (7, 0)], slots=True, tally=tally)
    assert count.tolist() == [2, 2]
    assert all(len(set(rows)) == 2 for rows in kept.tolist())
    assert scale.tolist() == [[1.5, 1.5]] * 2


def test_two_draws_at_once_are_those_one_after_the_other(device: torch.device) -> None:
    scores = torch.stack([uneven(37, 0.2, device), uneven(37, 0.2, device)])
    both, _, _ = run(scores, 9)
    numbers = reference.Numbers("seed")
    for each, rows in zip(scores, both, strict=True):
        wanted = reference.draw(each, 9, None, numbers)
        assert torch.equal(rows.kept.long(), wanted.kept)
        torch.testing.assert_close(rows.scale, wanted.scale.float())


def test_some_rows_are_certain(device: torch.device) -> None:
    """Scores so uneven that it takes several steps to find them."""
    scores = torch.tensor([[1e4, 1e3, 1e2, 10.0, 1, 1, 1, 1, 1, 1, 0, 0]], device=device)
    for seed in range(20):
        (rows,), _, _ = run(scores, 6, seed=str(seed))
        assert rows.kept[:4].tolist() == [0, 1, 2, 3]
        assert rows.scale.tolist() == [1.0] * 4 + [3.0] * 2


@pytest.mark.parametrize("large", [[1.0, 1.0], [1.0, 5.0, 3.0], [1e4, 1, 1, 1, 1, 1]])
def test_the_largest_k_may_hold_all_there_is(large: list[float], device: torch.device) -> None:
    """The others are too small to be seen in the sum."""
    scores, k = torch.tensor([[*large, *[1e-30] * 6]], device=device), len(large)
    for seed in range(5):
        (rows,), _, _ = run(scores, k, seed=str(seed))
        assert (rows.kept.tolist(), rows.scale.tolist(), int(rows.count)) == ([*range(k)], [1.0] * k, k)


def test_some_that_are_large_among_many_that_are_hardly_there(device: torch.device) -> None:
    for seed in range(10):
        scores = torch.cat([torch.randn(16).exp(), torch.full((16,), 1e-20)]).to(device)
        (rows,), _, _ = run(scores[torch.randperm(32)].unsqueeze(0), 16, seed=str(seed))
        assert int(rows.count) == 16
        assert rows.scale.tolist() == [1.0] * 16


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, of what is not finite
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("k", [6, 24])
@pytest.mark.parametrize("dead", [0, 15, 23])
def test_what_is_not_finite_spoils_every_weight(bad: float, k: int, dead: int, device: torch.device) -> None:
    scores = torch.rand(1, 24, device=device)
    scores[0, :dead] = 0
    scores[0, 3] = bad
    (rows,), weights, _ = run(scores, k)
    assert rows.scale.isnan().all()
    assert rows.kept.tolist() == list(range(k))
    assert int(rows.count) == k
    assert weights[0].isnan().sum() == k


def test_every_draw_is_the_one_of_its_numbers(device: torch.device) -> None:
    scores = uneven(40, 0.2, device)
    for seed in range(30):
        (rows, _), _, _ = run(scores.expand(2, -1).contiguous(), 12, seed=str(seed))
        assert torch.equal(
            rows.kept.long(), reference.draw(scores, 12, None, reference.Numbers(str(seed))).kept
        )


def test_such_a_draw_is_unbiased() -> None:
    """Every row is drawn as often as its probability says; a bias of 2 % would be 4 standard deviations."""
    scores, draws = torch.linspace(0.2, 3.0, 16), 5000
    p = sample.probabilities(scores, 5)
    times = torch.zeros(16)
    for seed in range(draws):
        rows = reference.draw(scores, 5, None, reference.Numbers(f"{seed}"))
        torch.testing.assert_close(rows.scale, 1 / p[rows.kept])
        times[rows.kept] += 1
    errors = (times / draws - p) / (p * (1 - p) / draws).sqrt()
    assert errors.abs().max() < 4
    assert 0.3 < errors.square().mean() < 2.0


@pytest.mark.parametrize(("n", "k"), [(4, 2), (8, 4), (12, 3), (64, 16), (100, 7)])
def test_pairs_are_drawn_together_as_in_any_random_order(n: int, k: int) -> None:
    """Systematic sampling in a fixed order would never draw some pairs. With equal probabilities all are as
    likely, but for chance: √(q(1 − q) / draws), for a pair that is drawn with probability q."""
    draws = 3000
    rows = torch.zeros(draws, n)
    for seed in range(draws):
        drawn = sample.systematic(torch.full((n,), k / n), k, reference.Numbers(f"{seed}"))
        rows[seed, drawn] = 1
    together = (rows.t() @ rows / draws)[~torch.eye(n, dtype=torch.bool)]
    q = k * (k - 1) / (n * (n - 1))
    assert float(together.mean()) == pytest.approx(q, rel=1e-4)
    assert float(together.std(correction=0)) < 1.5 * (q * (1 - q) / draws) ** 0.5


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 100, 257])
def test_an_order_has_every_number_once(n: int) -> None:
    assert reference.order(n, 7).sort().values.tolist() == list(range(n))
    assert n < 5 or not torch.equal(reference.order(n, 7), reference.order(n, 8))
