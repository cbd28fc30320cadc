"""Sampling of rows: probabilities against the formula, exactly k rows, and no bias, by statistics."""

import math

import pytest
import torch

from sparse_compile.kernels import linear as kernel
from sparse_compile.methods import sample

F64 = torch.float64
DRAWS = 4000


def scores(n=40, seed=0):
    """Uneven ones: most small, a few large, some zero."""
    s = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=F64).exp() ** 1.5
    s[::7] = 0
    return s


def by_bisection(s, k):
    """min(1, λ·s) with Σ = k, λ by bisection: the definition, with no cleverness."""
    low, high = 0.0, 1e12
    for _ in range(400):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * s).clamp(max=1).sum() < k else (low, middle)
    return (low * s).clamp(max=1)


@pytest.mark.parametrize("k", [1, 2, 5, 17, 33])
@pytest.mark.parametrize("seed", range(5))
def test_probabilities_are_those_of_the_definition(k, seed):
    s = scores(seed=seed)
    p = sample.probabilities(s, k)
    assert p.sum().item() == pytest.approx(k, rel=1e-12)
    torch.testing.assert_close(p, by_bisection(s, k), rtol=1e-9, atol=1e-12)
    assert torch.equal(p == 0, s == 0)


def test_probabilities_of_equal_scores():
    assert torch.equal(sample.probabilities(torch.full((8,), 3.0), 2), torch.full((8,), 0.25, dtype=F64))


@pytest.mark.parametrize("k", [3, 4, 5, 9])
def test_no_more_scores_than_rows_to_draw(k):
    p = sample.probabilities(torch.tensor([0.0, 2.0, 1e-9, 0.0, 5.0]), k)
    assert p.tolist() == [0, 1, 1, 0, 1]


def test_one_score_that_outweighs_all_others():
    p = sample.probabilities(torch.tensor([1e-20, 1.0, 1e-20]), 2)
    assert p.tolist() == pytest.approx([0.5, 1.0, 0.5])


@pytest.mark.parametrize("k", [1, 5, 17, 33])
def test_exactly_k_rows_each_once_and_none_that_is_zero(k):
    s = scores()
    for seed in range(200):
        rows = sample.rows(s, k, None, sample.Draw(str(seed)))
        assert len(rows.kept) == k
        assert (rows.kept.diff() > 0).all()
        assert (s[rows.kept] > 0).all()


def test_each_row_is_drawn_with_its_own_probability():
    s, k = scores(), 8
    p = sample.probabilities(s, k)
    drawn = torch.zeros(len(s), dtype=F64)
    for seed in range(DRAWS):
        drawn[sample.systematic(p, k, sample.Draw(str(seed)))] += 1
    error = (p * (1 - p) / DRAWS).sqrt()
    assert ((drawn / DRAWS - p).abs() <= 4 * error).all()  # 40 rows: one in 400 such tests would fail
    assert (drawn[p == 1] == DRAWS).all()


def test_all_rows_that_are_not_zero_if_they_are_few():
    s = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0, 0.0])
    rows = sample.rows(s, 3, None, sample.Draw("0"))
    assert rows.kept.tolist() == [1, 3]
    assert rows.scale is None


def test_equal_seeds_draw_equal_rows():
    s = scores()
    first, second, other = (sample.rows(s, 8, None, sample.Draw(seed)).kept for seed in ("a", "a", "b"))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_clip_caps_the_weights():
    s = scores()
    free, capped = (sample.rows(s, 8, clip, sample.Draw("0")) for clip in (None, 2.0))
    assert torch.equal(free.kept, capped.kept)
    assert free.scale.max() > 2
    assert torch.equal(capped.scale, free.scale.clamp(max=2.0))
    p = sample.probabilities(s, 8)
    torch.testing.assert_close(free.scale, 1 / p[free.kept])


# No bias


def operands():
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(40, 6, generator=generator, dtype=F64) * scores().unsqueeze(1)
    return dy, *(torch.randn(*shape, generator=generator, dtype=F64) for shape in ((40, 5), (6, 5)))


def share_recovered(clip=None, weight=1.0):
    """Mean and standard error of ⟨ĝ, g⟩ / ⟨g, g⟩ over many draws, for dX and for dW. (1 if unbiased.)"""
    dy, x, w = operands()
    truth = dy @ w, dy.t() @ x
    values = []
    for seed in range(DRAWS):
        rows = sample.rows(dy.norm(dim=1), 12, clip, sample.Draw(str(seed)))
        compact = kernel.gather(dy, rows)
        distinct, index = kernel.input_gradient_of_rows(compact, w, rows, len(dy))
        ours = distinct[index], kernel.weight_gradient_of_rows(compact, x, rows, transposed=False)
        values.append([weight * (a * b).sum() / (b * b).sum() for a, b in zip(ours, truth, strict=True)])
    values = torch.tensor(values)
    return values.mean(0), values.std(0) / math.sqrt(DRAWS)


def test_mean_of_many_draws_is_the_dense_gradient():
    mean, error = share_recovered()
    assert (error < 0.004).all()  # so that a bias of 2 % is five standard errors
    assert ((mean - 1).abs() <= 3 * error).all()


def test_a_bias_of_two_percent_would_be_seen():
    mean, error = share_recovered(weight=0.98)
    assert ((mean - 1).abs() > 3 * error).all()


def test_a_clip_is_a_bias():
    mean, error = share_recovered(clip=1.5)
    assert (mean < 1 - 3 * error).all()


def test_every_entry_of_the_mean_is_unbiased():
    """Entry by entry, not only along the gradient: z-scores that are standard normal."""
    dy, _, w = operands()
    truth = dy @ w
    total, squares = torch.zeros_like(truth), torch.zeros_like(truth)
    for seed in range(DRAWS):
        rows = sample.rows(dy.norm(dim=1), 12, None, sample.Draw(f"entry {seed}"))
        estimate = rows.dense(dy) @ w
        total += estimate
        squares += estimate * estimate
    error = ((squares / DRAWS - (total / DRAWS) ** 2) / DRAWS).sqrt()
    random = error > 1e-9
    z = (total / DRAWS - truth)[random] / error[random]
    assert z.abs().max() < 4.5
    assert z.square().mean().sqrt() == pytest.approx(1, abs=0.25)
    torch.testing.assert_close((total / DRAWS)[~random], truth[~random])
