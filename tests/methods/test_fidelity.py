"""How close an estimate is, against the formulas written out one entry at a time."""

import math

import pytest
import torch

from sparse_compile.methods import fidelity, reuse, sample
from sparse_compile.methods.rows import Rows


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(11)


def by_hand(estimate, exact):
    """(cosine, relative error) of two lists of numbers."""
    dot = math.fsum(a * b for a, b in zip(estimate, exact, strict=True))
    norms = [math.sqrt(math.fsum(a * a for a in x)) for x in (estimate, exact)]
    difference = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(estimate, exact, strict=True)))
    return dot / (norms[0] * norms[1]), difference / norms[1]


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4, 5), (1, 9)])
@pytest.mark.parametrize("chunk", [1, 10, 2**20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_formulas(shape, chunk, dtype, monkeypatch):
    monkeypatch.setattr(fidelity, "_CHUNK", chunk)
    exact = torch.randn(shape).to(dtype)
    estimate = (exact + 0.3 * torch.randn(shape)).to(dtype)
    found = fidelity.compare(estimate, exact)
    wanted = by_hand(estimate.flatten().tolist(), exact.flatten().tolist())
    assert [x.dtype for x in found] == [torch.float64] * 2
    assert [float(x) for x in found] == pytest.approx(wanted, rel=1e-13)


def test_equal_opposite_scaled_and_right_angles():
    g = torch.randn(6, 4)
    assert [float(x) for x in fidelity.compare(g, g)] == [pytest.approx(1, abs=1e-15), 0]
    assert [float(x) for x in fidelity.compare(-g, g)] == pytest.approx([-1, 2])
    assert [float(x) for x in fidelity.compare(3 * g, g)] == pytest.approx([1, 2])
    one, other = torch.eye(2).split(1)
    assert [float(x) for x in fidelity.compare(one, other)] == pytest.approx([0, math.sqrt(2)])


def test_the_layout_in_memory_does_not_matter():
    exact, estimate = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    apart = estimate.transpose(0, 2).contiguous().transpose(0, 2)
    assert apart.stride() != estimate.stride()
    assert fidelity.compare(apart, exact) == fidelity.compare(estimate, exact)


def test_small_numbers_of_half_precision_do_not_vanish():
    """Their squares would, in float16."""
    exact = torch.tensor([[3e-6, 4e-6]], dtype=torch.float16)
    cosine, error = fidelity.compare(exact.flip(1), exact)
    assert (float(cosine), float(error)) == pytest.approx(
        by_hand(exact.flip(1).flatten().tolist(), exact.flatten().tolist())
    )


@pytest.mark.parametrize(("estimate", "exact"), [(0.0, 0.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)])
def test_without_a_gradient_to_compare_with_nothing_is_finite(estimate, exact):
    _, error = fidelity.compare(torch.full((2, 3), estimate), torch.full((2, 3), exact))
    assert not math.isfinite(error)


def test_energy_of_rows_is_that_of_dy_whatever_they_are_scaled_by():
    dy = torch.randn(6, 3)
    base, dropped = torch.randn(2, 3), torch.tensor([True, False, True, True, False, True])
    kept = torch.tensor([1, 4])
    wanted = float(dy[1].square().sum() + dy[4].square().sum()) / float(dy.square().sum())
    for rows in (Rows(kept), Rows(kept, base, dropped), Rows(kept, scale=torch.tensor([3.0, 5.0]))):
        assert float(fidelity.energy_kept(dy, rows)) == pytest.approx(wanted, rel=1e-6)


def test_energy_of_what_is_written_out_is_that_of_the_entries_that_are_kept():
    dy, base = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    residual = (dy - base.repeat(2, 1)).abs().flatten()
    kept = sorted(range(24), key=lambda i: -float(residual[i]))[:7]
    wanted = sum(float(dy.flatten()[i]) ** 2 for i in kept) / float(dy.square().sum())
    found = fidelity.energy_kept(dy, reuse.elements(dy, base, 7 / 24, None))
    assert float(found) == pytest.approx(wanted, rel=1e-12)


def test_which_estimates_are_exact():
    dy = torch.randn(8, 3)
    norms = dy.norm(dim=1)
    assert Rows(torch.tensor([0, 2])).exact
    assert sample.rows(norms, 8, None, sample.Draw("")).exact
    assert not sample.rows(norms, 3, None, sample.Draw("")).exact
    assert not reuse.rows(dy, dy[:4], 0.5, None).exact
