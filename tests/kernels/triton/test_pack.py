"""Selection, packing and unpacking against the forms of the CPU: the same entries, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from unread import unread

from sparse_compile.kernels import pack as by_aten
from sparse_compile.kernels.triton import pack as kernel
from sparse_compile.kernels.triton import reference, select
from sparse_compile.methods import prune

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK, ROUNDS = 256, 2
# B, n: less than a byte, than a block, whole bytes and blocks, and more of them than one program counts.
SIZES = [(1, 1), (2, 7), (3, 100), (1, 256), (2, 512), (1, 1537), (5, 301)]
KINDS = ("normal", "mostly zero", "all equal", "many equal", "not finite", "tiny", "unlike samples")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few entries are many blocks."""
    monkeypatch.setattr(select, "_BLOCK", BLOCK)
    monkeypatch.setattr(select, "_ROUNDS", ROUNDS)
    monkeypatch.setattr(kernel, "_BLOCK", BLOCK)


def inputs(kind: str, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(size, device=device)
    if kind == "not finite":
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0], device=device)
        x = torch.where(torch.rand_like(x) < 0.3, special[torch.randint(6, size, device=device)], x)
    return {
        "normal": x,
        "mostly zero": (x - 1.6).relu() * x.sign(),  # zeros of both signs
        "all equal": torch.full_like(x, -3.0),
        "many equal": (2 * x).round(),
        "not finite": x,
        "tiny": x * torch.finfo(dtype).tiny,  # with less than it, which some arithmetic takes for zero
        "unlike samples": x * torch.logspace(-3, 3, len(x), device=device).unsqueeze(1),
    }[kind].to(dtype)


def bits(x: Tensor) -> Tensor:
    """For comparisons: numbers that are not numbers are not equal to themselves."""
    return x.view(select.FORMATS[x.dtype].bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_kth_largest(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    x = inputs(kind, (2, 541), dtype, device)
    for k in (1, 54, 541):
        for ours, wanted in zip(select.kth_largest(x, k), reference.kth_largest(x, k), strict=True):
            assert ours.dtype is wanted.dtype
            assert torch.equal(ours, wanted), f"k = {k}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_form_is_that_of_the_cpu(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_as_on_the_cpu(inputs(kind, (2, 541), dtype, device), 54)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x, n = inputs("many equal", size, dtype, device), size[1]
    for k in sorted({1, n // 2 + 1, n}):
        assert_as_on_the_cpu(x, k)


def assert_as_on_the_cpu(x: Tensor, k: int) -> None:
    """Mask, values, and what is made of them again."""
    samples, n = x.shape
    mask, values = kernel.pack(x, samples, k)
    wanted_mask, wanted_values = by_aten.pack(x.cpu(), samples, k)
    assert (mask.dtype, values.dtype) == (torch.uint8, x.dtype)
    assert torch.equal(mask.cpu(), wanted_mask), f"k = {k}"
    assert torch.equal(bits(values).cpu(), bits(wanted_values)), f"k = {k}"
    wanted = by_aten.unpack(wanted_mask, wanted_values, n)
    assert torch.equal(bits(kernel.unpack(mask, values, n)).cpu(), bits(wanted)), f"k = {k}"


@pytest.mark.parametrize("keep", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "mostly zero", "many equal"])
def test_round_trip_is_the_formula(kind: str, dtype: torch.dtype, keep: float, device: torch.device) -> None:
    x = inputs(kind, (2, 541), dtype, device)
    mask, values = kernel.pack(x, 2, prune.count(keep, 541))
    assert torch.equal(kernel.unpack(mask, values, 541), prune.prune(x, 2, keep))


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_the_blocks_that_are_used(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert kernel._BLOCK > BLOCK
    n = select._BLOCK * select._ROUNDS + kernel._BLOCK + 3
    x = inputs("many equal", (2, n), dtype, device)
    mask, values = kernel.pack(x, 2, n // 10)
    assert torch.equal(kernel.unpack(mask, values, n), prune.prune(x, 2, n // 10 / n))


def test_of_equal_entries_the_first_are_kept(device: torch.device) -> None:
    """In whichever block they are, and not those of the sample before."""
    x = torch.ones(2, 700, device=device)
    x[0, 600], x[1, 0] = -2, 0
    mask, _ = kernel.pack(x, 2, 300)
    kept = kernel.unpack_bits(mask, 700)
    assert kept[0].nonzero().squeeze(1).tolist() == [*range(299), 600]
    assert kept[1].nonzero().squeeze(1).tolist() == [*range(1, 301)]


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides_do_not_matter(layout: str, device: torch.device) -> None:
    x = torch.randn(6, 30, 20, device=device)
    x = {"transposed": x.transpose(1, 2), "sliced": x[:, :, ::2], "expanded": x[:, :, :1].expand(6, 30, 20)}[
        layout
    ]
    n = x.numel() // 6
    mask, values = kernel.pack(x, 6, n // 3)
    assert torch.equal(kernel.unpack(mask, values, n).view(x.shape), prune.prune(x, 6, n // 3 / n))


@pytest.mark.parametrize("entries", [1, 8, 13, 256, 1027])
def test_bits(entries: int, device: torch.device) -> None:
    flags = torch.rand(3, entries, device=device) > 0.5
    mask = kernel.pack_bits(flags)
    assert torch.equal(mask.cpu(), by_aten.pack_bits(flags.cpu()))
    again = kernel.unpack_bits(mask, entries)
    assert again.dtype is torch.bool
    assert torch.equal(again, flags)


def test_bits_of_a_mask_that_is_not_contiguous(device: torch.device) -> None:
    flags = (torch.rand(40, 3, device=device) > 0.5).t()
    assert torch.equal(kernel.unpack_bits(kernel.pack_bits(flags), 40), flags)


def test_the_host_reads_nothing(device: torch.device) -> None:
    x = inputs("many equal", (2, 1003), torch.float32, device)
    with unread():
        kernel.unpack(*kernel.pack(x, 2, 100), 1003)
        kernel.unpack_bits(kernel.pack_bits(x > 0), 1003)
    with pytest.raises(AssertionError, match=r"masked_select\S* waits"), unread():
        by_aten.pack(x.cpu(), 2, 100)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: on the CPU there is nothing to wait for"
)
def test_nothing_waits_for_the_gpu(device: torch.device) -> None:
    x = inputs("many equal", (2, 1003), torch.float32, device)

    def everything() -> None:
        kernel.unpack(*kernel.pack(x, 2, 100), 1003)
        kernel.unpack_bits(kernel.pack_bits(x > 0), 1003)

    everything()  # kernels are built
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
