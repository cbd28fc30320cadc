"""What Inductor makes of the ops of ours that are not opaque to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import ops

_library = torch.library.Library("sparse_compile", "FRAGMENT")
_library.define(
    "random_rows(Tensor seed, Tensor[] index, SymInt[] size) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)


@torch.library.register_fake("sparse_compile::random_rows")
def _random_rows_fake(seed: Tensor, index: Sequence[Tensor], size: Sequence[Any]) -> Tensor:
    return seed.new_empty(index[0].shape[0], *size[len(index) :], dtype=torch.float32)


@register_lowering(torch.ops.sparse_compile.random_rows.default, type_promotion_kind=None)  # type: ignore
def _random_rows(seed: Any, index: Sequence[Any], size: Sequence[Any]) -> Any:
    """The numbers that ``inductor_random(size, seed, "rand")`` has at ``index``.

    Args:
        seed: int64 [].
        index: int64 [n] each, of the leading dimensions of ``size``.
    """
    load_seed, loaders = seed.make_loader(), [each.make_loader() for each in index]
    rest = size[len(index) :]

    def number(position: Sequence[Any]) -> Any:
        row: Any = ops.constant(0, torch.int32)
        for load, length in zip(loaders, size, strict=False):
            step = ops.mul(row, ops.index_expr(length, torch.int32))
            row = ops.add(step, ops.to_dtype(load([position[0]]), torch.int32))
        within: Any = 0
        for i, length in zip(position[1:], rest, strict=True):
            within = within * length + i
        start = ops.mul(row, ops.index_expr(math.prod(rest), torch.int32))
        return ops.rand(load_seed([]), ops.add(start, ops.index_expr(within, torch.int32)))

    numbers = ir.Pointwise.create(
        device=seed.get_device(),
        dtype=torch.float32,
        inner_fn=number,
        ranges=[index[0].get_size()[0], *rest],
    )
    numbers.realize()
    return numbers
