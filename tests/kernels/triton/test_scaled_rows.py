"""Rows by their weights, one after the other."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_compile.kernels.triton import reference
from sparse_compile.kernels.triton.scaled_rows import _COLUMNS, _ROWS, scaled_rows


@pytest.mark.parametrize("size", [(37, 45), (1, 1), (3 * _ROWS + 1, _COLUMNS + 1), (5, 0)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_scaled_rows(
    size: tuple[int, int], share: float, dtype: torch.dtype, transposed: bool, device: torch.device
) -> None:
    n, _ = size
    m = torch.randn(size[::-1], device=device).t() if transposed else torch.randn(size, device=device)
    m = m.to(dtype)
    kept = torch.randperm(n, device=device).int()
    count = torch.tensor([-int(-share * n // 1)], dtype=torch.int32, device=device)
    scale = torch.rand(n, device=device) + 0.5
    found = scaled_rows(m, kept, count, scale)
    assert (found.shape, found.dtype) == (size, dtype)
    # (Triton's interpreter cuts off what does not fit into bfloat16.)
    torch.testing.assert_close(found[: int(count)], reference.scaled_rows(m, kept, count, scale))


def test_rows_beyond_the_count_are_not_read(device: torch.device) -> None:
    """Their numbers are anything."""
    m = torch.randn(8, 20, device=device)
    kept = torch.tensor([3, 5, 1 << 30, -7], dtype=torch.int32, device=device)
    scale = torch.full((4,), 2.0, device=device)
    found = scaled_rows(m, kept, torch.tensor([2], dtype=torch.int32, device=device), scale)
    assert torch.equal(found[:2], 2 * m[[3, 5]])
