"""The two gathered products against their eager references, on sizes that no tile divides."""

from __future__ import annotations

import dataclasses
from typing import Any

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
BASED_SIZES = [  # B, T, O, I, C
    (4, 9, 45, 29, 20),
    (3, 1, 17, 70, 1),
    (2, 33, 32, 48, 32),
    (3, 16, 130, 3, 16),
    (5, 20, 1, 1, 40),
    (3, 7, 29, 45, 13),
    (3, 4, 9, 5, 0),
    (4, 40, 17, 33, 110),  # more tiles than stand side by side
]


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


@dataclasses.dataclass
class BasedCase(Case):
    """With a base P [T, O], Σ dropped X [T, I], and room for fewer rows than there are."""

    base: Tensor
    inputs: Tensor

    def products(self) -> Tensor:
        return input_gradient(self.dy, self.w, self.kept, self.count, base=self.base)

    def wanted_products(self) -> Tensor:
        return reference.input_gradient(self.dy, self.w, self.kept, self.count, base=self.base)

    def dw(self, **options: Any) -> Tensor:
        of_base = {"base": self.base, "inputs": self.inputs}
        return weight_gradient(self.dy, self.x, self.kept, self.count, **of_base, **options)

    def wanted_dw(self, **options: Any) -> Tensor:
        of_base = {"base": self.base, "inputs": self.inputs}
        return reference.weight_gradient(self.dy, self.x, self.kept, self.count, **of_base, **options)


def based_case(
    size: tuple[int, int, int, int, int],
    share: float,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> BasedCase:
    samples, tokens, outputs, inputs, capacity = size
    c = case((samples * tokens, outputs, inputs), 1.0, device, dtype)
    kept = c.kept[:capacity].contiguous()
    count = torch.tensor([-int(-share * capacity // 1)], dtype=torch.int32, device=device)
    base, of_base = (torch.randn(tokens, m, device=device).to(dtype) for m in (outputs, inputs))
    return BasedCase(c.dy, c.x, c.w, kept, count, c.scale, base, of_base)


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


@pytest.mark.parametrize("size", [(20, 24, 40), (20, 40, 24)])
@pytest.mark.parametrize("transposed", [False, True])
def test_large_weights_of_small_rows(
    size: tuple[int, int, int], transposed: bool, device: torch.device
) -> None:
    """Sampling gives a row of small dY a large weight. In float16, X times that would be infinite."""
    c = case(size, 1.0, device, torch.float16)
    c.dy *= 2.0**-14
    c.scale *= 2.0**17
    dw = weight_gradient(c.dy, c.x, c.kept, c.count, c.scale, transposed=transposed)
    wanted = reference.weight_gradient(c.dy, c.x, c.kept, c.count, c.scale, transposed=transposed)
    assert dw.isfinite().all()
    # Of 20 terms of about 10, each rounded to float16 (2⁻¹¹).
    torch.testing.assert_close(dw.float(), wanted, rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("size", BASED_SIZES)
@pytest.mark.parametrize("share", COUNTS)
def test_input_gradient_with_a_base(
    size: tuple[int, int, int, int, int],
    share: float,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind all slots of kept rows, and nothing else is written."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    c = based_case(size, share, device)
    capacity, count, tokens = len(c.kept), int(c.count), len(c.base)
    torch.use_deterministic_algorithms(True)  # what is empty holds NaNs
    try:
        products = c.products()
    finally:
        torch.use_deterministic_algorithms(False)
    wanted = c.wanted_products()
    assert len(wanted) == count + tokens + 1
    torch.testing.assert_close(products[:count], wanted[:count], rtol=1e-5, atol=1e-5)
    of_base = products[capacity : capacity + tokens]
    torch.testing.assert_close(of_base, wanted[count:-1], rtol=1e-5, atol=1e-5)
    assert not products[-1].any()
    assert products[count:capacity].isnan().all()
    assert products[capacity + tokens : -1].isnan().all()


@pytest.mark.parametrize("size", BASED_SIZES)
@pytest.mark.parametrize("share", COUNTS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("splits", [None, 1, 3])
def test_weight_gradient_with_a_base(
    size: tuple[int, int, int, int, int],
    share: float,
    transposed: bool,
    splits: int | None,
    device: torch.device,
) -> None:
    c = based_case(size, share, device)
    dw, wanted = c.dw(transposed=transposed, splits=splits), c.wanted_dw(transposed=transposed)
    assert dw.is_contiguous()
    torch.testing.assert_close(dw, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_with_a_base_is_no_worse_than_the_dense_products(
    dtype: torch.dtype, device: torch.device
) -> None:
    """Of the kept rows and the base, one under the other."""
    c = based_case((3, 20, 90, 50, 35), 0.6, device, dtype)
    capacity, count = len(c.kept), int(c.count)
    rows = c.kept[:count].long()
    gradients, inputs = torch.cat([c.dy[rows], c.base]), torch.cat([c.x[rows], c.inputs])
    products = c.products()
    assert_no_worse(
        torch.cat([products[:count], products[capacity : capacity + len(c.base)]]),
        gradients.double() @ c.w.double(),
        gradients @ c.w,
    )
    for transposed in (False, True):
        truth, dense = gradients.double().t() @ inputs.double(), gradients.t() @ inputs
        assert_no_worse(
            c.dw(transposed=transposed, splits=2),
            truth.t() if transposed else truth,
            dense.t() if transposed else dense,
        )


LAYOUTS = ("column-major", "every other row", "expanded")


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    if layout == "column-major":
        return matrix.t().contiguous().t()
    if layout == "every other row":
        return torch.stack([matrix, matrix + 1], 1)[:, 0]
    return matrix[:1].expand_as(matrix)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_operands_do_not_matter(layout: str, device: torch.device) -> None:
    c = case((37, 45, 29), 0.5, device)
    dy, x, w = (laid_out(matrix, layout) for matrix in (c.dy, c.x, c.w))
    count = int(c.count)
    torch.testing.assert_close(
        input_gradient(dy, w, c.kept, c.count)[:count],
        reference.input_gradient(dy, w, c.kept, c.count)[:count],
    )
    torch.testing.assert_close(
        weight_gradient(dy, x, c.kept, c.count), reference.weight_gradient(dy, x, c.kept, c.count)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_with_a_base(layout: str, device: torch.device) -> None:
    c = based_case((4, 9, 45, 29, 20), 0.5, device)
    c.dy, c.x, c.w = (laid_out(matrix, layout) for matrix in (c.dy, c.x, c.w))
    products, wanted, count = c.products(), c.wanted_products(), int(c.count)
    torch.testing.assert_close(products[:count], wanted[:count])
    torch.testing.assert_close(products[20:29], wanted[count:-1])
    torch.testing.assert_close(c.dw(splits=2), c.wanted_dw())


def test_with_a_base_too_what_is_beyond_the_count_is_not_read(device: torch.device) -> None:
    c = based_case((4, 9, 45, 29, 20), 0.5, device)
    count = int(c.count)
    rest = c.kept[count:].long()
    c.dy[rest], c.x[rest] = torch.nan, torch.nan
    products = c.products()
    assert products[:count].isfinite().all()
    assert products[20:29].isfinite().all()
    for splits in (1, 3):
        assert c.dw(splits=splits).isfinite().all()


def test_of_a_base_what_is_not_finite_reaches_the_gradients(device: torch.device) -> None:
    c = based_case((4, 9, 45, 29, 20), 0.5, device)
    c.base[2, 3] = torch.nan
    assert c.products()[20:29].isnan().all(1).nonzero().squeeze(1).tolist() == [2]
    assert c.dw().isnan().all(1).nonzero().squeeze(1).tolist() == [3]


def test_what_has_a_base_has_no_scale(device: torch.device) -> None:
    c = based_case((4, 9, 45, 29, 20), 0.5, device)
    with pytest.raises(AssertionError):
        input_gradient(c.dy, c.w, c.kept, c.count, c.scale[:20], c.base)
    with pytest.raises(AssertionError):
        c.dw(scale=c.scale[:20])


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
    based = based_case((4, 50, 45, 29, 60), 0.9, device)
    assert torch.equal(based.dw(splits=3), based.dw(splits=3))


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


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_forward_is_a_product_with_a_transpose_and_a_bias(
    size: tuple[int, int, int], share: float, dtype: torch.dtype, device: torch.device
) -> None:
    """Here dY is X [N, O], and W the transpose of a weight [I, O]."""
    c = case(size, share, device, dtype)
    w, bias = c.w.t().contiguous().t(), torch.randn(size[2], device=device).to(dtype)
    count, rows = int(c.count), c.kept[: int(c.count)].long()
    products = input_gradient(c.dy, w, c.kept, c.count, bias=bias)
    truth = c.dy[rows].double() @ w.double() + bias.double()
    assert_no_worse(products[:count], truth, torch.addmm(bias, c.dy[rows], w))
    wanted = reference.input_gradient(c.dy, w, c.kept, c.count, bias=bias)
    torch.testing.assert_close(products[:count].float(), wanted[:count], rtol=0.02, atol=0.02)
    if count < size[0]:
        assert not products[-1].any()
