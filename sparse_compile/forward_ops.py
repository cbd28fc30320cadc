"""The custom ops that leave rows out of a forward which nothing needs; see ``passes/forward.py`` and
``passes/compact.py``, which put them into graphs. As in ``ops.py``, they hold no state.

``needed_rows(needed) -> rows``, ``row_slots(rows, total) -> slots``
    needed bool [N]; rows int64 [n], ascending, those that are needed (and up to two more, since n is at least
    2); slots int64 [N], of each row its place among them, or -1.

``backward_rows(token, rows, total, sites) -> rows``
    a copy of ``rows``, where a backward of these begins: counts them, of ``total``, for linears whose
    products over them are the graph's own (``passes/own_products.py``).

``linear_forward(token, x, w, bias, needed, site) -> y``
    the forward of a linear, Y [N, O], of which only some rows are needed. X [N, I], W [O, I], bias [O] or
    None, needed bool [N]. In the place of the others Y holds one that is needed; see ``passes/forward.py``.

``needed_slots(token, needed, site) -> (kept, count, slot, copies, skip)``,
``linear_forward_rows(token, x, w, bias, kept, count, slot, copies, skip, site, whole) -> (rows, index)``
    the same on a GPU, where Y is ``rows[index]``, and what is needed is made ready once for all linears that
    share a mask; see ``device_forward.py``. With ``whole`` rows is Y itself, and the index is empty. Their
    ``linear_backward`` gets [kept, count, slot, skip], too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size

from sparse_compile import runtime
from sparse_compile.device_forward import DeviceForward, Needed
from sparse_compile.linear_site import LinearSite

_FEWEST = 2  # rows of `needed_rows`: sizes 0 and 1 are special to compilers

_library = torch.library.Library("sparse_compile", "FRAGMENT")
_library.define(
    "linear_forward(Tensor token, Tensor x, Tensor w, Tensor? bias, Tensor needed, int site) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.cudagraph_unsafe),
)
_library.define(
    "needed_slots(Tensor token, Tensor needed, int site) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),
)
_library.define(
    "linear_forward_rows(Tensor token, Tensor x, Tensor w, Tensor? bias, Tensor kept, Tensor count,"
    " Tensor slot, Tensor copies, Tensor skip, int site, bool whole=False) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.cudagraph_unsafe),
)
_library.define("needed_rows(Tensor needed) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,))
_library.define("row_slots(Tensor rows, SymInt total) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,))
_library.define(
    "backward_rows(Tensor token, Tensor rows, SymInt total, int[] sites) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)


@torch.library.impl(_library, "linear_forward", "CompositeExplicitAutograd")
def _linear_forward(
    token: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, needed: Tensor, site: int
) -> Tensor:
    numbers = token.tolist()
    layer, use = runtime.site(numbers, site) or (LinearSite("?"), (0, 0))
    assert isinstance(layer, LinearSite)
    return layer.linear_forward(x, w, bias, needed, use=use, forward=numbers[3])


@torch.library.impl(_library, "needed_slots", "CompositeExplicitAutograd")
def _needed_slots(token: Tensor, needed: Tensor, site: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layer, use = runtime.site(token.tolist(), site) or (LinearSite("?"), (0, 0))
    assert isinstance(layer, LinearSite)
    return layer.on_device.slots(needed, use[0])


@torch.library.impl(_library, "linear_forward_rows", "CompositeExplicitAutograd")
def _linear_forward_rows(
    token: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    count: Tensor,
    slot: Tensor,
    copies: Tensor,
    skip: Tensor,
    site: int,
    whole: bool = False,
) -> tuple[Tensor, Tensor]:
    layer, _ = runtime.site(token.tolist(), site) or (LinearSite("?"), None)
    assert isinstance(layer, LinearSite)
    needed = None if layer.left_alone else Needed.given(kept, count, slot, skip)
    return layer.on_device.linear(x, w, bias, needed, copies, whole=whole)


@torch.library.register_fake("sparse_compile::linear_forward")
def _linear_forward_fake(
    token: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, needed: Tensor, site: int
) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


@torch.library.register_fake("sparse_compile::needed_slots")
def _needed_slots_fake(
    token: Tensor, needed: Tensor, site: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *DeviceForward.no_slots(needed), torch.empty(1, dtype=torch.int64, device="cpu")


@torch.library.register_fake("sparse_compile::linear_forward_rows")
def _linear_forward_rows_fake(
    token: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    count: Tensor,
    slot: Tensor,
    copies: Tensor,
    skip: Tensor,
    site: int,
    whole: bool = False,
) -> tuple[Tensor, Tensor]:
    n = x.shape[0]
    return x.new_empty(n, w.shape[0]), x.new_empty(0 if whole else n, dtype=torch.int64)


@torch.library.impl(_library, "needed_rows", "CompositeExplicitAutograd")
def _needed_rows(needed: Tensor) -> Tensor:
    rows = needed.nonzero().squeeze(1)
    if len(rows) >= _FEWEST:
        return rows
    others = (~needed).nonzero().squeeze(1)
    return torch.cat([rows, others[: _FEWEST - len(rows)]]).sort().values


@torch.library.register_fake("sparse_compile::needed_rows")
def _needed_rows_fake(needed: Tensor) -> Tensor:
    # Not `new_dynamic_size`: it asks for `capture_dynamic_output_shape_ops`, a setting for the user's own.
    most = needed.shape[0] if isinstance(needed.shape[0], int) else None
    count = allocate_size(torch.library.get_ctx()._shape_env, _FEWEST, most)
    return needed.new_empty(count, dtype=torch.int64)


@torch.library.impl(_library, "row_slots", "CompositeExplicitAutograd")
def _row_slots(rows: Tensor, total: int) -> Tensor:
    slots = rows.new_full((total,), -1)
    slots[rows] = torch.arange(len(rows), device=rows.device)
    return slots


@torch.library.register_fake("sparse_compile::row_slots")
def _row_slots_fake(rows: Tensor, total: int) -> Tensor:
    return rows.new_empty(total)


@torch.library.impl(_library, "backward_rows", "CompositeExplicitAutograd")
def _backward_rows(token: Tensor, rows: Tensor, total: int, sites: list[int]) -> Tensor:
    runtime.carried(token.tolist(), sites, len(rows), total)
    return rows.clone()


@torch.library.register_fake("sparse_compile::backward_rows")
def _backward_rows_fake(token: Tensor, rows: Tensor, total: int, sites: list[int]) -> Tensor:
    return torch.empty_like(rows)
