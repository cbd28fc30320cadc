"""Partial sums, added up in one pass."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_compile.kernels.triton import reference
from sparse_compile.kernels.triton.partial_sums import _BLOCK, add_up


@pytest.mark.parametrize("size", [(1, 3, 5), (2, 1, 1), (8, 29, 37), (3, 1, _BLOCK + 1), (0, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_add_up(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    parts = torch.randn(size, device=device)
    sums = add_up(parts, dtype)
    assert (sums.shape, sums.dtype) == (size[1:], dtype)
    torch.testing.assert_close(sums, reference.add_up(parts, dtype))


def test_it_is_rounded_once(device: torch.device) -> None:
    """In 16 bits, a large number would swallow every one of these."""
    parts = torch.ones(257, 1, 1, device=device)
    parts[0] = 256
    assert add_up(parts, torch.bfloat16).item() == 512


def test_nothing_to_do(device: torch.device) -> None:
    assert add_up(torch.empty(2, 0, 3, device=device), torch.bfloat16).shape == (0, 3)
