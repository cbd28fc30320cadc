"""The custom ops that the passes put into graphs. They hold no state: the token says whose step it is.

``begin(anchor, manifest) -> token``
    runs in the forward. It tells the runtime of the backend whose compiled callable is running that a
    forward of this graph begins, and returns int64 [3] on CPU: runtime, graph, lane. Saved for backward,
    it finds the way back from any later backward, whichever model, copy or backend that belongs to.
    ``anchor`` is any input of the graph; it is not read and only keeps compilers from folding a constant.

``linear_backward(token, dy, x, w, site, tokens, dw_transposed, handed_over, dx_whole) -> (rows, index, dw)``
    dY [N, O], X [N, I] or None (then dw is empty), W [O, I] or None (then rows and index are empty); see
    ``passes/linear.py``. ``site`` is a position in the graph's manifest, ``tokens`` the rows of a sample;
    or −B, if the rows of B samples alternate.
    dX is ``rows[index]``: rows [N, I] holds its distinct rows, index int64 [N] says which of them stands
    where. That last gather is left to the graph, so that a compiler fuses it with what reads dX, and most
    of dX need never be written. Rows that the index does not name hold anything. With ``dx_whole`` rows is dX
    itself, and the index is empty. With ``handed_over`` dW goes to the site, and what is returned for it is
    empty.

    Where the graph carries few rows (``passes/compact.py``), ``rows`` int64 [n] says which of ``total`` they
    are, dY and X are [n, O] and [n, I], and so is dX; all other rows of dY are zero.

``forward_ops.py`` has those that leave rows out of a forward.

``fused_attention_backward(token, site, do, q, k, v, out, lse, causal, mask, scale) -> (dq, dk, dv)``
    the gradients of ``_scaled_dot_product_flash_attention_for_cpu``, with its results O and log-sum-exp. dO,
    Q, O [B, H, T, D], K, V [B, H, U, D], log-sum-exp [B, H, T]; see ``passes/attention.py``.

``cuda_attention_backward(token, site, form, do, q, k, v, out, lse, causal, mask, scale, …) -> (dq, dk, dv)``
    the same of the fused ops of CUDA, without dropout; ``form`` is "flash", "efficient" or "cudnn". What
    follows are those arguments of the op's own backward that only pass through. The log-sum-exp is as the op
    gives it: [B, H, T], [B, H, T, 1], or with room behind the last row.

``attention_backward(token, site, do, dropped, probabilities, v, q, kt, scale, heads) -> (dq, dkt, dv)``
    the gradients of an attention that is a chain of products; see ``passes/attention_chain.py``. dO, Q
    [N, T, D], Kᵀ [N, D, U], V [N, U, D], A' (``dropped``) [N, T, U], A (``probabilities``) the same up to its
    leading dimensions, or None where it is A'. N is samples × heads.

``boundary(h, block) -> h``
    marks, before a graph is traced, where a block of the model ends; ``boundary_gradient`` is its derivative.
    Both are the identity, and ``passes/blocks.py`` takes them out of the graph again.

``sample_weights(token, squares, site) -> weights``
    squares [B], Σ dH² of each sample of a batch; weights [B], what its gradient is to be multiplied by.

Ratios, bases and counters are looked up when an op runs, so nothing that changes from step to step is in
the graph, and both ops are opaque to Inductor. They are not pure: a backend that is not running (an
exported graph, say) gets the token (-1, -1, -1, -1), with which a linear is done by exact skipping alone.

Nor may a CUDA graph hold them: a replay would not ask the runtime again. They are tagged so, and Inductor
(``mode="reduce-overhead"``) captures what lies between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_compile import forward_ops as _forward_ops  # noqa: F401  (registers the ops of the forward)
from sparse_compile import runtime
from sparse_compile.attention_site import AttentionSite
from sparse_compile.block_site import BlockSite
from sparse_compile.device_forward import Needed
from sparse_compile.kernels import linear as kernel
from sparse_compile.kernels.attention import Forward
from sparse_compile.kernels.attention_chain import Chain
from sparse_compile.kernels.attention_cuda import CudaFused
from sparse_compile.kernels.attention_fused import Fused
from sparse_compile.kernels.attention_fused import empty as empty_heads
from sparse_compile.linear_site import LinearSite

_library = torch.library.Library("sparse_compile", "DEF")
_library.define(
    "begin(Tensor anchor, str manifest) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
_library.define(
    "linear_backward(Tensor token, Tensor dy, Tensor? x, Tensor? w, int site, SymInt tokens,"
    " bool dw_transposed, bool handed_over=False, bool dx_whole=False, Tensor? rows=None, SymInt total=0,"
    " Tensor[]? needed=None)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.cudagraph_unsafe),
)
_library.define(
    "fused_attention_backward(Tensor token, int site, Tensor do, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, bool causal, Tensor? mask, float? scale) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "cuda_attention_backward(Tensor token, int site, str form, Tensor do, Tensor q, Tensor k, Tensor v,"
    " Tensor out, Tensor lse, bool causal, Tensor? mask, float? scale, Tensor? cum_seq_q, Tensor? cum_seq_k,"
    " SymInt max_q, SymInt max_k, Tensor seed, Tensor offset) -> (Tensor, Tensor, Tensor)",
    # A mask's rows are aligned as the op wants them.
    tags=(torch.Tag.needs_exact_strides, torch.Tag.cudagraph_unsafe),
)
_library.define(
    "attention_backward(Tensor token, int site, Tensor do, Tensor dropped, Tensor? probabilities, Tensor v,"
    " Tensor q, Tensor kt, float scale, int heads) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

_library.define("boundary(Tensor h, int block) -> Tensor")
_library.define("boundary_gradient(Tensor dh, int block) -> Tensor")
_library.define(
    "sample_weights(Tensor token, Tensor squares, int site) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.cudagraph_unsafe),
)

# Keeps partitioners from moving it to the backward, which is the only user of its result.
torch.fx.node.has_side_effect(torch.ops.sparse_compile.begin.default)
# Nothing reads its results where dX is not asked for and dW is handed over.
torch.fx.node.has_side_effect(torch.ops.sparse_compile.linear_backward.default)


@torch.library.impl(_library, "begin", "CompositeExplicitAutograd")
def _begin(anchor: Tensor, manifest: str) -> Tensor:
    return torch.tensor(runtime.begin(manifest), dtype=torch.int64)


@torch.library.impl(_library, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(
    token: Tensor,
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    site: int,
    tokens: int,
    dw_transposed: bool,
    handed_over: bool = False,
    dx_whole: bool = False,
    rows: Tensor | None = None,
    total: int = 0,
    needed: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    numbers = token.tolist()
    layer, use, phase = runtime.find(numbers, site) or (LinearSite("?"), (0, 0), None)
    assert isinstance(layer, LinearSite)
    dx, dw = layer.linear_backward(
        *(dy, x, w),
        tokens=tokens,
        dw_transposed=dw_transposed,
        phase=phase,
        use=use,
        forward=numbers[3],
        handed_over=handed_over,
        rows=rows,
        total=total,
        on_gpu=None if needed is None else Needed.given(*needed),
    )
    distinct, index = (dy.new_empty(0), None) if dx is None else dx
    if dx_whole:
        distinct, index = kernel.written_out((distinct, index)), None
    if index is None:
        index = torch.arange(0 if dx_whole else len(distinct), device=dy.device)
    return distinct, index, dy.new_empty(0) if dw is None else dw


@torch.library.impl(_library, "fused_attention_backward", "CompositeExplicitAutograd")
def _fused_attention_backward(
    token: Tensor,
    site: int,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _attention(token, site, do, Fused(q, k, v, out, lse, causal, mask, scale))


@torch.library.impl(_library, "cuda_attention_backward", "CompositeExplicitAutograd")
def _cuda_attention_backward(
    token: Tensor, site: int, form: str, do: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _attention(token, site, do, CudaFused.of(form, *rest))


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _attention_backward(
    token: Tensor,
    site: int,
    do: Tensor,
    dropped: Tensor,
    probabilities: Tensor | None,
    v: Tensor,
    q: Tensor,
    kt: Tensor,
    scale: float,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    do, dropped, v, q, kt = (x.unflatten(0, (-1, heads)) for x in (do, dropped, v, q, kt))
    if probabilities is not None:
        probabilities = probabilities.reshape(dropped.shape)
    dq, dk, dv = _attention(token, site, do, Chain(dropped, probabilities, v, q, kt, scale))
    return dq.flatten(0, 1), dk.transpose(2, 3).flatten(0, 1), dv.flatten(0, 1)


def _attention(
    token: Tensor, site: int, do: Tensor, forward: Forward | CudaFused
) -> tuple[Tensor, Tensor, Tensor]:
    attention, use, phase = runtime.find(token.tolist(), site) or (AttentionSite(""), (0, 0), None)
    assert isinstance(attention, AttentionSite)
    method = None if phase is None or attention.controller.measures(phase.step) else phase.attention
    step = 0 if phase is None else phase.step
    return attention.backward(do, forward, method=method, use=use, step=step)


@torch.library.register_fake("sparse_compile::begin")
def _begin_fake(anchor: Tensor, manifest: str) -> Tensor:
    return torch.empty(4, dtype=torch.int64, device="cpu")


@torch.library.register_fake("sparse_compile::linear_backward")
def _linear_backward_fake(
    token: Tensor,
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    site: int,
    tokens: int,
    dw_transposed: bool,
    handed_over: bool = False,
    dx_whole: bool = False,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    asked = None if handed_over else x
    return kernel.empty_backward(dy, asked, w, dw_transposed=dw_transposed, dx_whole=dx_whole)


@torch.library.register_fake("sparse_compile::fused_attention_backward")
def _fused_attention_backward_fake(
    token: Tensor, site: int, do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads(q), empty_heads(k), empty_heads(v)


@torch.library.register_fake("sparse_compile::cuda_attention_backward")
def _cuda_attention_backward_fake(
    token: Tensor, site: int, form: str, do: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return CudaFused.of(form, *rest).backward(do)


@torch.library.register_fake("sparse_compile::attention_backward")
def _attention_backward_fake(
    token: Tensor,
    site: int,
    do: Tensor,
    dropped: Tensor,
    probabilities: Tensor | None,
    v: Tensor,
    q: Tensor,
    kt: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), kt.new_empty(kt.shape), v.new_empty(v.shape)


@torch.library.impl(_library, "sample_weights", "CompositeExplicitAutograd")
def _sample_weights(token: Tensor, squares: Tensor, site: int) -> Tensor:
    found = runtime.find(token.tolist(), site)
    if found is None:
        return torch.ones_like(squares)
    block, use, phase = found
    assert isinstance(block, BlockSite)
    return block.weights(squares, phase=phase, use=use)


@torch.library.register_fake("sparse_compile::sample_weights")
def _sample_weights_fake(token: Tensor, squares: Tensor, site: int) -> Tensor:
    return torch.empty_like(squares)


@torch.library.impl(_library, "boundary", "CompositeExplicitAutograd")
@torch.library.impl(_library, "boundary_gradient", "CompositeExplicitAutograd")
@torch.library.register_fake("sparse_compile::boundary")
@torch.library.register_fake("sparse_compile::boundary_gradient")
def _copy(h: Tensor, block: int) -> Tensor:
    return h.clone()


def _save_block(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.block = inputs[1]


def _boundary_backward(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
    return torch.ops.sparse_compile.boundary_gradient(dh, ctx.block), None


torch.library.register_autograd(
    "sparse_compile::boundary", _boundary_backward, setup_context=_save_block, lib=_library
)
