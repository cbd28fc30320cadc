"""Packing of saved activations: a bit for every entry, and the kept values one after the other.

:func:`pack` keeps exactly the entries that ``methods/prune.py`` keeps. A sort of every sample would cost
more than the matmuls: 10 ns an entry. Instead a *guess* at the k-th largest magnitude, from one entry in
some dozens, leaves a few more candidates than k. To find where they are takes longest (2 ns an entry; packing
costs 7 ns and unpacking 1.5 ns, on one core of an AMD EPYC, float32, keep 0.1); all the rest is done with
them alone.

The guess leaves a number of candidates that the host has to know. So on a GPU what has no kernel in
``triton/pack.py`` is sorted: nothing waits, whichever it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# A guess is made from about so many entries: the share of candidates is then off by less than 7 % (one
# standard deviation at keep 0.1), and the margin below is four of them.
_PROBES = 2048
_MARGIN = 4.0

# So many entries are done at once: all that is made of them on the way stays in cache.
_CHUNK = 2**20

_WEIGHTS = 0x0102040810204080  # moves the lowest bit of byte i of a 64-bit number to bit i of its top byte


def pack(
    x: Tensor, samples: int, k: int, means: Tensor | None = None, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keep the k entries of largest magnitude of every sample; of equal ones the first.

    Args:
        x: floating, of any shape, its entries sample by sample.
        samples: B.
        means: [G, I], taken off the rows of x first, where G is a multiple of B; or None.
        rows: bool [G, R], of which rows; None is all.

    Returns:
        mask, uint8 [B, ceil(n / 8)], entry i of a sample in bit i % 8 of byte i // 8; and the kept values,
        [B · k], in order.
    """
    flat = x.reshape(samples, -1).contiguous()
    if flat.is_cuda:
        return pack_by_sorting(centered(flat, means, rows), k)
    masks, values = [], []
    at_once = max(1, _CHUNK // flat.shape[1])
    for start in range(0, samples, at_once):
        some = flat[start : start + at_once]
        if means is not None:
            each = len(means) // samples
            of_some = slice(start * each, (start + at_once) * each)
            some = centered(some, means[of_some], None if rows is None else rows[of_some])
        mask, chosen = _pack(some, k)
        masks.append(mask)
        values.append(chosen)
    return torch.cat(masks), torch.cat(values)


def centered(x: Tensor, means: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """x, without ``means`` [G, I] if there are any: the first is that of the first rows of I entries. Where
    ``rows`` [G, R] is False it is left as it is."""
    if means is None:
        return x
    grouped = x.reshape(len(means), -1, means.shape[1])
    if rows is None:
        return (grouped - means.unsqueeze(1)).view(x.shape)
    return torch.addcmul(grouped, means.unsqueeze(1), rows.unsqueeze(-1).to(x.dtype), value=-1).view(x.shape)


def _pack(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`pack`, of some samples [B, n]."""
    size = _magnitude(x)
    guess = _guess(size, k)
    if guess is None:
        return _pack_exactly(x, size, k)
    candidate = size > guess
    at = candidate.view(-1).nonzero().view(-1)
    counts = torch.searchsorted(at, torch.arange(len(x) + 1) * x.shape[1]).diff()
    if int(counts.min()) < k:
        return _pack_exactly(x, size, k)
    sizes = size.view(-1).index_select(0, at)
    each = pad_sequence(list(sizes.split(counts.tolist())), batch_first=True, padding_value=-1.0)
    least = each.kthvalue(each.shape[1] - k + 1, dim=1).values
    keep = sizes >= least.repeat_interleave(counts)
    values = x.view(-1).index_select(0, at).masked_select(keep)
    if len(values) != len(x) * k:  # others are equal to a k-th
        return _pack_exactly(x, size, k)
    return pack_bits(candidate.view(-1).scatter_(0, at, keep).view_as(x)), values


def _pack_exactly(x: Tensor, size: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`_pack`, without a guess and whichever entries are equal."""
    least = size.topk(k, dim=1).values[:, -1:]
    larger, equal = size > least, size == least
    room = k - larger.sum(1, keepdim=True)
    kept = larger | (equal & (equal.cumsum(1) <= room))
    return pack_bits(kept), x.masked_select(kept)


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


def _guess(size: Tensor, k: int) -> Tensor | None:
    """What k and a few more entries of every row of ``size`` [B, n] are above, in all likelihood: [B, 1].

    None where too few are left out to make it worth while.
    """
    n = size.shape[1]
    stride = n // _PROBES
    while stride > 1 and math.gcd(stride, n) > 1:
        stride += 1  # else only some of the features are looked at
    probes = size[:, :: max(1, stride)]
    share = k / n + _MARGIN * math.sqrt(k / n * (1 - k / n) / probes.shape[1])
    rank = math.ceil(share * probes.shape[1])
    if stride <= 1 or rank >= probes.shape[1]:
        return None
    return probes.kthvalue(probes.shape[1] - rank, keepdim=True).values
