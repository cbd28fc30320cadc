"""What the backward of an attention costs on a GPU over some of its query rows: the part of gpu.py for it.

The measure is the dense backward of PyTorch's flash attention, which ``scaled_dot_product_attention`` takes
for such sizes in bfloat16. Two ways of counting: the kernels alone, for rows that were chosen before; and all
that a site does in a backward, rows drawn, or looked for, included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

KEEPS = (0.1, 0.25, 0.5)

Runs = dict[str, Callable[[], object]]


def candidates(device: torch.device, smoke: bool) -> Iterator[tuple[str, Callable[[], tuple[Runs, Any]]]]:
    """What is compared.

    Yields:
        (name, what makes it: what is run, "ours" and "dense", and the site that is run, or None).
    """
    from sparse_compile import Sample
    from sparse_compile.attention_site import AttentionSite

    # BERT-base at two batches, and a causal model with wider heads: samples, tokens, heads, features.
    sizes = [(4, 512, 12, 64, False), (16, 512, 12, 64, False), (8, 2048, 16, 128, True)]
    for b, t, h, d, causal in [(2, 24, 2, 16, True)] if smoke else sizes:
        do, forward = backward_of(b, t, h, d, causal, device)
        size = f"{b} × {t}, {h} × {d}{', causal' if causal else ''}"
        for keep in KEEPS:
            live = some_of(b, t, keep, device)
            yield f"kernels, keep {keep}, {size}", functools.partial(kernels_alone, forward, do, live)
        zero = do * some_of(b, t, 0.5, device)[:, None, :, None]
        methods = [(f"sample, keep {keep}", Sample(keep), do) for keep in KEEPS]
        for name, method, gradient in [*methods, ("exact, half zero", None, zero)]:
            site = AttentionSite(name)
            runs: Runs = {
                "ours": functools.partial(site.backward, gradient, forward, method=method),
                "dense": functools.partial(forward.backward, gradient),
            }
            yield f"{name}, {size}", functools.partial(lambda *both: both, runs, site)


def kernels_alone(forward: Any, do: Tensor, live: Tensor) -> tuple[Runs, None]:
    """After a look at whether they give what the dense backward does."""
    _check(forward, do, live)
    ours = functools.partial(by_kernels, forward, do, live)
    return {"ours": ours, "dense": functools.partial(forward.backward, do)}, None


def backward_of(b: int, t: int, h: int, d: int, causal: bool, device: torch.device) -> tuple[Tensor, Any]:
    """dO [B, H, T, D] in bfloat16, and what the forward left: the form of the device at hand."""
    from sparse_compile.kernels.attention_cuda import CudaFused
    from sparse_compile.kernels.attention_fused import Fused

    generator = torch.Generator(device).manual_seed(0)
    do, q, k, v = (
        torch.randn(b, t, h, d, device=device, generator=generator).bfloat16().transpose(1, 2)
        for _ in range(4)
    )
    aten = torch.ops.aten
    if device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return do, Fused(q, k, v, out, lse, causal, None, None)
    out, lse, *rest, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return do, CudaFused("flash", q, k, v, out, lse, causal, None, None, tuple(rest))


def some_of(b: int, t: int, keep: float, device: torch.device) -> Tensor:
    """bool [B, T]: a share of all rows, whichever samples they are of."""
    live = torch.zeros(b * t, dtype=torch.bool, device=device)
    live[torch.randperm(b * t, device=device)[: round(keep * b * t)]] = True
    return live.view(b, t)


def by_kernels(forward: Any, do: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of the ``live`` rows. (Their numbers are written down by a kernel, too.)"""
    from sparse_compile.kernels import on_device

    f = forward
    return on_device.attention_backward(do, f.q, f.k, f.v, f.out, f.lse, live, causal=f.causal)


def _check(forward: Any, do: Tensor, live: Tensor) -> None:
    """With the tiles that were tuned. 2 %: both round A and dS to bfloat16, and the results."""
    dense = forward.backward(do * live[:, None, :, None])
    for name, ours, theirs in zip(("dQ", "dK", "dV"), by_kernels(forward, do, live), dense, strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        if not error < 0.02:
            raise AssertionError(f"{name} is off by {float(error):.1%}")
