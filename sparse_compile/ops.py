"""The custom ops that the passes put into graphs. They hold no state: the token says whose step it is.

``begin(anchor, manifest) -> token``
    runs in the forward. It tells the runtime of the backend whose compiled callable is running that a
    forward of this graph begins, and returns int64 [3] on CPU: runtime, graph, lane. Saved for backward,
    it finds the way back from any later backward, whichever model, copy or backend that belongs to.
    ``anchor`` is any input of the graph; it is not read and only keeps compilers from folding a constant.

``linear_backward(token, dy, x, w, site, tokens, dw_transposed) -> (rows, index, dw)``
    dY [N, O], X [N, I] or None (then dw is empty), W [O, I] or None (then rows and index are empty); see
    ``passes/linear.py``. ``site`` is a position in the graph's manifest, ``tokens`` the rows of a sample.
    dX is ``rows[index]``: rows [N + 1, I] holds its distinct rows, index int64 [N] says which of them stands
    where. That last gather is left to the graph, so that a compiler fuses it with what reads dX, and most
    of dX need never be written. Rows that the index does not name hold anything.

Ratios, bases and counters are looked up when an op runs, so nothing that changes from step to step is in
the graph, and both ops are opaque to Inductor. They are not pure: a backend that is not running (an
exported graph, say) gets the token (-1, -1, -1), with which a linear is done by exact skipping alone.

Nor may a CUDA graph hold them: a replay would not ask the runtime again. They are tagged so, and Inductor
(``mode="reduce-overhead"``) captures what lies between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile import runtime
from sparse_compile.linear_site import LinearSite

_library = torch.library.Library("sparse_compile", "DEF")
_library.define(
    "begin(Tensor anchor, str manifest) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
_library.define(
    "linear_backward(Tensor token, Tensor dy, Tensor? x, Tensor? w, int site, SymInt tokens,"
    " bool dw_transposed) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.cudagraph_unsafe),
)

# Keeps partitioners from moving it to the backward, which is the only user of its result.
torch.fx.node.has_side_effect(torch.ops.sparse_compile.begin.default)


@torch.library.impl(_library, "begin", "CompositeExplicitAutograd")
def _begin(anchor: Tensor, manifest: str) -> Tensor:
    return torch.tensor(runtime.begin(manifest), dtype=torch.int64)


@torch.library.impl(_library, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(
    token: Tensor, dy: Tensor, x: Tensor | None, w: Tensor | None, site: int, tokens: int, dw_transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    layer, use, phase = runtime.find(token.tolist(), site) or (LinearSite(""), (0, 0), None)
    assert isinstance(layer, LinearSite)
    dx, dw = layer.linear_backward(
        *(dy, x, w),
        tokens=tokens,
        dw_transposed=dw_transposed,
        method=None if phase is None else phase.linear,
        use=use,
    )
    rows, index = dx or (dy.new_empty(0), dy.new_empty(0, dtype=torch.int64))
    return rows, index, dy.new_empty(0) if dw is None else dw


@torch.library.register_fake("sparse_compile::begin")
def _begin_fake(anchor: Tensor, manifest: str) -> Tensor:
    return torch.empty(3, dtype=torch.int64, device="cpu")


@torch.library.register_fake("sparse_compile::linear_backward")
def _linear_backward_fake(
    token: Tensor, dy: Tensor, x: Tensor | None, w: Tensor | None, site: int, tokens: int, dw_transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = dy.new_empty(0) if w is None else dy.new_empty(dy.shape[0] + 1, w.shape[1])
    index = dy.new_empty(0 if w is None else dy.shape[0], dtype=torch.int64)
    if x is None:
        return rows, index, dy.new_empty(0)
    shape = (x.shape[1], dy.shape[1]) if dw_transposed else (dy.shape[1], x.shape[1])
    return rows, index, dy.new_empty(shape)
