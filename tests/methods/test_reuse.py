"""The estimates of reuse, each against its definition written as a loop (tests/reference.py)."""

import pytest
import torch
from reference import Recipe, gradients, sparse_residual

from sparse_compile.methods import reuse

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


def problem(samples=4, tokens=6, outputs=7, dead=()):
    """dY [N, O], P [T, O], and which rows live (None if all do)."""
    dy = torch.randn(samples * tokens, outputs, dtype=F64)
    dy[list(dead)] = 0
    live = None
    if dead:
        live = torch.ones(len(dy), dtype=torch.bool)
        live[list(dead)] = False
    return dy, torch.randn(tokens, outputs, dtype=F64), live


def expected(dy, base, recipe, contracted):
    """Ŷ = S + P, and zero where dY is."""
    zero = [not bool(row.any()) for row in dy]
    estimate = sparse_residual(dy - base.repeat(len(dy) // len(base), 1), zero, recipe, contracted)
    for i in range(len(dy)):
        if not zero[i]:
            estimate[i] += base[i % len(base)]
    return estimate


DEAD = [(), (0, 3, 4, 17, 23), tuple(range(1, 24)), tuple(range(24))]


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.9])
def test_rows_are_those_of_the_largest_norm(ratio, dead):
    dy, base, live = problem(dead=dead)
    estimate = reuse.rows(dy, base, 1 - ratio, live)
    torch.testing.assert_close(estimate.dense(dy), expected(dy, base, Recipe(ratio), 1))


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.3, 0.5, 0.77, 0.9, 0.999])
@pytest.mark.parametrize(("samples", "tokens"), [(4, 6), (1, 24), (24, 1), (5, 1)])
def test_rows_keeps_exactly_its_share(keep, samples, tokens):
    dy, base, _ = problem(samples, tokens)
    rows = reuse.rows(dy, base, keep, None)
    assert rows.kept.numel() == max(1, round(keep * len(dy)))
    assert rows.kept.tolist() == sorted(set(rows.kept.tolist()))
    assert rows.computed == rows.kept.numel() + tokens


def test_rows_never_keeps_a_zero_row():
    dy, base, live = problem(dead=range(0, 24, 2))
    base *= 100  # the residual of a zero row is the largest of all
    assert set(reuse.rows(dy, base, 0.3, live).kept.tolist()) <= set(range(1, 24, 2))
    assert reuse.rows(dy, base, 0.8, live).kept.tolist() == list(range(1, 24, 2))


def test_rows_without_a_live_one():
    dy, base, live = problem(dead=range(24))
    rows = reuse.rows(dy, base, 0.5, live)
    assert rows.kept.numel() == 0
    assert not rows.dense(dy).any()


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.9])
def test_elements_are_those_of_the_largest_magnitude(ratio, dead):
    dy, base, live = problem(dead=dead)
    estimate = reuse.elements(dy, base, 1 - ratio, live)
    torch.testing.assert_close(estimate, expected(dy, base, Recipe(ratio, "element"), 1))


@pytest.mark.parametrize("keep", [0.001, 0.1, 0.25, 0.3, 0.5, 0.77, 0.999])
@pytest.mark.parametrize(("samples", "tokens", "outputs"), [(4, 6, 7), (1, 5, 3), (9, 1, 1)])
def test_elements_keeps_exactly_its_share(keep, samples, tokens, outputs):
    dy, base, _ = problem(samples, tokens, outputs)
    estimate = reuse.elements(dy, base, keep, None)
    from_base = estimate == base.repeat(samples, 1)
    assert int((~from_base).sum()) == max(1, round(keep * dy.numel()))
    assert torch.equal(estimate[~from_base], dy[~from_base])


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 3), (3, 16), (5, 5)])
def test_n_of_m_keeps_the_largest_of_every_group(n, m, dim, dead):
    """24 rows and 7 features: most groups of m leave a shorter one at the end."""
    dy, base, live = problem(dead=dead)
    estimate = reuse.n_of_m(dy, base, n, m, live, dim=dim)
    torch.testing.assert_close(estimate, expected(dy, base, Recipe((n, m), "n:m"), dim))


@pytest.mark.parametrize(("rows", "outputs"), [(8, 8), (10, 7), (6, 9), (3, 3)])
def test_n_of_m_counts_what_it_keeps_in_a_ragged_last_group(rows, outputs):
    dy, base, _ = problem(rows, 1, outputs)
    for dim, (lines, length) in enumerate([(outputs, rows), (rows, outputs)]):
        estimate = reuse.n_of_m(dy, base, 2, 4, None, dim=dim)
        kept = int((estimate != base.repeat(rows, 1)).sum())
        assert kept == lines * (2 * (length // 4) + min(2, length % 4))


@pytest.mark.parametrize("estimate", [reuse.rows, reuse.elements])
def test_keeping_all_is_dense(estimate):
    dy, base, live = problem(dead=(2, 9))
    result = estimate(dy, base, 1.0, live)
    torch.testing.assert_close(result if isinstance(result, torch.Tensor) else result.dense(dy), dy)


def transposed(matrix):
    """The same values in the layout of a transpose, as a graph may hand them over."""
    return matrix.t().contiguous().t()


@pytest.mark.parametrize("tokens", [6, 1, 24])
def test_layout_does_not_matter(tokens):
    dy, base, live = problem(24 // tokens, tokens, dead=(5, 7))
    rows = [reuse.rows(each, base, 0.4, live).dense(each) for each in (dy, transposed(dy))]
    assert torch.equal(*rows)
    assert torch.equal(*[reuse.elements(each, base, 0.4, live) for each in (dy, transposed(dy))])
    assert torch.equal(*[reuse.n_of_m(each, base, 2, 4, live, dim=0) for each in (dy, transposed(dy))])
    # A mean over another layout adds up in another order.
    torch.testing.assert_close(*[reuse.next_base(each, tokens, None) for each in (dy, transposed(dy))])


def test_arguments_are_left_alone():
    dy, base, live = problem(dead=(5, 7))
    before = dy.clone(), base.clone(), live.clone()
    reuse.rows(dy, base, 0.4, live)
    reuse.elements(dy, base, 0.4, live)
    reuse.n_of_m(dy, base, 2, 4, live, dim=1)
    assert all(torch.equal(a, b) for a, b in zip(before, (dy, base, live), strict=True))


def test_next_base_is_the_mean_or_one_sample():
    dy, *_ = problem(samples=4, tokens=6)
    torch.testing.assert_close(reuse.next_base(dy, 6, None), (dy[:6] + dy[6:12] + dy[12:18] + dy[18:]) / 4)
    for sample in range(4):
        assert torch.equal(reuse.next_base(dy, 6, sample), dy[6 * sample : 6 * sample + 6])


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("sample", [None, 0])
def test_next_base_shares_no_memory(samples, sample):
    dy, *_ = problem(samples)
    base = reuse.next_base(dy, 6, sample)
    before = base.clone()
    dy.zero_()
    assert torch.equal(base, before)


@pytest.mark.parametrize("dead", DEAD)
def test_rows_give_the_gradients_of_the_formula(dead):
    """dX = S · W + P · W and dW = Sᵀ · X + Pᵀ · ΣX are what the estimate of dY, multiplied, comes to."""
    dy, base, live = problem(dead=dead)
    x, w = torch.randn(24, 5, dtype=F64), torch.randn(7, 5, dtype=F64)
    estimate = reuse.rows(dy, base, 0.3, live).dense(dy)
    dx, dw = gradients(dy, x, w, base, Recipe(0.7))
    torch.testing.assert_close(estimate @ w, dx)
    torch.testing.assert_close(estimate.t() @ x, dw)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_choices_are_those_of_their_own_values(dtype):
    dy, base, live = problem(dead=(5, 7))
    dy, base = dy.to(dtype), base.to(dtype)
    rows = reuse.rows(dy, base, 0.4, live)
    assert rows.kept.numel() == round(0.4 * 24)
    norms = (dy.double() - base.double().repeat(4, 1)).norm(dim=1).where(live, torch.tensor(-1.0, dtype=F64))
    least_kept = norms[rows.kept].min()
    most_dropped = norms[rows.dropped].max()
    assert least_kept >= most_dropped * (1 - 8 * torch.finfo(dtype).eps)
    assert reuse.elements(dy, base, 0.4, live).dtype is dtype
    assert reuse.n_of_m(dy, base, 2, 4, live, dim=1).dtype is dtype
