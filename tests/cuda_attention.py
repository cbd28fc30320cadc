"""CUDA's fused attention ops on CPU tensors, to trace and run graphs that hold them without a GPU.

With the real overloads, derivatives and fake implementations; what runs is written from the formula. Layouts
and log-sum-exps are those of the real kernels: the efficient one pads its log-sum-exp to a multiple of 32
rows, cuDNN's has a last dimension of one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_compile.kernels.attention_cuda import CudaFused
from sparse_compile.kernels.attention_fused import Fused

aten = torch.ops.aten
FORMS = ("flash", "efficient", "cudnn")
GPU = torch.cuda.is_available()
SAMPLES, HEADS, TOKENS, WIDTH = 2, 2, 20, 8  # of a batch
Gradients = tuple[Tensor, Tensor, Tensor]


def attend(form: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """O of the op, [B, H, T, D]. Options: is_causal, scale, dropout_p."""
    if form == "flash":
        assert mask is None
        return aten._scaled_dot_product_flash_attention(q, k, v, **options)[0]
    if form == "efficient":
        return aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, **options)[0]
    return aten._scaled_dot_product_cudnn_attention(q, k, v, mask, True, **options)[0]


@pytest.fixture
def cuda_attention_on_cpu() -> Iterator[list[str]]:
    """Yields the names of the backwards that ran."""
    ran: list[str] = []
    library = torch.library.Library("aten", "IMPL")
    for form in FORMS:
        name = f"_scaled_dot_product_{form}_attention"
        library.impl(name, _forward(form), "CPU")
        library.impl(f"{name}_backward", _backward(form, ran), "CPU")
    yield ran
    library._destroy()


def _given(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    arguments = op._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments}
    return {**defaults, **dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}


def _forward(form: str) -> Callable[..., Any]:
    op = getattr(aten, f"_scaled_dot_product_{form}_attention").default

    def run(*args: Any, **kwargs: Any) -> Any:
        given = _given(op, args, kwargs)
        q = given["query"]
        scores = _scores(given, q, given["key"])
        out, lse = scores.softmax(-1) @ _shared(given["value"], q).float(), scores.logsumexp(-1)
        seeds = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
        if form == "flash":
            seeds = [torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)]
            out = torch.empty_like(q).copy_(out)
            return (out, lse, None, None, q.shape[2], given["key"].shape[2], *seeds, q.new_empty(0))
        if form == "cudnn":
            out = torch.empty_like(q).copy_(out)
            return (out, lse.unsqueeze(3), None, None, q.shape[2], given["key"].shape[2], *seeds, None)
        out = _heads_inside(out).to(q.dtype)
        rows = q.shape[2]
        padded = lse.new_full((*lse.shape[:2], math.ceil(rows / 32) * 32), torch.inf)
        padded[:, :, :rows] = lse
        return out, padded, *seeds

    return run


def _backward(form: str, ran: list[str]) -> Callable[..., Any]:
    op = getattr(aten, f"_scaled_dot_product_{form}_attention_backward").default

    def run(*args: Any, **kwargs: Any) -> Any:
        ran.append(form)
        given = _given(op, args, kwargs)
        q, k, v = (given[name] for name in ("query", "key", "value"))
        do, out = given["grad_out_" if form == "efficient" else "grad_out"], given["out"]
        lse = given["logsumexp"]
        assert lse.shape[2] == (math.ceil(q.shape[2] / 32) * 32 if form == "efficient" else q.shape[2])
        assert lse.dim() == (4 if form == "cudnn" else 3)
        lse = (lse.squeeze(3) if form == "cudnn" else lse)[:, :, : q.shape[2]]
        a = (_scores(given, q, k) - lse.unsqueeze(-1)).exp()
        delta = (do.float() * out.float()).sum(-1, keepdim=True)
        scale = given["scale"] or q.shape[3] ** -0.5
        ds = a * (do.float() @ _shared(v, q).float().mT - delta) * scale
        dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (ds.mT @ q.float(), a.mT @ do.float()))
        found = ((q, ds @ _shared(k, q).float()), (k, dk), (v, dv))
        if form == "efficient":
            of_mask = ds / scale if given["grad_input_mask"][3] else None
            return *(_heads_inside(gradient).to(x.dtype) for x, gradient in found), of_mask
        return tuple(torch.empty_like(x).copy_(gradient) for x, gradient in found)

    return run


def _scores(given: dict[str, Any], q: Tensor, k: Tensor) -> Tensor:
    scale = given["scale"] or q.shape[3] ** -0.5
    scores = q.float() @ _shared(k, q).float().mT * scale
    mask = given.get("attn_bias")
    if mask is not None:
        scores = scores + mask
    if given["is_causal"]:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores


def _shared(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _heads_inside(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def dtype_of(form: str) -> torch.dtype:
    """The real ops but one take no float32."""
    return torch.float32 if form == "efficient" or not GPU else torch.bfloat16


def close(ours: Gradients, theirs: Gradients) -> None:
    half = ours[0].dtype == torch.bfloat16
    for found, wanted in zip(ours, theirs, strict=True):
        wanted = wanted.float()
        error = (found.cpu().float() - wanted).norm()
        assert error <= (0.02 if half else 2e-5) * wanted.norm() + 1e-6


@dataclasses.dataclass
class Batch:
    """One attention's operands on the CPU, a share of the rows of dO zero in all heads."""

    do: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool

    def on_device(self, form: str, device: torch.device) -> tuple[Tensor, CudaFused]:
        """dO, and what the forward of the fused op leaves."""
        dtype = dtype_of(form)
        do, q, k, v = (x.to(device, dtype) for x in (self.do, self.q, self.k, self.v))
        mask = (
            None if self.mask is None else self.mask.to(device, dtype).expand(SAMPLES, HEADS, TOKENS, TOKENS)
        )
        if form == "flash":
            out, lse, *lengths, seed, offset, _ = aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, self.causal, scale=0.4
            )
        elif form == "cudnn":
            out, lse, *lengths, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
                q, k, v, mask, True, 0.0, self.causal, scale=0.4
            )
        else:
            lengths = [None, None, 0, 0]
            out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
                q, k, v, mask, True, 0.0, self.causal, scale=0.4
            )
        rest = (*lengths, seed, offset)
        return do, CudaFused(form, q, k, v, out, lse, self.causal, mask, 0.4, rest)

    def on_cpu(self) -> tuple[Tensor, Fused]:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            self.q, self.k, self.v, 0.0, self.causal, attn_mask=self.mask, scale=0.4
        )
        return self.do, Fused(self.q, self.k, self.v, out, lse, self.causal, self.mask, 0.4)


def batch(step: int = 0, dead: float = 0.4, *, masked: bool = False, causal: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(step)
    do, q, k, v = (
        torch.randn(SAMPLES, TOKENS, HEADS, WIDTH, generator=generator).bfloat16().float().transpose(1, 2)
        for _ in range(4)
    )
    n = SAMPLES * TOKENS
    zero = torch.zeros(n, dtype=torch.bool)
    zero[torch.randperm(n, generator=generator)[: round(dead * n)]] = True
    do.transpose(1, 2)[zero.view(SAMPLES, TOKENS)] = 0
    mask = None
    if masked:
        mask = torch.zeros(SAMPLES, 1, 1, TOKENS)
        mask[1, :, :, 13:] = -torch.inf
    return Batch(do, q, k, v, mask, causal)
