"""The products over few rows, against the same products over the estimate written out."""

import pytest
import torch

from sparse_compile.kernels import linear as kernel
from sparse_compile.methods import exact, reuse
from sparse_compile.methods.rows import Rows

F64 = torch.float64
SIZES = [  # samples, tokens, inputs, outputs
    (4, 6, 5, 7),
    (1, 1, 1, 1),
    (1, 13, 3, 2),
    (9, 1, 8, 4),
    (3, 5, 1, 9),
    (2, 33, 17, 19),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(5)


def operands(samples, tokens, inputs, outputs, dtype=F64):
    n = samples * tokens
    return (torch.randn(*shape, dtype=dtype) for shape in ((n, outputs), (n, inputs), (outputs, inputs)))


def rows_of(dy, tokens, *, kept=0.4, base=True, dead=0.0, scaled=False):
    """Random rows: a share ``dead`` of them zero, ``kept`` of them all computed, the rest dropped."""
    n = len(dy)
    order = torch.randperm(n)
    alive = order[round(dead * n) :]
    chosen = alive[: round(kept * n)].sort().values
    scale = torch.rand(len(chosen), dtype=dy.dtype) * 5 if scaled else None
    if not base:
        return Rows(kept=chosen, scale=scale)
    dropped = torch.zeros(n, dtype=torch.bool)
    dropped[alive] = True
    dropped[chosen] = False
    return Rows(kept=chosen, base=torch.randn(tokens, dy.shape[1]).to(dy), dropped=dropped, scale=scale)


def products(dy, x, w, rows, *, transposed=False):
    """(dX, dW) as a site computes them."""
    compact = kernel.gather(dy, rows)
    dx = kernel.written_out(kernel.input_gradient_of_rows(compact, w, rows, len(dy)))
    return dx, kernel.weight_gradient_of_rows(compact, x, rows, transposed=transposed)


def check(dy, x, w, rows, transposed=False):
    estimate = rows.dense(dy)
    dx, dw = products(dy, x, w, rows, transposed=transposed)
    torch.testing.assert_close(dx, estimate @ w, rtol=1e-12, atol=1e-12)
    wanted = estimate.t() @ x
    torch.testing.assert_close(dw, wanted.t() if transposed else wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_dense_products(transposed):
    dy, x, w = operands(4, 6, 5, 7)
    torch.testing.assert_close(kernel.written_out(kernel.input_gradient(dy, w)), dy @ w)
    dw = kernel.weight_gradient(dy, x, transposed=transposed)
    torch.testing.assert_close(dw, x.t() @ dy if transposed else dy.t() @ x)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dead", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_few_rows_equal_the_estimate_written_out(size, scaled, base, dead, transposed):
    dy, x, w = operands(*size)
    check(dy, x, w, rows_of(dy, size[1], base=base, dead=dead, scaled=scaled), transposed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("base", [False, True])
def test_no_row_kept(size, base):
    dy, x, w = operands(*size)
    check(dy, x, w, rows_of(dy, size[1], kept=0.0, base=base))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("base", [False, True])
def test_every_row_kept(size, base):
    dy, x, w = operands(*size)
    rows = rows_of(dy, size[1], kept=1.0, base=base)
    check(dy, x, w, rows)
    torch.testing.assert_close(rows.dense(dy), dy)


@pytest.mark.parametrize("base", [False, True])
def test_layout_of_the_operands_does_not_matter(base):
    dy, x, w = operands(4, 6, 5, 7)
    rows = rows_of(dy, 6, base=base, dead=0.2)
    plain = products(dy, x, w, rows)
    turned = products(*(matrix.t().contiguous().t() for matrix in (dy, x, w)), rows)
    torch.testing.assert_close(turned, plain)


def test_operands_are_left_alone():
    operands_ = tuple(operands(4, 6, 5, 7))
    before = [matrix.clone() for matrix in operands_]
    rows = rows_of(operands_[0], 6, dead=0.2)
    base, dropped = rows.base.clone(), rows.dropped.clone()
    products(*operands_, rows)
    assert all(torch.equal(a, b) for a, b in zip(before, operands_, strict=True))
    assert torch.equal(rows.base, base)
    assert torch.equal(rows.dropped, dropped)


def test_skipping_zero_rows_is_exact():
    """Against autograd itself, in float64: the gradient of a linear whose output is masked."""
    x, w = torch.randn(30, 6, dtype=F64, requires_grad=True), torch.randn(9, 6, dtype=F64, requires_grad=True)
    mask = (torch.rand(30, 1) < 0.4).to(F64)
    dy = torch.randn(30, 9, dtype=F64) * mask
    (x @ w.t()).backward(dy)
    rows = exact.rows(exact.live_rows(dy))
    assert rows.computed == int(mask.sum())
    dx, dw = products(dy, x.detach(), w.detach(), rows)
    torch.testing.assert_close(dx, x.grad, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dw, w.grad, rtol=1e-13, atol=1e-13)
    assert not dx[mask[:, 0] == 0].any()


def test_skipping_zero_rows_passes_gradcheck():
    """A linear whose backward skips rows, with numerical derivatives, through a mask."""
    mask = torch.tensor([1, 0, 0, 1, 1, 0], dtype=F64).unsqueeze(1)

    class Skipping(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w.t()

        @staticmethod
        def backward(ctx, dy):
            x, w = ctx.saved_tensors
            live = exact.live_rows(dy)
            return products(dy, x, w, Rows(torch.arange(6)) if live is None else exact.rows(live))

    x, w = torch.randn(6, 3, dtype=F64, requires_grad=True), torch.randn(4, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.tanh(Skipping.apply(x, w)) * mask, (x, w))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dead", [0.0, 0.3])
def test_low_precision_is_no_worse_than_the_dense_products(dtype, dead):
    """Against float64 truth: the error is at most that of the dense products of the same estimate, and
    a rounding of the largest value. (The sum of a token's inputs is rounded once more, hence ``eps``.)"""
    dy, x, w = operands(8, 16, 48, 40, dtype)
    rows = reuse.rows(dy, reuse.next_base(dy, 16, 3), 0.3, None)
    if dead:
        rows = rows_of(dy, 16, dead=dead)
    estimate = rows.dense(dy)
    truth = estimate.double() @ w.double(), estimate.double().t() @ x.double()
    eager = estimate @ w, estimate.t() @ x
    for ours, theirs, exactly in zip(products(dy, x, w, rows), eager, truth, strict=True):
        assert ours.dtype is dtype
        allowed = (theirs.double() - exactly).norm() + torch.finfo(dtype).eps * exactly.norm()
        assert (ours.double() - exactly).norm() <= allowed
