"""Packing of saved activations: a bit for every entry, and the kept values one after the other.

:func:`pack` keeps exactly the entries that ``methods/prune.py`` keeps. A sort of every sample would cost
more than the matmuls: 10 ns an entry. Instead a *guess* at the k-th largest magnitude, from one entry in
some dozens, leaves a few more candidates than k, and among those the k-th is found exactly (1.6 ns an entry;
packing costs 9 ns and unpacking 1.5 ns, on one core of an AMD EPYC, float32, keep 0.1).

The guess leaves a number of candidates that the host has to know. So on a GPU what has no kernel in
``triton/pack.py`` is sorted: nothing waits, whichever it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A guess is made from about so many entries: the share of candidates is then off by less than 7 % (one
# standard deviation at keep 0.1), and the margin below is four of them.
_PROBES = 2048
_MARGIN = 4.0

# So many entries are done at once: all that is made of them on the way stays in cache.
_CHUNK = 2**20

_WEIGHTS = 0x0102040810204080  # moves the lowest bit of byte i of a 64-bit number to bit i of its top byte


def pack(x: Tensor, samples: int, k: int) -> tuple[Tensor, Tensor]:
    """Keep the k entries of largest magnitude of every sample; of equal ones the first.

    Args:
        x: floating, of any shape, its entries sample by sample.
        samples: B.

    Returns:
        mask, uint8 [B, ceil(n / 8)], entry i of a sample in bit i % 8 of byte i // 8; and the kept values,
        [B · k], in order.
    """
    flat = x.reshape(samples, -1)
    if flat.is_cuda:
        return pack_by_sorting(flat, k)
    masks, values = [], []
    for some in flat.split(max(1, _CHUNK // flat.shape[1])):
        size = _magnitude(some)
        kept = size >= _kth_largest(size, k)
        chosen = some.masked_select(kept)
        if len(chosen) != len(some) * k:  # others are equal to a k-th
            kept = _first_of_equals(size, k)
            chosen = some.masked_select(kept)
        masks.append(pack_bits(kept))
        values.append(chosen)
    return torch.cat(masks), torch.cat(values)


def pack_by_sorting(flat: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As :func:`pack`, of samples [B, n]. Nothing is read by the host."""
    order = _magnitude(flat).sort(dim=1, descending=True, stable=True).indices
    kept = order[:, :k].sort(dim=1).values
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device).scatter_(1, kept, True)
    return pack_bits(mask), flat.gather(1, kept).flatten()


def unpack(mask: Tensor, values: Tensor, entries: int) -> Tensor:
    """The inverse: [B, entries] with zeros where nothing was kept, in the dtype of ``values``."""
    kept = unpack_bits(mask, entries)
    return values.new_zeros(kept.shape).masked_scatter_(kept, values)


def pack_bits(bits: Tensor) -> Tensor:
    """bool [B, n] as uint8 [B, ceil(n / 8)]; see :func:`pack`."""
    if bits.shape[1] % 8:
        bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8))
    eights = bits.contiguous().view(torch.int64)
    return ((eights * _WEIGHTS) >> 56).to(torch.uint8)


def unpack_bits(mask: Tensor, entries: int) -> Tensor:
    """The inverse of :func:`pack_bits`: bool [B, entries]."""
    eights = _eight_bools(mask.device).index_select(0, mask.reshape(-1).int())
    return eights.view(torch.bool).view(len(mask), -1)[:, :entries]


def _eight_bools(device: torch.device) -> Tensor:
    """int64 [256]: the eight bytes, each 0 or 1, that a byte of a mask stands for."""
    byte = torch.arange(256, device=device).unsqueeze(1)
    bits = (byte >> torch.arange(8, device=device)) & 1
    return bits.to(torch.uint8).view(torch.int64).view(-1)


def _magnitude(x: Tensor) -> Tensor:
    """|x|, where what is not a number counts as infinite: a loss that overflowed must be seen to."""
    return x.abs().nan_to_num_(nan=math.inf, posinf=math.inf)


def _kth_largest(size: Tensor, k: int) -> Tensor:
    """The k-th largest magnitude of every row of ``size`` [B, n], exactly: [B, 1]."""
    n = size.shape[1]
    stride = n // _PROBES
    while stride > 1 and math.gcd(stride, n) > 1:
        stride += 1  # else only some of the features are looked at
    probes = size[:, :: max(1, stride)]
    share = k / n + _MARGIN * math.sqrt(k / n * (1 - k / n) / probes.shape[1])
    rank = math.ceil(share * probes.shape[1])
    if stride <= 1 or rank >= probes.shape[1]:
        return size.kthvalue(n - k + 1, keepdim=True).values
    guess = probes.kthvalue(probes.shape[1] - rank, keepdim=True).values
    candidate = size > guess
    counts = candidate.sum(1).tolist()
    found = size.masked_select(candidate).split(counts)
    rows = [few if len(few) >= k else every for few, every in zip(found, size, strict=True)]
    return torch.stack([row.kthvalue(len(row) - k + 1, keepdim=True).values for row in rows])


def _first_of_equals(size: Tensor, k: int) -> Tensor:
    """bool [B, n] with k ones in each row: the k largest of ``size``, and of equal ones the first."""
    least = size.topk(k, dim=1).values[:, -1:]
    larger, equal = size > least, size == least
    room = k - larger.sum(1, keepdim=True)
    return larger | (equal & (equal.cumsum(1) <= room))
