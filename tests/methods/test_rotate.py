"""Rotated gradients as formulas, and the bases from sums, against a stack and its SVD."""

from __future__ import annotations

import pytest
import torch

from sparse_compile import hosvd
from sparse_compile.hosvd import Directions
from sparse_compile.methods import rotate

F64 = torch.float64
SIZES = [(24, 6), (6, 24), (9, 9), (1, 5), (1, 1)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def orthonormal(size: int, rank: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=F64)).Q[:, :rank]


@pytest.mark.parametrize("sides", ["short", "both"])
@pytest.mark.parametrize("entries", [1, 7, 30, 1000])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_corner_holds_the_entries(outputs, inputs, entries, sides):
    p, q = rotate.corner(entries, outputs, inputs, sides)
    assert 1 <= p <= outputs
    assert 1 <= q <= inputs
    assert p * q >= min(entries, outputs * inputs)
    assert (p - 1) * (q - 1) < entries


def test_corner_has_the_proportions_of_the_weight_or_its_longer_side():
    entries = 4 * rotate.count(0.01, 1536, 384)
    assert rotate.corner(64 * 16, 256, 64, "both") == (64, 16)
    assert rotate.corner(entries, 1536, 384, "both") == (308, 77)
    assert rotate.corner(entries, 1536, 384, "short") == (1536, 16)
    assert rotate.corner(entries, 384, 1536, "short") == (16, 1536)
    assert rotate.corner(entries, 768, 768, "short") == (768, 31)


@pytest.mark.parametrize(("density", "count"), [(1e-9, 1), (0.1, 14), (1.0, 144)])
def test_count(density, count):
    assert rotate.count(density, 24, 6) == count


@pytest.mark.parametrize(("p", "q"), [(4, 2), (2, 4), (3, 3), (24, 6)])
def test_gradient_is_a_corner_of_the_rotated_one(p, q):
    dy, x = torch.randn(11, 24, dtype=F64), torch.randn(11, 6, dtype=F64)
    u, v = orthonormal(24, 24), orthonormal(6, 6)
    whole = u.t() @ (dy.t() @ x) @ v
    found = rotate.gradient(dy, x, u[:, :p], v[:, :q])
    torch.testing.assert_close(found, whole[:p, :q], rtol=1e-10, atol=1e-12)
    dw = dy.t() @ x
    left, right = rotate.gradient(dy, x, u[:, :p], None), rotate.gradient(dy, x, None, v[:, :q])
    torch.testing.assert_close(left, u[:, :p].t() @ dw, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(right, dw @ v[:, :q], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("p", "q", "sides"), [(4, 2, "both"), (2, 4, "both"), (24, 2, "short"), (2, 6, "short")]
)
def test_flops_are_those_of_the_products(p, q, sides, monkeypatch):
    done = []

    def counted(a, b, mm=torch.mm):
        done.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return mm(a, b)

    monkeypatch.setattr(torch, "mm", counted)
    u = None if sides == "short" and p == 24 else torch.randn(24, p)
    v = None if sides == "short" and q == 6 else torch.randn(6, q)
    assert rotate.gradient(torch.randn(11, 24), torch.randn(11, 6), u, v).shape == (p, q)
    assert len(done) == (2 if sides == "short" else 3)
    assert sum(done) == rotate.flops(11, 24, 6, p, q, sides)


def test_the_default_corner_costs_less_than_the_product_it_replaces():
    for outputs, inputs in ((3072, 768), (1536, 384), (4096, 11008)):
        p, q = rotate.corner(4 * rotate.count(0.01, outputs, inputs), outputs, inputs, "short")
        cost = rotate.flops(2048, outputs, inputs, p, q, "short")
        assert cost < 0.06 * 2 * 2048 * outputs * inputs


def test_choose_takes_the_largest_and_nothing_that_is_not_finite():
    s = torch.tensor([[1.0, -5.0, float("nan")], [float("inf"), 2.0, -0.5]])
    found = rotate.choose(s, 3)
    assert found.tolist() == [0, 1, 4]
    assert found.dtype == torch.int32


@pytest.mark.parametrize("left_out", ["", "u", "v"])
@pytest.mark.parametrize(("p", "q"), [(4, 2), (2, 4)])
def test_update_undoes_the_rotation(p, q, left_out):
    p, q = 24 if left_out == "u" else p, 6 if left_out == "v" else q
    u = torch.eye(24, dtype=F64) if left_out == "u" else orthonormal(24, p)
    v = torch.eye(6, dtype=F64) if left_out == "v" else orthonormal(6, q)
    indices = torch.tensor([0, 3, 7], dtype=torch.int32)
    entries = torch.randn(3, dtype=F64)
    given = (None if left_out == "u" else u, None if left_out == "v" else v)
    moved = rotate.update(entries, indices, *given, (p, q))
    back = (u.t() @ moved @ v).flatten()
    expected = torch.zeros(p * q, dtype=F64)
    expected[indices.long()] = entries
    torch.testing.assert_close(back, expected, rtol=1e-12, atol=1e-13)
    assert float(moved.norm()) == pytest.approx(float(entries.norm()), rel=1e-12)


def stack(count: int = 4, outputs: int = 20, inputs: int = 7) -> list[torch.Tensor]:
    """Gradients whose energy falls from one direction to the next."""
    falling = torch.linspace(0, -4, outputs, dtype=F64).exp()
    basis = orthonormal(outputs, outputs)
    return [basis @ (falling.unsqueeze(1) * torch.randn(outputs, inputs, dtype=F64)) for _ in range(count)]


def test_directions_are_those_of_the_stack():
    gradients, directions = stack(), Directions(20, 5, "seed")
    for g in gradients:
        directions.add(g)
    u = torch.linalg.svd(torch.cat(gradients, dim=1)).U[:, :5]
    torch.testing.assert_close((directions.leading() * u).sum(0).abs(), torch.ones(5, dtype=F64))


def test_sketched_directions_hold_nearly_all_that_the_best_hold(monkeypatch):
    gradients = stack(count=6, outputs=80, inputs=9)
    matrix = torch.cat(gradients, dim=1)
    best = float((torch.linalg.svd(matrix).S[:5] ** 2).sum())
    monkeypatch.setattr(hosvd, "WHOLE", 10)
    directions = Directions(80, 5, "seed")
    for g in gradients:
        directions.add(g)
    assert directions.sums.shape == (80, 2 * 5 + 16)
    u = directions.leading()
    torch.testing.assert_close(u.t() @ u, torch.eye(5, dtype=F64), rtol=0, atol=1e-10)
    held = float((u.t() @ matrix).square().sum())
    assert 0.98 * best <= held <= best * (1 + 1e-9)


def test_sketch_depends_on_its_seed_alone(monkeypatch):
    monkeypatch.setattr(hosvd, "WHOLE", 10)
    g = torch.randn(60, 9)
    sums = []
    for seed in ("a", "a", "b"):
        directions = Directions(60, 3, seed)
        directions.add(g)
        sums.append(directions.sums)
    assert torch.equal(sums[0], sums[1])
    assert not torch.equal(sums[0], sums[2])


@pytest.mark.parametrize("whole", [10, 1000])
def test_directions_of_a_matrix_of_low_rank(whole, monkeypatch):
    """Fewer directions than are asked for: the rest is arbitrary, but orthonormal."""
    monkeypatch.setattr(hosvd, "WHOLE", whole)
    directions = Directions(60, 8, "seed")
    g = torch.randn(60, 2) @ torch.randn(2, 9)
    directions.add(g)
    u = directions.leading()
    torch.testing.assert_close(u.t() @ u, torch.eye(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(u @ (u.t() @ g), g, rtol=1e-3, atol=1e-3)


def test_directions_of_half_precision_are_summed_in_float32():
    directions = Directions(6, 2, "seed")
    directions.add(torch.randn(6, 4, dtype=torch.bfloat16))
    assert directions.sums.dtype == directions.leading().dtype == torch.float32
