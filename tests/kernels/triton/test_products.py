"""The two gathered products against their eager references, on sizes that no tile divides."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sparse_compile.kernels.triton import reference
from sparse_compile.kernels.triton.compaction import compact
from sparse_compile.kernels.triton.input_gradient import input_gradient
from sparse_compile.kernels.triton.weight_gradient import weight_gradient

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [  # N, O, I
    (37, 45, 29),
    (1, 1, 1),
    (64, 32, 48),
    (33, 17, 70),
    (5, 130, 3),
]
# Of the rows: none, one, some, all.
COUNTS = (0.0, 0.01, 0.4, 1.0)


@dataclasses.dataclass
class Case:
    """A layer's operands, and an index buffer of which only the first ``count`` entries count."""

    dy: Tensor
    x: Tensor
    w: Tensor
    kept: Tensor
    count: Tensor
    scale: Tensor


def case(
    size: tuple[int, int, int], share: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> Case:
    n, outputs, inputs = size
    shapes = (n, outputs), (n, inputs), (outputs, inputs)
    dy, x, w = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    kept = torch.randperm(n, device=device).int()
    count = torch.tensor([-int(-share * n // 1)], dtype=torch.int32, device=device)
    return Case(dy, x, w, kept, count, torch.rand(n, device=device) + 0.5)


def assert_no_worse(ours: Tensor, truth: Tensor, dense: Tensor) -> None:
    """The error of ``ours`` is at most that of the dense product of the same rows, and a rounding."""
    assert ours.dtype is dense.dtype
    assert ours.shape == truth.shape
    allowed = (dense.double() - truth).norm() + torch.finfo(ours.dtype).eps * truth.norm()
    assert (ours.double() - truth).norm() <= allowed


def estimate(case: Case, *, scaled: bool) -> Tensor:
    """What stands for dY, written out in float64: scaled rows where kept, else zero."""
    rows = case.kept[: int(case.count)].long()
    written = torch.zeros_like(case.dy, dtype=torch.float64)
    written[rows] = case.dy[rows].double()
    if scaled:
        written[rows] *= case.scale[: int(case.count)].double().unsqueeze(1)
    return written


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", COUNTS)
@pytest.mark.parametrize("scaled", [False, True])
def test_input_gradient(size: tuple[int, int, int], share: float, scaled: bool, device: torch.device) -> None:
    c = case(size, share, device)
    arguments = (c.dy, c.w, c.kept, c.count, c.scale if scaled else None)
    products, wanted = input_gradient(*arguments), reference.input_gradient(*arguments)
    count = int(c.count)
    assert products.shape == (size[0], size[2])
    torch.testing.assert_close(products[:count], wanted[:count])
    if count < size[0]:
        assert not products[-1].any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", COUNTS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("splits", [None, 3])
def test_weight_gradient(
    size: tuple[int, int, int],
    share: float,
    scaled: bool,
    transposed: bool,
    splits: int | None,
    device: torch.device,
) -> None:
    c = case(size, share, device)
    arguments = (c.dy, c.x, c.kept, c.count, c.scale if scaled else None)
    dw = weight_gradient(*arguments, transposed=transposed, splits=splits)
    wanted = reference.weight_gradient(*arguments, transposed=transposed)
    assert dw.is_contiguous()
    torch.testing.assert_close(dw, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_low_precision_is_no_worse_than_the_dense_products(
    dtype: torch.dtype, scaled: bool, device: torch.device
) -> None:
    c = case((70, 90, 50), 0.5, device, dtype)
    scale = c.scale if scaled else None
    rows = c.kept[: int(c.count)].long()
    exactly = estimate(c, scaled=scaled)
    written = exactly.to(dtype)
    assert_no_worse(
        input_gradient(c.dy, c.w, c.kept, c.count, scale)[: len(rows)],
        exactly[rows] @ c.w.double(),
        written[rows] @ c.w,
    )
    for transposed in (False, True):
        truth, dense = exactly.t() @ c.x.double(), written.t() @ c.x
        assert_no_worse(
            weight_gradient(c.dy, c.x, c.kept, c.count, scale, transposed=transposed, splits=2),
            truth.t() if transposed else truth,
            dense.t() if transposed else dense,
        )


@pytest.mark.parametrize("layout", ["column-major", "every other row", "expanded"])
def test_strides_of_the_operands_do_not_matter(layout: str, device: torch.device) -> None:
    c = case((37, 45, 29), 0.5, device)

    def laid_out(matrix: Tensor) -> Tensor:
        if layout == "column-major":
            return matrix.t().contiguous().t()
        if layout == "every other row":
            return torch.stack([matrix, matrix + 1], 1)[:, 0]
        return matrix[:1].expand_as(matrix)

    dy, x, w = map(laid_out, (c.dy, c.x, c.w))
    count = int(c.count)
    torch.testing.assert_close(
        input_gradient(dy, w, c.kept, c.count)[:count],
        reference.input_gradient(dy, w, c.kept, c.count)[:count],
    )
    torch.testing.assert_close(
        weight_gradient(dy, x, c.kept, c.count), reference.weight_gradient(dy, x, c.kept, c.count)
    )


def test_what_is_beyond_the_count_is_not_read(device: torch.device) -> None:
    """Neither the rows that the rest of the buffer names, nor their scales: a NaN there does no harm."""
    c = case((37, 45, 29), 0.5, device)
    count = int(c.count)
    rest = c.kept[count:].long()
    c.dy[rest], c.x[rest], c.scale[count:] = torch.nan, torch.nan, torch.nan
    assert input_gradient(c.dy, c.w, c.kept, c.count, c.scale)[:count].isfinite().all()
    for splits in (1, 3):
        assert weight_gradient(c.dy, c.x, c.kept, c.count, c.scale, splits=splits).isfinite().all()


def test_what_is_not_finite_reaches_the_gradients(device: torch.device) -> None:
    c = case((37, 45, 29), 0.5, device)
    c.dy[int(c.kept[0]), 3] = torch.nan
    assert input_gradient(c.dy, c.w, c.kept, c.count)[0].isnan().all()
    assert weight_gradient(c.dy, c.x, c.kept, c.count)[3].isnan().all()


def test_rows_beyond_the_count_are_not_written(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Early exit, also with room for fewer rows than there are: the room behind it is for the base."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    c = case((37, 45, 29), 0.4, device)
    count = int(c.count)
    torch.use_deterministic_algorithms(True)  # what is empty holds NaNs
    try:
        products = input_gradient(c.dy, c.w, c.kept[:20], c.count)
    finally:
        torch.use_deterministic_algorithms(False)
    assert products[count:-1].isnan().all()
    assert len(products[count:-1]) == 36 - count
    assert not products[-1].any()
    wanted = reference.input_gradient(c.dy, c.w, c.kept, c.count)
    torch.testing.assert_close(products[:count], wanted[:-1])


def test_int64_row_numbers_will_do(device: torch.device) -> None:
    c = case((37, 45, 29), 0.5, device)
    narrow, wide = (input_gradient(c.dy, c.w, kept, c.count) for kept in (c.kept, c.kept.long()))
    assert torch.equal(narrow[: int(c.count)], wide[: int(c.count)])


def test_the_same_sum_in_every_run(device: torch.device) -> None:
    c = case((200, 45, 29), 0.9, device)
    first, second = (weight_gradient(c.dy, c.x, c.kept, c.count, splits=3) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("size", [(0, 4, 5), (4, 4, 0)])
def test_nothing_to_do(size: tuple[int, int, int], device: torch.device) -> None:
    c = case(size, 1.0, device)
    assert input_gradient(c.dy, c.w, c.kept, c.count).shape == (size[0], size[2])
    dw = weight_gradient(c.dy, c.x, c.kept, c.count)
    assert dw.shape == (size[1], size[2])
    assert not dw.any()


@pytest.mark.parametrize("dead", [0.0, 0.3, 1.0])
def test_skipping_zero_rows_is_exact(dead: float, device: torch.device) -> None:
    """Statistics, compaction and both products together, against the dense ones."""
    from sparse_compile.kernels.triton.row_stats import live_rows

    c = case((61, 45, 29), 1.0, device)
    c.dy[torch.rand(61, device=device) < dead] = 0
    kept, count, slot = compact(live_rows(c.dy))
    dx = input_gradient(c.dy, c.w, kept, count)[slot]
    torch.testing.assert_close(dx, c.dy @ c.w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight_gradient(c.dy, c.x, kept, count), c.dy.t() @ c.x, rtol=1e-5, atol=1e-5)
