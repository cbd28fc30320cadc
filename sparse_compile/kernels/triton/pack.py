"""Packing of saved activations: a bit for every entry, and the kept values one after the other.

The same bits as ``kernels/pack.py`` makes, with nothing that waits for the GPU:

    pack     threshold (select.py)  ►  kept entries of every block  ►  their running sum, where a block's
             values begin  ►  mask and values
    unpack   ones in every block of the mask  ►  their running sum  ►  values to their places, zeros between

A sample is dealt out in blocks of entries, and no block reaches into another sample. Numbers are moved as
bits and compared as keys, so that what is not a number, and the sign of a zero, come back as they were.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.pack import centered
from sparse_compile.kernels.triton import cdiv, launch
from sparse_compile.kernels.triton.select import FORMATS, key_of, kth_largest

_BLOCK = 2048  # entries; a multiple of 8, and less than 2¹⁶

# One build serves all of these: only the alignment of n makes another kernel.
_jit = triton.jit(do_not_specialize=["blocks", "k"])


@triton.jit
def _my_block(blocks, BLOCK: tl.constexpr):
    """Of which sample this program has a block, and the block's first entry in it; both int64."""
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), (program % blocks).to(tl.int64) * BLOCK


@triton.jit
def _compare(
    x, threshold, sample, first, n, UNSIGNED: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr
):
    """A block's entries, as bits, and which of them are larger than the threshold, or equal to it."""
    at = tl.arange(0, BLOCK)
    there = at < n - first
    bits = tl.load(x + sample * n + first + at, mask=there, other=0)
    key = key_of(bits, UNSIGNED, INFINITY)
    least = tl.load(threshold + sample)
    return bits, there & (key > least), there & (key == least)


@triton.jit
def _store_bits(mask, flags, sample, first, n, BLOCK: tl.constexpr):
    """A block's flags, eight to a byte."""
    eights = tl.reshape(flags.to(tl.int32), (BLOCK // 8, 8))
    byte = tl.sum(eights << tl.arange(0, 8)[None, :], axis=1)
    at = first // 8 + tl.arange(0, BLOCK // 8)
    width = tl.cdiv(n, 8)
    tl.store(mask + sample * width + at, byte.to(tl.uint8), mask=at < width)


@triton.jit
def _load_bits(mask, sample, first, n, BLOCK: tl.constexpr):
    """A block's flags, as int32. Eight neighbours read the same byte, from the cache."""
    at = tl.arange(0, BLOCK)
    byte = tl.load(mask + sample * tl.cdiv(n, 8) + first // 8 + at // 8, mask=at < n - first, other=0)
    return (byte.to(tl.int32) >> (at % 8)) & 1


@_jit
def _count_kept(
    x,
    threshold,
    counts,
    n,
    blocks,
    UNSIGNED: tl.constexpr,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # counts [2, B, blocks]: of larger entries, and of equal ones.
    sample, first = _my_block(blocks, BLOCK)
    _, is_larger, is_equal = _compare(x, threshold, sample, first, n, UNSIGNED, INFINITY, BLOCK)
    to = counts + tl.program_id(0)
    tl.store(to, tl.sum(is_larger.to(tl.int32), axis=0))
    tl.store(to + tl.num_programs(0), tl.sum(is_equal.to(tl.int32), axis=0))


@_jit
def _pack(
    x,
    threshold,
    room,
    before,
    mask,
    values,
    n,
    blocks,
    k,
    UNSIGNED: tl.constexpr,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, first = _my_block(blocks, BLOCK)
    bits, is_larger, is_equal = _compare(x, threshold, sample, first, n, UNSIGNED, INFINITY, BLOCK)
    larger_before = tl.load(before + tl.program_id(0))
    equal_before = tl.load(before + tl.num_programs(0) + tl.program_id(0))
    # Of equal entries the first are kept: so many as there is room for, less those of the blocks before.
    most = tl.load(room + sample)
    taken = tl.minimum(equal_before, most)
    left = tl.minimum(most - taken, BLOCK).to(tl.int32)
    # Both are counted by one running sum, in the lower and the upper half of a number.
    both = is_larger.to(tl.int32) + (is_equal.to(tl.int32) << 16)
    running = tl.cumsum(both, axis=0) - both
    larger, equal = running & 0xFFFF, running >> 16
    kept = is_larger | (is_equal & (equal < left))
    to = values + sample * k + larger_before + taken
    tl.store(to + larger + tl.minimum(equal, left), bits, mask=kept)
    _store_bits(mask, kept, sample, first, n, BLOCK)


@_jit
def _count_ones(mask, ones, n, blocks, BLOCK: tl.constexpr):
    sample, first = _my_block(blocks, BLOCK)
    tl.store(ones + tl.program_id(0), tl.sum(_load_bits(mask, sample, first, n, BLOCK), axis=0))


@_jit
def _unpack(mask, values, before, x, n, blocks, k, BLOCK: tl.constexpr):
    sample, first = _my_block(blocks, BLOCK)
    at = tl.arange(0, BLOCK)
    flags = _load_bits(mask, sample, first, n, BLOCK)
    place = tl.cumsum(flags, axis=0) - flags
    value = tl.load(
        values + sample * k + tl.load(before + tl.program_id(0)) + place, mask=flags != 0, other=0
    )
    tl.store(x + sample * n + first + at, value, mask=at < n - first)


@_jit
def _pack_bits(bits, mask, n, blocks, BLOCK: tl.constexpr):
    sample, first = _my_block(blocks, BLOCK)
    at = tl.arange(0, BLOCK)
    flags = tl.load(bits + sample * n + first + at, mask=at < n - first, other=0)
    _store_bits(mask, flags != 0, sample, first, n, BLOCK)


@_jit
def _unpack_bits(mask, bits, n, blocks, BLOCK: tl.constexpr):
    sample, first = _my_block(blocks, BLOCK)
    at = tl.arange(0, BLOCK)
    flags = _load_bits(mask, sample, first, n, BLOCK)
    tl.store(bits + sample * n + first + at, flags.to(tl.int8), mask=at < n - first)


def pack(
    x: Tensor, samples: int, k: int, means: Tensor | None = None, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`kernels.pack.pack`, for dtypes in ``FORMATS``."""
    flat = centered(x, means, rows).reshape(samples, -1).contiguous()
    n = flat.shape[1]
    threshold, room = kth_largest(flat, k)
    form = FORMATS[x.dtype]
    bits = flat.view(form.bits)
    blocks = cdiv(n, _BLOCK)
    grid = (samples * blocks,)
    counts = torch.empty(2, samples, blocks, dtype=torch.int32, device=x.device)
    launch(_count_kept, grid, bits, threshold, counts, n, blocks, **form.constants, BLOCK=_BLOCK)
    mask = torch.empty(samples, cdiv(n, 8), dtype=torch.uint8, device=x.device)
    values = torch.empty(samples * k, dtype=x.dtype, device=x.device)
    launch(
        _pack,
        grid,
        *(bits, threshold, room, _before(counts), mask, values.view(form.bits), n, blocks, k),
        **form.constants,
        BLOCK=_BLOCK,
    )
    return mask, values


def unpack(mask: Tensor, values: Tensor, entries: int) -> Tensor:
    """As :func:`kernels.pack.unpack`, for dtypes in ``FORMATS``; both tensors contiguous."""
    samples = len(mask)
    blocks = cdiv(entries, _BLOCK)
    grid = (samples * blocks,)
    ones = torch.empty(samples, blocks, dtype=torch.int32, device=mask.device)
    launch(_count_ones, grid, mask, ones, entries, blocks, BLOCK=_BLOCK)
    x = torch.empty(samples, entries, dtype=values.dtype, device=mask.device)
    bits = FORMATS[values.dtype].bits
    k = len(values) // samples
    launch(
        _unpack, grid, mask, values.view(bits), _before(ones), x.view(bits), entries, blocks, k, BLOCK=_BLOCK
    )
    return x


def pack_bits(bits: Tensor) -> Tensor:
    """As :func:`kernels.pack.pack_bits`."""
    samples, n = bits.shape
    blocks = cdiv(n, _BLOCK)
    mask = torch.empty(samples, cdiv(n, 8), dtype=torch.uint8, device=bits.device)
    launch(_pack_bits, (samples * blocks,), bits.contiguous().view(torch.int8), mask, n, blocks, BLOCK=_BLOCK)
    return mask


def unpack_bits(mask: Tensor, entries: int) -> Tensor:
    """As :func:`kernels.pack.unpack_bits`; ``mask`` contiguous."""
    samples = len(mask)
    blocks = cdiv(entries, _BLOCK)
    bits = torch.empty(samples, entries, dtype=torch.bool, device=mask.device)
    launch(_unpack_bits, (samples * blocks,), mask, bits.view(torch.int8), entries, blocks, BLOCK=_BLOCK)
    return bits


def _before(counts: Tensor) -> Tensor:
    """How many the blocks before have; int64."""
    return counts.cumsum(-1) - counts
