"""The custom ops that carry pruned activations from the forward to the backward; see ``passes/saved.py``.

``pack(x, samples, groups, keep, values) -> (mask, kept, scales, means, rows)``
    x [..., I], B samples one after the other with n entries each; k = round(keep · n) of them are kept. If
    there are ``groups`` of rows, G, their means are taken off first: means [G, I], rows bool [G, R] of which
    (``prune.rows_with_mean``); else both are empty. mask uint8
    [B, ceil(n / 8)]; kept [B · k] in the form that ``values`` names; scales float32, empty unless that is
    int8.

``unpack(mask, kept, scales, means, rows, size, dtype) -> x̂``
    the pruned activation, contiguous, with the mean, or zero, where nothing was kept.

``pack_bits(x) -> mask``, ``unpack_bits(mask, size) -> x``
    the same for bool tensors, of which every entry is kept.

``needed(saved)``
    nothing. Whatever the forward computes for the backward alone has to be an operand of something with a
    side effect: else a partitioner takes it for free to recompute in the backward, from the whole activation.

The others are pure functions: what they do is decided when a graph is compiled, because the sizes of what
they return are part of the graph. On a GPU they are launches alone, and the host reads nothing of what they
find: CUDA graphs may hold them.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from sparse_compile.kernels import on_device, triton
from sparse_compile.kernels import pack as by_aten
from sparse_compile.methods import prune

_library = torch.library.Library("sparse_compile", "FRAGMENT")
_TAGS = (torch.Tag.needs_fixed_stride_order,)
_library.define(
    "pack(Tensor x, SymInt samples, SymInt groups, float keep, str values)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "unpack(Tensor mask, Tensor kept, Tensor scales, Tensor means, Tensor rows, SymInt[] size,"
    " ScalarType dtype) -> Tensor",
    tags=_TAGS,
)
_library.define("needed(Tensor[] saved) -> ()")
_library.define("pack_bits(Tensor x) -> Tensor", tags=_TAGS)
_library.define("unpack_bits(Tensor mask, SymInt[] size) -> Tensor", tags=_TAGS)

# For the same reason, these count as having one themselves.
torch.fx.node.has_side_effect(torch.ops.sparse_compile.needed.default)
torch.fx.node.has_side_effect(torch.ops.sparse_compile.pack.default)
torch.fx.node.has_side_effect(torch.ops.sparse_compile.pack_bits.default)


def _kernels(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """What packs and unpacks tensors like this: Triton where it can, or ATen. Both give the same bits."""
    if dtype in (*triton.DTYPES, torch.bool) and on_device.available(device):
        from sparse_compile.kernels.triton import pack as by_triton

        return by_triton
    return by_aten


@torch.library.impl(_library, "pack", "CompositeExplicitAutograd")
def _pack(
    x: Tensor, samples: int, groups: int, keep: float, values: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    means = x.reshape(groups, -1, x.shape[-1]).mean(1) if groups else None
    rows = None if means is None else prune.rows_with_mean(x, means)
    k = prune.count(keep, x.numel() // samples)
    mask, kept = _kernels(x.device, x.dtype).pack(x, samples, k, means, rows)
    stored = prune.narrow(kept, values)
    if means is None or rows is None:
        return mask, *stored, x.new_empty(0), x.new_empty(0, dtype=torch.bool)
    return mask, *stored, means, rows


@torch.library.impl(_library, "unpack", "CompositeExplicitAutograd")
def _unpack(
    mask: Tensor,
    kept: Tensor,
    scales: Tensor,
    means: Tensor,
    rows: Tensor,
    size: list[int],
    dtype: torch.dtype,
) -> Tensor:
    values = prune.widen(kept, scales, dtype)
    x = _kernels(mask.device, dtype).unpack(mask, values, math.prod(size) // len(mask))
    if len(means):
        x.view(*rows.shape, -1).addcmul_(means.unsqueeze(1), rows.unsqueeze(-1).to(dtype))
    return x.view(size)


@torch.library.impl(_library, "pack_bits", "CompositeExplicitAutograd")
def _pack_bits(x: Tensor) -> Tensor:
    return _kernels(x.device, x.dtype).pack_bits(x.reshape(1, -1))


@torch.library.impl(_library, "unpack_bits", "CompositeExplicitAutograd")
def _unpack_bits(mask: Tensor, size: list[int]) -> Tensor:
    return _kernels(mask.device, torch.bool).unpack_bits(mask, math.prod(size)).reshape(size)


@torch.library.impl(_library, "needed", "CompositeExplicitAutograd")
def _needed(saved: list[Tensor]) -> None:
    pass


@torch.library.register_fake("sparse_compile::pack")
def _pack_fake(
    x: Tensor, samples: int, groups: int, keep: float, values: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    entries = x.numel() // samples
    mask = x.new_empty(samples, (entries + 7) // 8, dtype=torch.uint8)
    kept = x.new_empty(samples * prune.count(keep, entries), dtype=prune.stored_dtype(x.dtype, values))
    scales = (len(kept) + prune.GROUP - 1) // prune.GROUP if values == "int8" else 0
    means = x.new_empty((groups, x.shape[-1]) if groups else 0)
    rows = x.new_empty((groups, x.numel() // (groups * x.shape[-1])) if groups else 0, dtype=torch.bool)
    return mask, kept, x.new_empty(scales, dtype=torch.float32), means, rows


@torch.library.register_fake("sparse_compile::unpack")
def _unpack_fake(
    mask: Tensor,
    kept: Tensor,
    scales: Tensor,
    means: Tensor,
    rows: Tensor,
    size: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return kept.new_empty(size, dtype=dtype)


@torch.library.register_fake("sparse_compile::pack_bits")
def _pack_bits_fake(x: Tensor) -> Tensor:
    return x.new_empty(1, (x.numel() + 7) // 8, dtype=torch.uint8)


@torch.library.register_fake("sparse_compile::unpack_bits")
def _unpack_bits_fake(mask: Tensor, size: list[int]) -> Tensor:
    return mask.new_empty(size, dtype=torch.bool)
