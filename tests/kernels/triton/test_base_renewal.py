"""A base that is renewed in its place, against its eager reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_compile.kernels.triton import reference
from sparse_compile.kernels.triton.base_renewal import _BLOCK, renew_base

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(4, 9, 29), (1, 1, 1), (37, 3, 600), (8, 5, 512), (3, 1, _BLOCK + 1)]  # B, T, O


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_one", [False, True])
@pytest.mark.parametrize("spoiled", [None, torch.inf, -torch.inf, torch.nan])
def test_renew_base(
    size: tuple[int, int, int],
    dtype: torch.dtype,
    of_one: bool,
    spoiled: float | None,
    device: torch.device,
) -> None:
    samples, tokens, outputs = size
    dy = torch.randn(samples * tokens, outputs, device=device).to(dtype)
    sample = torch.tensor([samples - 1], device=device) if of_one else None
    if spoiled is not None:
        dy[-1, -1] = spoiled  # of the last sample
    base, renewed = torch.randn(tokens, outputs, device=device).to(dtype), torch.tensor([7], device=device)
    before, wanted = base.clone(), base.clone()
    finite = reference.renew_base(dy, wanted, sample)
    renew_base(dy, base, sample, renewed)
    assert finite == (spoiled is None)
    assert renewed.item() == finite
    torch.testing.assert_close(base, wanted)
    assert finite or torch.equal(base, before)


def test_a_sample_that_is_not_remembered_may_hold_anything(device: torch.device) -> None:
    dy = torch.randn(12, 5, device=device)
    dy[:4] = torch.nan
    base, renewed = torch.zeros(4, 5, device=device), torch.tensor([0], device=device)
    renew_base(dy, base, torch.tensor([2], device=device), renewed)
    assert torch.equal(base, dy[8:])
    assert renewed.item() == 1


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_mean_that_overflows_is_not_remembered(device: torch.device) -> None:
    """Of numbers that do not."""
    dy = torch.full((4, 3), 3e38, device=device)
    base, renewed = torch.zeros(2, 3, device=device), torch.tensor([1], device=device)
    renew_base(dy, base, None, renewed)
    assert renewed.item() == 0
    assert not base.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_added_up_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    dy = torch.ones(4096, 1, device=device, dtype=dtype)
    dy[0], dy[1] = 4096, 2  # beside which ones would be lost
    base, renewed = torch.zeros(1, 1, device=device, dtype=dtype), torch.tensor([0], device=device)
    renew_base(dy, base, None, renewed)
    assert base.item() == 2


@pytest.mark.parametrize("layout", ["column-major", "every other row", "expanded"])
def test_strides_do_not_matter(layout: str, device: torch.device) -> None:
    dy = torch.randn(36, 29, device=device)
    if layout == "column-major":
        dy = dy.t().contiguous().t()
    else:
        dy = torch.stack([dy, dy + 1], 1)[:, 0] if layout == "every other row" else dy[:1].expand_as(dy)
    base, renewed = torch.zeros(9, 29, device=device), torch.tensor([0], device=device)
    wanted = base.clone()
    renew_base(dy, base, None, renewed)
    reference.renew_base(dy, wanted, None)
    torch.testing.assert_close(base, wanted)
