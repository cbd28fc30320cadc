"""The sum of the inputs whose rows are dropped, against its eager reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_compile.kernels.triton import reference
from sparse_compile.kernels.triton.base_inputs import sum_dropped

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [  # B, T, I
    (4, 9, 29),
    (1, 1, 1),
    (37, 3, 150),
    (16, 5, 128),
    (50, 1, 3),
    (1, 7, 300),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_sum_dropped(
    size: tuple[int, int, int], dtype: torch.dtype, share: float, device: torch.device
) -> None:
    samples, tokens, inputs = size
    x = torch.randn(samples * tokens, inputs, device=device).to(dtype)
    dropped = torch.rand(len(x), device=device) < share
    sums, wanted = sum_dropped(x, dropped, tokens), reference.sum_dropped(x, dropped, tokens)
    assert sums.shape == (tokens, inputs)
    assert sums.is_contiguous()
    torch.testing.assert_close(sums, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_added_up_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    """In 16 bits, a large number would swallow every one of these."""
    x = torch.ones(4097, 1, device=device, dtype=dtype)
    x[0] = 4096
    everything = torch.ones(len(x), dtype=torch.bool, device=device)
    assert sum_dropped(x, everything, 1).item() == 8192


@pytest.mark.parametrize("layout", ["column-major", "every other row", "expanded"])
def test_strides_do_not_matter(layout: str, device: torch.device) -> None:
    x = torch.randn(36, 29, device=device)
    if layout == "column-major":
        x = x.t().contiguous().t()
    else:
        x = torch.stack([x, x + 1], 1)[:, 0] if layout == "every other row" else x[:1].expand_as(x)
    dropped = torch.rand(36, device=device) < 0.5
    torch.testing.assert_close(sum_dropped(x, dropped, 9), reference.sum_dropped(x, dropped, 9))


def test_rows_that_are_kept_are_not_read(device: torch.device) -> None:
    """0 · ∞ is not a number; and what is dropped and not finite is not lost."""
    x = torch.randn(60, 29, device=device)
    dropped = torch.rand(60, device=device) < 0.5
    x[~dropped] = torch.where(torch.rand(29, device=device) < 0.5, torch.inf, torch.nan)
    assert sum_dropped(x, dropped, 3).isfinite().all()
    row = int(dropped.nonzero()[0])
    x[row, 7] = torch.nan
    assert sum_dropped(x, dropped, 3).isnan().nonzero().tolist() == [[row % 3, 7]]


@pytest.mark.parametrize(("n", "tokens", "inputs"), [(0, 3, 4), (4, 2, 0), (0, 0, 4)])
def test_nothing_to_do(n: int, tokens: int, inputs: int, device: torch.device) -> None:
    x = torch.randn(n, inputs, device=device)
    sums = sum_dropped(x, torch.ones(n, dtype=torch.bool, device=device), tokens)
    assert sums.shape == (tokens, inputs)
    assert not sums.any()


def test_the_same_sum_in_every_run(device: torch.device) -> None:
    x = torch.randn(200, 29, device=device)
    dropped = torch.rand(200, device=device) < 0.5
    assert torch.equal(sum_dropped(x, dropped, 4), sum_dropped(x, dropped, 4))
