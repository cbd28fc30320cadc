"""Row statistics and compaction against their eager references."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_compile.kernels.triton import reference
from sparse_compile.kernels.triton.compaction import compact
from sparse_compile.kernels.triton.row_stats import live_rows, row_stats, scores

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(37, 45), (1, 1), (16, 128), (9, 300), (64, 129)]  # N, O


def sparse_rows(n: int, outputs: int, dead: float, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    dy = torch.randn(n, outputs, device=device).to(dtype)
    dy[torch.rand(n, device=device) < dead] = 0
    return dy


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dead", [0.0, 0.5, 1.0])
def test_row_stats(size: tuple[int, int], dtype: torch.dtype, dead: float, device: torch.device) -> None:
    dy = sparse_rows(*size, dead, device, dtype)
    squares, live = row_stats(dy)
    wanted_squares, wanted_live = reference.row_stats(dy)
    torch.testing.assert_close(squares, wanted_squares)
    assert torch.equal(live, wanted_live)
    assert torch.equal(live_rows(dy), wanted_live)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 15])
def test_residual_norms(dtype: torch.dtype, tokens: int, device: torch.device) -> None:
    dy = sparse_rows(15, 45, 0.3, device, dtype)
    base = torch.randn(tokens, 45, device=device).to(dtype)
    squares, live = row_stats(dy, base)
    wanted_squares, wanted_live = reference.row_stats(dy, base)
    torch.testing.assert_close(squares, wanted_squares)
    assert torch.equal(live, wanted_live), "live is of dY, not of the residual"


@pytest.mark.parametrize("column", [0, 127, 128, 299])
def test_a_row_lives_by_a_single_entry(column: int, device: torch.device) -> None:
    """Wherever it is, and however small: the square of 1e-30 is zero in float32."""
    dy = torch.zeros(20, 300, device=device)
    dy[7, column], dy[11, column], dy[12, column] = 1e-30, torch.nan, -0.0
    for live in (live_rows(dy), row_stats(dy)[1]):
        assert live.nonzero().squeeze(1).tolist() == [7, 11]


@pytest.mark.parametrize("layout", ["column-major", "expanded"])
def test_strides_do_not_matter(layout: str, device: torch.device) -> None:
    dy = sparse_rows(37, 45, 0.5, device, torch.float32)
    dy = dy.t().contiguous().t() if layout == "column-major" else dy[:, :1].expand(37, 45)
    squares, live = row_stats(dy)
    torch.testing.assert_close(squares, reference.row_stats(dy)[0])
    assert torch.equal(live, (dy != 0).any(1))
    assert torch.equal(live_rows(dy), live)


@pytest.mark.parametrize("n", [0, 1, 37, 4096, 10_000])
@pytest.mark.parametrize("dead", [0.0, 0.7, 1.0])
def test_compact(n: int, dead: float, device: torch.device) -> None:
    live = torch.rand(n, device=device) >= dead
    for ours, wanted in zip(compact(live), reference.compact(live), strict=True):
        assert ours.dtype is wanted.dtype
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [None, 1, 50, 131])
def test_scores(size: tuple[int, int], dtype: torch.dtype, inputs: int | None, device: torch.device) -> None:
    dy = sparse_rows(*size, 0.4, device, dtype)
    x = None if inputs is None else sparse_rows(size[0], inputs, 0.2, device, dtype)
    for norm in (True, False)[: 1 if x is None else 2]:
        torch.testing.assert_close(scores(dy, x, norm=norm), reference.scores(dy, x, norm=norm))


def test_scores_of_rows_that_are_hardly_there(device: torch.device) -> None:
    """A row that is not zero has a norm, or it would have no chance; one that is not a number says so."""
    dy, x = torch.zeros(20, 300, device=device), torch.ones(20, 7, device=device)
    dy[7, 299], dy[11, 3], dy[12, 5], dy[13, 0] = 1e-30, torch.nan, -0.0, torch.inf
    x[3] = 0
    x[7] = 1e-30
    norms, leverages = scores(dy, x)
    assert norms.nonzero().squeeze(1).tolist() == [7, 11, 13]
    assert norms[11].isnan()
    assert norms[13].isinf()
    assert torch.equal(leverages[[11, 13]].isfinite(), torch.tensor([False, False], device=device))


@pytest.mark.parametrize("layout", ["column-major", "expanded"])
def test_strides_do_not_matter_to_scores(layout: str, device: torch.device) -> None:
    matrices = [sparse_rows(37, width, 0.3, device, torch.float32) for width in (45, 60)]
    if layout == "column-major":
        dy, x = (m.t().contiguous().t() for m in matrices)
    else:
        dy, x = (m[:, :1].expand_as(m) for m in matrices)
    torch.testing.assert_close(scores(dy, x), reference.scores(dy, x))
