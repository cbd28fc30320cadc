"""The custom ops that may be recorded into CUDA graphs: overloads ``planned`` of those in ``ops.py`` and
``forward_ops.py``, with the number of a plan and a tensor of numbers in the place of the token. See
``plan.py``, and ``passes/plan.py``, which puts them into graphs.

``begin.planned(plan, anchor, manifest) -> (token, control)``,
``prepare_backward(plan, token, anchor, sites) -> control``
    run at each forward and backward, outside of what is recorded. ``anchor`` is any tensor on the GPU. The
    control of a forward only orders its ops behind ``begin``; that of a backward is int64 [sites, 4], the
    numbers that change from step to step.

``linear_backward.planned(control, plan, …, needed, mask)``,
``needed_slots.planned(control, plan, needed, site)``,
``linear_forward_rows.planned(control, plan, …, site, mask)``, ``sample_weights.planned(control, plan, …)``,
``cuda_attention_backward.planned(control, plan, …)``
    launch what the plan says. ``mask`` is the site whose op made the slots of needed rows, or −1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_compile import plan as plans
from sparse_compile import runtime
from sparse_compile.changes import changed
from sparse_compile.device_forward import DeviceForward, Needed
from sparse_compile.kernels import choice, on_device
from sparse_compile.kernels import linear as kernel
from sparse_compile.kernels.attention_cuda import CudaFused
from sparse_compile.methods.rows import Rows
from sparse_compile.plan import NUMBERS, Choice, Plan

_EVERY_STEP = (torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe)
_STRIDES = (torch.Tag.needs_fixed_stride_order,)

_library = torch.library.Library("sparse_compile", "FRAGMENT")
_library.define(
    "begin.planned(SymInt plan, Tensor anchor, str manifest) -> (Tensor, Tensor)", tags=_EVERY_STEP
)
_library.define(
    "prepare_backward(SymInt plan, Tensor token, Tensor anchor, int sites) -> Tensor", tags=_EVERY_STEP
)
_library.define(
    "linear_backward.planned(Tensor control, SymInt plan, Tensor dy, Tensor? x, Tensor? w, int site,"
    " SymInt tokens, bool dw_transposed, bool dx_whole=False, Tensor[]? needed=None, int mask=-1)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_STRIDES,
)
_library.define(
    "needed_slots.planned(Tensor control, SymInt plan, Tensor needed, int site)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_forward_rows.planned(Tensor control, SymInt plan, Tensor x, Tensor w, Tensor? bias, Tensor kept,"
    " Tensor count, Tensor slot, Tensor copies, int site, int mask, bool whole=False) -> (Tensor, Tensor)",
    tags=_STRIDES,
)
_library.define(
    "sample_weights.planned(Tensor control, SymInt plan, Tensor squares, int site) -> Tensor", tags=_STRIDES
)
_library.define(
    "cuda_attention_backward.planned(Tensor control, SymInt plan, int site, str form, Tensor do, Tensor q,"
    " Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, Tensor? mask, float? scale, Tensor? cum_seq_q,"
    " Tensor? cum_seq_k, SymInt max_q, SymInt max_k, Tensor seed, Tensor offset) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides,),
)
# Nothing may read what it returns: where all that a graph has to prepare is to count.
torch.fx.node.has_side_effect(torch.ops.sparse_compile.begin.planned)
torch.fx.node.has_side_effect(torch.ops.sparse_compile.prepare_backward.default)


@torch.library.impl(_library, "begin.planned", "CompositeExplicitAutograd")
def _begin(plan: int, anchor: Tensor, manifest: str) -> tuple[Tensor, Tensor]:
    token = runtime.begin(manifest, plans.made(plan))
    return torch.tensor(token, dtype=torch.int64), torch.zeros(1, dtype=torch.int64, device=anchor.device)


@torch.library.register_fake("sparse_compile::begin.planned")
def _begin_fake(plan: int, anchor: Tensor, manifest: str) -> tuple[Tensor, Tensor]:
    return torch.empty(4, dtype=torch.int64), anchor.new_empty(1, dtype=torch.int64)


@torch.library.impl(_library, "prepare_backward", "CompositeExplicitAutograd")
def _prepare_backward(plan: int, token: Tensor, anchor: Tensor, sites: int) -> Tensor:
    numbers = runtime.prepare(token.tolist(), plans.find(plan), anchor.device)
    if numbers is None:
        return torch.zeros(sites, NUMBERS, dtype=torch.int64, device=anchor.device)
    return numbers


@torch.library.register_fake("sparse_compile::prepare_backward")
def _prepare_backward_fake(plan: int, token: Tensor, anchor: Tensor, sites: int) -> Tensor:
    return anchor.new_empty(sites, NUMBERS, dtype=torch.int64)


def _replayed(op: str) -> Callable[[Callable[..., Any]], None]:
    """Implement ``op``. Its function takes its arguments with the plan in the place of that one's number, or
    with None. From its third run under a plan on, what it launched is launched again (see ``replay.py``),
    unless the host looks at what comes of it."""

    def implement(function: Callable[..., Any]) -> None:
        def run(control: Tensor, plan: int, *arguments: Any) -> Any:
            known = plans.find(plan)
            if known is None or known.observed:
                changed()
                return function(control, known, *arguments)
            inputs: list[Tensor] = [control]
            others: list[Any] = [op]
            for each in arguments:
                if isinstance(each, Tensor):
                    inputs.append(each)
                elif isinstance(each, list):
                    inputs += each
                else:
                    others.append(each)

            def launch() -> Any:
                changed()
                return function(control, known, *arguments)

            return known.programs.run(tuple(others), inputs, launch)

        torch.library.impl(_library, op, "CompositeExplicitAutograd")(run)

    return implement


@_replayed("linear_backward.planned")
def _linear_backward(
    control: Tensor,
    plan: Plan | None,
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    site: int,
    tokens: int,
    dw_transposed: bool,
    dx_whole: bool = False,
    needed: list[Tensor] | None = None,
    mask: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    if plan is None:
        dx, dw = kernel.backward(dy, x, w, dy, dy, dw_transposed=dw_transposed)
    else:
        with choice.device_alone():
            dx, dw = plan.sites[site].planned.launch(
                *(plan, site, control[site], dy, x, w),
                tokens=tokens,
                dw_transposed=dw_transposed,
                needed=None if needed is None else _needed(plan, mask, *needed),
            )
    distinct, index = (dy.new_empty(0), None) if dx is None else dx
    if dx_whole:
        distinct, index = kernel.written_out((distinct, index)), None
    if index is None:
        index = torch.arange(0 if dx_whole else len(distinct), device=dy.device)
    return distinct, index, dy.new_empty(0) if dw is None else dw


@torch.library.register_fake("sparse_compile::linear_backward.planned")
def _linear_backward_fake(
    control: Tensor,
    plan: int,
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    site: int,
    tokens: int,
    dw_transposed: bool,
    dx_whole: bool = False,
    needed: list[Tensor] | None = None,
    mask: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernel.empty_backward(dy, x, w, dw_transposed=dw_transposed, dx_whole=dx_whole)


def _needed(plan: Plan, mask: int, kept: Tensor, count: Tensor, slot: Tensor) -> Needed | None:
    rows = Rows(kept, count=count, slot=slot, padded=True)
    return Needed.of(rows, _choice(plan, mask).skip_mask)


def _choice(plan: Plan | None, site: int) -> Choice:
    return Choice() if plan is None else plan.choices[site]


@_replayed("needed_slots.planned")
def _needed_slots(
    control: Tensor, plan: Plan | None, needed: Tensor, site: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _choice(plan, site).count_mask or len(needed) == 0 or not on_device.available(needed.device):
        return DeviceForward.no_slots(needed)
    assert plan is not None
    assert plan.status is not None
    found = on_device.needed_slots(needed)
    plan.status.on_device[site, 1:2].copy_(found[1])
    return found


@torch.library.register_fake("sparse_compile::needed_slots.planned")
def _needed_slots_fake(
    control: Tensor, plan: int, needed: Tensor, site: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return DeviceForward.no_slots(needed)


@_replayed("linear_forward_rows.planned")
def _linear_forward_rows(
    control: Tensor,
    plan: Plan | None,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    count: Tensor,
    slot: Tensor,
    copies: Tensor,
    site: int,
    mask: int,
    whole: bool = False,
) -> tuple[Tensor, Tensor]:
    layer = None if plan is None else plan.sites[site]
    forward = DeviceForward() if layer is None else layer.on_device
    left_alone = plan is None or plan.choices[site].left_alone
    needed = None if left_alone or plan is None else _needed(plan, mask, kept, count, slot)
    with choice.device_alone():
        return forward.linear(x, w, bias, needed, copies, whole=whole)  # type: ignore[no-any-return]


@torch.library.register_fake("sparse_compile::linear_forward_rows.planned")
def _linear_forward_rows_fake(
    control: Tensor,
    plan: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    count: Tensor,
    slot: Tensor,
    copies: Tensor,
    site: int,
    mask: int,
    whole: bool = False,
) -> tuple[Tensor, Tensor]:
    n = x.shape[0]
    return x.new_empty(n, w.shape[0]), x.new_empty(0 if whole else n, dtype=torch.int64)


@_replayed("sample_weights.planned")
def _sample_weights(control: Tensor, plan: Plan | None, squares: Tensor, site: int) -> Tensor:
    if plan is None:
        return torch.ones_like(squares)
    return plan.sites[site].planned.launch(plan, site, control[site], squares)  # type: ignore[no-any-return]


@torch.library.register_fake("sparse_compile::sample_weights.planned")
def _sample_weights_fake(control: Tensor, plan: int, squares: Tensor, site: int) -> Tensor:
    return torch.empty_like(squares)


@_replayed("cuda_attention_backward.planned")
def _cuda_attention_backward(
    control: Tensor, plan: Plan | None, site: int, form: str, do: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    forward = CudaFused.of(form, *rest)
    if plan is None:
        return forward.backward(do)
    with choice.device_alone():
        return plan.sites[site].planned.launch(plan, site, control[site], do, forward)  # type: ignore[no-any-return]


@torch.library.register_fake("sparse_compile::cuda_attention_backward.planned")
def _cuda_attention_backward_fake(
    control: Tensor, plan: int, site: int, form: str, do: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return CudaFused.of(form, *rest).backward(do)
