"""Pruning by the formula and by the fast form: the same entries, to the bit."""

import pytest
import torch
from unread import unread

from sparse_compile.kernels import pack as kernel
from sparse_compile.methods import prune


def inputs(kind, samples, entries):
    x = torch.randn(samples, entries, generator=torch.Generator().manual_seed(0))
    return {
        "normal": x,
        "mostly zero": (x - 1.6).relu(),
        "all equal": torch.ones_like(x),
        "many equal": (2 * x).round(),
        "one sample larger": x * torch.tensor([100.0] + [1.0] * (samples - 1)).unsqueeze(1),
        "features of unlike size": x * torch.linspace(0, 1, 8).repeat(entries // 8 + 1)[:entries] ** 4,
    }[kind]


KINDS = ["normal", "mostly zero", "all equal", "many equal", "one sample larger", "features of unlike size"]


def test_prune_is_the_formula():
    x = torch.tensor([[1.0, -5.0, 2.0, 0.5], [9.0, 8.0, -7.0, 6.0]])
    expected = torch.tensor([[0.0, -5.0, 2.0, 0.0], [9.0, 8.0, 0.0, 0.0]])
    assert torch.equal(prune.prune(x, 2, 0.5), expected)
    assert torch.equal(prune.prune(x.view(2, 2, 2), 2, 0.5), expected.view(2, 2, 2))


def test_of_equal_entries_the_first_are_kept():
    assert torch.equal(prune.prune(torch.ones(1, 4), 1, 0.5), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("keep", "entries", "k"), [(0.1, 100, 10), (0.1, 5, 1), (1 - 0.9, 98304, 9830), (1.0, 7, 7)]
)
def test_count(keep, entries, k):
    assert prune.count(keep, entries) == k


@pytest.mark.parametrize("keep", [0.001, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(3, 100), (4, 9001), (2, 98304)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_form_keeps_what_the_formula_keeps(kind, shape, keep):
    x = inputs(kind, *shape)
    k = prune.count(keep, shape[1])
    mask, kept = kernel.pack(x, shape[0], k)
    assert mask.shape == (shape[0], -(-shape[1] // 8))
    assert kept.shape == (shape[0] * k,)
    assert torch.equal(kernel.unpack(mask, kept, shape[1]), prune.prune(x, shape[0], keep))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_sorting_finds_the_same(kind, dtype):
    """What a GPU does without Triton, with nothing that the host has to know."""
    x = inputs(kind, 3, 1001).to(dtype)
    x[1, 7], x[1, 8], x[1, 9] = torch.inf, torch.nan, -torch.inf
    for k in (1, 2, 100, 1001):
        with unread():
            mask, kept = kernel.pack_by_sorting(x, k)
            back = kernel.unpack(mask, kept, 1001)
        wanted_mask, wanted = kernel.pack(x, 3, k)
        assert torch.equal(mask, wanted_mask)
        torch.testing.assert_close(kept, wanted, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(back, kernel.unpack(mask, wanted, 1001), rtol=0, atol=0, equal_nan=True)


def test_samples_of_a_layout_that_is_not_contiguous():
    x = inputs("normal", 6, 3000).view(6, 30, 100).transpose(1, 2)
    mask, kept = kernel.pack(x, 6, 300)
    assert torch.equal(kernel.unpack(mask, kept, 3000).view(x.shape), prune.prune(x, 6, 0.1))


@pytest.mark.parametrize("groups", [4, 12])
def test_means_are_taken_off_first(groups, monkeypatch):
    """Of samples that are done some at a time, too."""
    monkeypatch.setattr(kernel, "_CHUNK", 3 * 9000)
    x = inputs("normal", 4, 9000) + 5
    rows = x.view(groups, -1, 50)
    means = rows.mean(1)
    mask, kept = kernel.pack(x, 4, 900, means)
    wanted = prune.prune((rows - means.unsqueeze(1)).view(4, -1), 4, 0.1)
    assert torch.equal(kernel.unpack(mask, kept, 9000), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_with_mean(dtype):
    """Not small ones, nor those that are almost constant beside a mean that is not."""
    x = torch.stack([inputs("normal", 2, 2000).view(2, 40, 50) + 3 * torch.randn(50)] * 2).view(4, 40, 50)
    x[0, 3], x[1, 4], x[2, 5], x[3, 6] = 0, 0.1 * x[1, 4], 3, torch.nan
    x = x.to(dtype)
    means = x.mean(1)
    rows = prune.rows_with_mean(x.view(2, 80, 50), means)
    expected = torch.ones(4, 40, dtype=torch.bool)
    expected[0, 3] = expected[1, 4] = expected[2, 5] = False
    expected[3] = False  # its mean is no number
    assert torch.equal(rows, expected)


def test_means_are_not_taken_off_other_rows(monkeypatch):
    monkeypatch.setattr(kernel, "_CHUNK", 3 * 9000)
    x = inputs("normal", 4, 9000) + 5
    rows = torch.rand(8, 90) > 0.3
    means = x.view(8, 90, 50).mean(1)
    mask, kept = kernel.pack(x, 4, 900, means, rows)
    off = torch.where(rows.unsqueeze(-1), means.unsqueeze(1), 0)
    wanted = prune.prune((x.view(8, 90, 50) - off).view(4, -1), 4, 0.1)
    assert torch.equal(kernel.unpack(mask, kept, 9000), wanted)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_kept(value):
    """A loss that overflowed must give a gradient that shows it."""
    x = inputs("normal", 2, 9001)
    x[1, 77] = value
    mask, kept = kernel.pack(x, 2, 90)
    back = kernel.unpack(mask, kept, 9001)
    assert not back[1, 77].isfinite()
    assert torch.equal(back[0], prune.prune(x, 2, 90 / 9001)[0])
    assert int(kernel.unpack_bits(mask, 9001)[1].sum()) == 90


@pytest.mark.parametrize("entries", [1, 8, 13, 4096])
def test_bits_round_trip(entries):
    bits = torch.rand(3, entries) > 0.5
    packed = kernel.pack_bits(bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, -(-entries // 8)))
    assert torch.equal(kernel.unpack_bits(packed, entries), bits)


def test_entry_i_is_bit_i():
    bits = torch.zeros(1, 16, dtype=torch.bool)
    bits[0, [0, 3, 9]] = True
    assert kernel.pack_bits(bits).tolist() == [[0b1001, 0b10]]


@pytest.mark.parametrize(("values", "error"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_narrow_floats(values, error):
    kept = torch.randn(1000) * 10
    stored, scales = prune.narrow(kept, values)
    assert (stored.itemsize, scales.numel()) == (2, 0)
    assert bool(((prune.widen(stored, scales, kept.dtype) - kept).abs() <= error * kept.abs()).all())


def test_narrow_int8_has_a_scale_for_every_128():
    kept = torch.cat([torch.randn(128), 1000 * torch.randn(128), torch.zeros(10)])
    stored, scales = prune.narrow(kept, "int8")
    assert (stored.dtype, stored.shape, scales.shape) == (torch.int8, (266,), (3,))
    back = prune.widen(stored, scales, kept.dtype)
    for group, again in zip(kept.split(128), back.split(128), strict=True):
        assert bool(((again - group).abs() <= group.abs().max() / 127 / 2 * 1.001).all())


def test_narrow_does_not_overflow_and_never_widens():
    assert prune.narrow(torch.tensor([1e9, -1e9]), "fp16")[0].tolist() == [65504.0, -65504.0]
    half = torch.ones(3, dtype=torch.bfloat16)
    assert prune.narrow(half, "fp16")[0].dtype == torch.bfloat16
    assert prune.narrow(half, "same")[0].dtype == torch.bfloat16
