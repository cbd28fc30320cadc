"""VCAS's variances against the definition and against many draws; its update against the paper's."""

import math

import pytest
import reference_vcas as reference
import torch

from sparse_compile.methods import sample, vcas

F64 = torch.float64
DRAWS = 4000


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def uneven(n, seed=0):
    """Scales of samples or rows: most are small, a few large."""
    return normal(n, seed=seed).exp() ** 1.5


# Norms of per-sample gradients


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (5, 1), (1, 7), (6, 4)])
def test_sample_squares_are_those_of_the_per_sample_gradients(batch, tokens):
    dy, x = normal(batch, tokens, 3), normal(batch, tokens, 5, seed=1)
    expected = [
        sum(torch.outer(dy[b, t], x[b, t]) for t in range(tokens)).square().sum() for b in range(batch)
    ]
    torch.testing.assert_close(vcas.sample_squares(dy, x), torch.stack(expected), rtol=1e-12, atol=0)


def test_sample_squares_are_never_negative():
    """Where the rows of a sample cancel, rounding leaves the Gram trick on either side of zero."""
    row, x = normal(40, 1, 16), normal(40, 1, 8, seed=1)
    dy = torch.cat([row, -row, row / 3, -row / 3], dim=1).float()
    squares = vcas.sample_squares(dy, x.expand(-1, 4, -1).float())
    assert (squares >= 0).all()
    assert (squares <= 1e-5 * vcas.row_squares(dy[:, 0], x[:, 0].float())).all()


def test_row_squares_are_those_of_outer_products():
    dy, x = normal(9, 3), normal(9, 5, seed=1)
    dy[2] = 0
    expected = [torch.outer(dy[i], x[i]).square().sum() for i in range(9)]
    torch.testing.assert_close(vcas.row_squares(dy, x), torch.stack(expected), rtol=1e-12, atol=0)


# Variance of SGD


def test_sgd_variance_is_that_of_batches_drawn_from_a_population():
    """G = Σ g_b of a batch drawn with replacement has B times the variance of one g, and what one batch says
    of it is right on average."""
    population, size, batches = normal(20, 6) * uneven(20).unsqueeze(1), 5, 20_000
    truth = size * float((population - population.mean(0)).square().sum(1).mean())
    chosen = torch.randint(20, (batches, size), generator=torch.Generator().manual_seed(3))
    drawn = population[chosen]
    sums = drawn.sum(1)
    assert float((sums - sums.mean(0)).square().sum(1).mean()) == pytest.approx(truth, rel=0.05)
    found = torch.tensor(
        [vcas.sgd_variance(d.square().sum(1), float(d.sum(0).square().sum())) for d in drawn]
    )
    error = float(found.std()) / math.sqrt(batches)
    assert error < 0.02 * truth
    assert abs(float(found.mean()) - truth) < 3 * error


def test_sgd_variance_of_equal_samples_is_zero():
    g = normal(7)
    assert vcas.sgd_variance(g.square().sum().repeat(4), float((4 * g).square().sum())) == pytest.approx(0)


def test_sgd_variance_is_never_negative():
    assert vcas.sgd_variance(torch.tensor([1.0, 1.0]), 4.0 + 1e-6) == 0.0


# Variance of sampling


def case(rows_each, *, common, items=30):
    """(dY, X, ‖g_i‖²) of `items` samples with some rows each, or of that many rows; `common` is how much of a
    gradient all of them share."""
    scale = uneven(items, seed=5).clamp(0.2, 5.0)
    own, shared = normal(items, rows_each, 4), normal(1, rows_each, 4, seed=1)
    dy = scale.view(-1, 1, 1) * ((1 - common) * own + common * shared)
    x = (1 - common) * normal(items, rows_each, 3, seed=2) + common * normal(1, rows_each, 3, seed=3)
    squares = vcas.sample_squares(dy, x)
    return dy.flatten(0, 1), x.flatten(0, 1), squares


def empirical(dy, x, p, k):
    """Mean of ‖Ĝ − G‖² over DRAWS draws, and its standard error."""
    items, rows_each, exact = len(p), len(dy) // len(p), dy.t() @ x
    per_item = torch.einsum("bto,bti->boi", dy.view(items, rows_each, -1), x.view(items, rows_each, -1))
    scaled = per_item / p.clamp(min=1e-300).view(-1, 1, 1)
    errors = torch.stack(
        [
            (scaled[sample.systematic(p, k, sample.Draw(str(seed)))].sum(0) - exact).square().sum()
            for seed in range(DRAWS)
        ]
    )
    return float(errors.mean()), float(errors.std()) / math.sqrt(DRAWS)


# Hájek's formula is right for large Σ p (1 − p), with a relative error of the order of its reciprocal; here
# that is 3 to 4, and the formula 3 to 7 % low. The draws add 1 % of standard error. Without its second term,
# as for coin flips, it is 1.3 to 6 times the truth wherever the items share a direction.
HAJEK = 0.1


@pytest.mark.parametrize("k", [6, 12, 20])
@pytest.mark.parametrize("common", [0.0, 0.7])
@pytest.mark.parametrize("rows_each", [1, 4], ids=["rows", "samples"])
def test_sampling_variance_is_that_of_many_draws(rows_each, common, k):
    dy, x, squares = case(rows_each, common=common)
    p = sample.probabilities(squares.sqrt(), k)
    found = vcas.sampling_variance(squares, p, dy, x)
    truth, error = empirical(dy, x, p, k)
    assert error < 0.02 * truth
    assert found == pytest.approx(truth, rel=HAJEK)
    flips = vcas.flips_variance(squares, p)
    assert found <= flips


@pytest.mark.parametrize("rows_each", [1, 4], ids=["rows", "samples"])
def test_a_common_direction_makes_a_fixed_number_much_better_than_coin_flips(rows_each):
    dy, x, squares = case(rows_each, common=0.85)
    p = sample.probabilities(squares.sqrt(), 12)
    truth, _ = empirical(dy, x, p, 12)
    flips = vcas.flips_variance(squares, p)
    assert flips > 5 * truth
    assert abs(vcas.sampling_variance(squares, p, dy, x) - truth) < 0.05 * (flips - truth)


def test_variance_of_coin_flips_is_that_of_coin_flips():
    dy, x, squares = case(1, common=0.7)
    p = sample.probabilities(squares.sqrt(), 12)
    heads = torch.rand(20_000, len(p), generator=torch.Generator().manual_seed(0), dtype=F64) < p
    g = torch.einsum("no,ni->noi", dy, x).flatten(1)
    errors = ((heads / p - 1) @ g).square().sum(1)
    assert vcas.flips_variance(squares, p) == pytest.approx(float(errors.mean()), rel=0.05)
    assert vcas.flips_variance(squares, p) == pytest.approx(reference.variance_of_rows(dy, x, p.tolist()))


def test_what_is_certain_adds_no_variance():
    dy, x, squares = case(1, common=0.3)
    assert vcas.sampling_variance(squares, torch.ones(30, dtype=F64), dy, x) == 0.0
    dy[5:] = 0
    squares = vcas.row_squares(dy, x)
    p = sample.probabilities(squares.sqrt(), 5)
    assert p.sum() == pytest.approx(5)
    for found in (vcas.sampling_variance(squares, p, dy, x), vcas.flips_variance(squares, p)):
        assert found == pytest.approx(0, abs=1e-14 * float(squares.sum()))


def test_items_of_no_gradient_change_nothing():
    dy, x, squares = case(1, common=0.3)
    p = sample.probabilities(squares.sqrt(), 8)
    more = [torch.cat([t, torch.zeros_like(t[:4])]) for t in (squares, p, dy)]
    more_x = torch.cat([x, normal(4, 3, seed=9)])
    squares_more, p_more, dy_more = more
    expected = vcas.sampling_variance(squares, p, dy, x)
    assert vcas.sampling_variance(squares_more, p_more, dy_more, more_x) == pytest.approx(expected, rel=1e-12)


def test_equal_gradients_drawn_alike_have_no_variance():
    """A fixed number of equal rows with equal weights is always the whole; coin flips would differ."""
    dy, x = normal(1, 4).expand(10, 4), normal(1, 3, seed=1).expand(10, 3)
    squares, p = vcas.row_squares(dy, x), torch.full((10,), 0.4, dtype=F64)
    assert vcas.sampling_variance(squares, p, dy, x) == pytest.approx(0, abs=1e-10 * float(squares.sum()))
    assert vcas.flips_variance(squares, p) == pytest.approx(1.5 * float(squares.sum()))


# The update


EDGES = {
    "equal": [2.0] * 8,
    "one dominates": [1e9, 1.0, 1.0, 1.0],
    "one and zeros": [0.0, 3.0, 0.0, 0.0],
    "half zero": [0.0, 1.0, 2.0, 0.0],
    "single": [0.5],
    "increasing": [1.0, 2.0, 4.0, 8.0, 16.0],
}


@pytest.mark.parametrize("s", [0.0, 0.01, 0.25, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("name", EDGES)
def test_share_of_norm_is_the_papers(name, s):
    norms = EDGES[name]
    assert vcas.share_of_norm(torch.tensor(norms, dtype=F64), s) == reference.share_of_norm(norms, s)


@pytest.mark.parametrize("seed", range(20))
def test_share_of_norm_is_the_papers_for_any_norms(seed):
    norms = uneven(3 + 4 * seed, seed)
    for s in (0.1, 0.37, 0.8, 0.95):
        assert vcas.share_of_norm(norms, s) == reference.share_of_norm(norms.tolist(), s)


def test_share_of_norm_by_hand():
    norms = torch.tensor([1.0, 6.0, 2.0, 1.0])
    found = [vcas.share_of_norm(norms, s) for s in (0.0, 0.6, 0.61, 0.8, 0.85, 0.95, 1.0)]
    assert found == [0.25, 0.25, 0.5, 0.5, 0.75, 1.0, 1.0]


def test_share_of_norm_of_half_precision_norms_does_not_lose_the_small_ones():
    """1 + 2^-12 is 1 in half precision; the sum must not be taken in it."""
    norms = torch.cat([torch.ones(1), torch.full((4096,), 2.0**-12)]).half()
    assert vcas.share_of_norm(norms, 0.75) == (1 + 2048) / 4097


def test_monotone_over_depth():
    assert vcas.monotone([0.2, 0.5, 0.3, 0.9, 0.1]) == [0.2, 0.5, 0.5, 0.9, 0.9]
    assert vcas.monotone([]) == []


@pytest.mark.parametrize(
    ("s", "act", "expected"),
    [
        (0.5, 0.0249, 0.49),
        (0.5, 0.0251, 0.51),
        (1.0, 9.0, 1.0),
        (0.995, 9.0, 1.0),
        (0.0, 0.0, 0.0),
        (0.005, 0.0, 0.0),
    ],
)
def test_next_s(s, act, expected):
    assert vcas.next_s(s, act, 1.0, tau=0.025, step=0.01) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("share", "rows", "expected"), [(0.5, 0.09, 0.4), (0.5, 0.11, 0.625), (1.0, 9.0, 1.0), (0.9, 9.0, 1.0)]
)
def test_next_weight_share(share, rows, expected):
    assert vcas.next_weight_share(share, rows, 1.0, tau=0.1, step=0.8) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_updates_in_a_row_are_the_papers(seed):
    """Random variances and norms for 60 measurements, from which the shares go down and up again."""
    generator = torch.Generator().manual_seed(seed)
    paper = reference.Paper([1.0] * 4, {"w": 1.0})
    s, rho, nu = 1.0, [1.0] * 4, 1.0
    down = up = 0
    for _ in range(60):
        act, rows, sgd = torch.rand(3, generator=generator, dtype=F64).tolist()
        act, rows = 0.06 * act, 0.06 * rows
        norms = torch.randn(4, 16, generator=generator, dtype=F64).exp()
        paper.update_samples(act, sgd, norms.tolist())
        paper.update_rows("w", rows, sgd)
        before = s
        s = vcas.next_s(s, act, sgd, tau=0.025, step=0.01)
        down, up = down + (s < before), up + (s > before)
        shares = vcas.monotone([vcas.share_of_norm(n, s) for n in norms])
        rho = [0.6 * old + 0.4 * new for old, new in zip(rho, shares, strict=True)]
        nu = vcas.next_weight_share(nu, rows, sgd, tau=0.025, step=0.95)
        assert s == pytest.approx(paper.s, abs=1e-12)
        assert rho == pytest.approx(paper.rho, abs=1e-12)
        assert nu == pytest.approx(paper.nu["w"], abs=1e-12)
    assert down > 5
    assert up > 5


# Caps


@pytest.mark.parametrize("cap", [1.0, 1.5, 3.0])
def test_capped_error_is_the_mean_over_draws(cap):
    """Of coin flips; the bias of it is a good part, and rows without a gradient have none."""
    dy, x = normal(30, 4) * uneven(30).unsqueeze(1) + 0.3, normal(30, 3, seed=1) + 0.5
    dy[5] = 0
    squares = vcas.row_squares(dy, x)
    p = sample.probabilities(squares.sqrt(), 8)
    found = vcas.capped_error(squares, p, cap, vcas.Sketch.of(dy, x))
    assert found == pytest.approx(reference.error_of_capped_rows(dy, x, p.tolist(), cap))
    drawn = torch.rand(DRAWS, 30, generator=torch.Generator().manual_seed(2), dtype=F64) < p
    weights = torch.where(drawn, (1 / p).clamp(max=cap), 0.0)
    outer = torch.einsum("no,ni->noi", dy, x).flatten(1)
    errors = ((weights - 1) @ outer).square().sum(1)
    assert float(errors.mean()) == pytest.approx(found, rel=0.05)


def test_without_a_cap_the_error_is_the_variance():
    dy, x = normal(30, 4) * uneven(30).unsqueeze(1), normal(30, 3, seed=1)
    squares = vcas.row_squares(dy, x)
    p = sample.probabilities(squares.sqrt(), 8)
    found = vcas.capped_error(squares, p, 1e9, vcas.Sketch.of(dy, x))
    assert found == pytest.approx(vcas.flips_variance(squares, p))


@pytest.mark.parametrize("common", [0.0, 1.0])
def test_a_sketch_estimates_norms_of_sums(common):
    """Of sums with a single direction, the hardest, and with many; and it is the same one each time."""
    found = []
    for seed in range(40):
        dy = normal(60, 200, seed=seed) + common * normal(1, 200, seed=seed + 100)
        x = normal(60, 150, seed=seed + 200) + common * normal(1, 150, seed=seed + 300)
        factors = torch.rand(60, generator=torch.Generator().manual_seed(seed), dtype=F64)
        sketch = vcas.Sketch.of(dy, x)
        assert sketch.dy.shape == sketch.x.shape == (60, 32)
        estimate = sketch.square(factors)
        assert estimate == vcas.Sketch.of(dy, x).square(factors)
        found.append(estimate / float((factors.unsqueeze(1) * dy).t().mm(x).square().sum()))
    ratios = torch.tensor(found)
    assert float(ratios.std()) < 0.5  # of a single direction: sqrt(2 · 2 / 32 + 4 / 32²) = 0.36
    assert abs(float(ratios.mean()) - 1) < 3 * float(ratios.std()) / math.sqrt(len(ratios))
