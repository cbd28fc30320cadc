"""Reuse and sampling in attention: which query rows, or entries, are computed, and what of the others.

Shapes as in ``kernels/attention.py``; a bar is a batch mean, or one sample's (``source``), of an earlier
backward; everything is per head.

**Elements** (and n:m), after C-Sharp. S(·) is the largest part, the rest set to zero:

    dV = A'ᵀ · S(dO − dŌ) + Ā'ᵀ · dŌ          dA' = S(dO − dŌ) · Vᵀ + dŌ · V̄ᵀ
    dQ = S(dS − dS̄) · K + dS̄ · K̄             dK = S(dS − dS̄)ᵀ · Q + dS̄ᵀ · Q̄

with dS from dA' by the softmax's backward. The products of the means are made once for each renewal. The
published code drops heads and mask; here both are kept. It multiplies dense matrices, and saves no time.

**Rows**. Each query row of dO goes through the backward alone, and linearly. So the rows in which dO differs
most from dŌ are computed, exactly. What the others would have given is filled in with means of the gradients:

    dQ_t = dQ̄_t        dK += f · dK̄        dV += f · dV̄

for a row t that was dropped, f being the share of the sample's dO (in the sum of its rows' norms) that was.
The means are those of the estimates, which makes them running averages: what they hold of dropped rows is
older. (Means of the true gradients would need all rows.)

**Sampling**. Rows drawn by ‖dO_t‖ over all heads, and scaled up (``sample.py``). What an attention gives is
linear in dO, and so it is unbiased.

A row whose dO is zero in all heads has no gradient, and nothing is filled in there; nor for a key that no
computed row of its sample attends to, padding for instance. (So dK and dV get nothing where all rows of a
sample were dropped. In random data it was better to fill them in there, too, if the gradients of samples were
of much the same size, and worse if they were not.)
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import Tensor

from sparse_compile.kernels.attention import Gradients, WrittenOut
from sparse_compile.kernels.attention_chain import scores_gradient
from sparse_compile.methods import exact, reuse, sample
from sparse_compile.methods.rows import number_kept, wide
from sparse_compile.phases import parse_n_m
from sparse_compile.settings.reuse import Reuse

# How often reuse moves the features of every row, whichever it keeps: norms, what is filled in, new means. So
# the share at which it stops to pay comes within 0.07 of what was measured (heads of 64, one core, AVX-512,
# float32): 0.5 fused and 0.3 as a chain for 128 tokens, 0.7 and 0.6 for 256, 0.8 and 0.7 for 512.
_PASSES = 6
# Sampling does less: norms, and dO scaled. Measured as above it stops to pay at 0.67, 0.70 and 0.84 fused and
# at 0.46, 0.70 and 0.85 as a chain, for 128, 256 and 512 tokens; this gives 0.65, 0.80 and 0.89, and 0.47,
# 0.60 and 0.67.
_PASSES_OF_SAMPLING = 3

REMEMBERED = ("do", "dq", "dk", "dv")  # where whole rows are reused
Means = dict[str, Tensor]  # what is remembered, by name; each is one sample's size


@dataclasses.dataclass(frozen=True, slots=True)
class ChosenRows:
    """Which query rows are computed.

    Attributes:
        computed: bool [B, T].
        dropped: bool [B, T], the others whose dO is not zero.
        share: f [B], of each sample's dO in the dropped ones.
    """

    computed: Tensor
    dropped: Tensor
    share: Tensor


def reuse_pays(keep: float, rows: int, keys: int, features: int, *, stored: bool) -> bool:
    """Whether reuse of rows costs less than computing all of them."""
    return _few_rows_pay(keep, rows, keys, features, stored, _PASSES)


def sampling_pays(keep: float, rows: int, keys: int, features: int, *, stored: bool) -> bool:
    """Whether sampling of rows costs less than computing all of them."""
    return _few_rows_pay(keep, rows, keys, features, stored, _PASSES_OF_SAMPLING)


def _few_rows_pay(keep: float, rows: int, keys: int, features: int, stored: bool, passes: int) -> bool:
    fewest = exact.fewest_to_skip_in_attention(rows, keys, features, stored=stored, passes=passes)
    return rows - number_kept(keep, rows) >= fewest


def draw_rows(do: Tensor, keep: float, clip: float | None, draw: sample.Draw) -> tuple[Tensor, int] | None:
    """(weights, zero): what each query row of dO [B, H, T, D] counts for, [B, T], which is zero for rows that
    are not drawn and at least 1 for others; and how many rows of dO are zero. None if dO is not finite: that
    must reach the gradients whole."""
    b, _, t, _ = do.shape
    norms = torch.linalg.vector_norm(do.transpose(1, 2).flatten(2), dim=2, dtype=wide(do.dtype)).view(-1)
    if not bool(norms.sum().isfinite()):
        return None
    drawn = sample.rows(norms, number_kept(keep, b * t), clip, draw)
    weights = torch.zeros_like(norms)
    weights[drawn.kept] = 1 if drawn.scale is None else drawn.scale.to(norms.dtype)
    return weights.view(b, t), len(norms) - int(norms.count_nonzero())


def choose_rows(do: Tensor, mean: Tensor, keep: float, live: Tensor | None) -> ChosenRows:
    """The round(keep · B · T) query rows with the largest ‖dO − dŌ‖ over all heads, whichever samples they
    are of (fewer if fewer are not zero).

    Args:
        do: [B, H, T, D].
        mean: dŌ, [H, T, D].
        live: bool [B, T], the rows that are not zero; None if none is.
    """
    b, _, t, _ = do.shape
    rows = do.transpose(1, 2).reshape(b * t, -1)
    base = mean.transpose(0, 1).reshape(t, -1)
    chosen = reuse.rows(rows, base, keep, None if live is None else live.reshape(-1))
    computed = torch.zeros(b * t, dtype=torch.bool, device=do.device)
    computed[chosen.kept] = True
    dropped = cast(Tensor, chosen.dropped).view(b, t)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=wide(rows.dtype)).view(b, t)
    return ChosenRows(computed.view(b, t), dropped, share_of(norms, dropped))


def share_of(norms: Tensor, dropped: Tensor) -> Tensor:
    """f [B] of ``norms`` [B, T] of the rows, and which of them are dropped, bool [B, T]."""
    return (norms * dropped).sum(1) / norms.sum(1).clamp_min(torch.finfo(norms.dtype).tiny)


def fill_in(gradients: Gradients, rows: ChosenRows, means: Means, attended: Tensor | None) -> Gradients:
    """Add what stands in for the dropped rows to the gradients of the computed ones, in place.

    Args:
        attended: bool [B, U], the keys that some row attends to: those whose dV is not zero. None is all.
    """
    dq, dk, dv = gradients
    torch.where(rows.dropped[:, None, :, None], means["dq"], dq, out=dq)
    share = rows.share.unsqueeze(1) if attended is None else rows.share.unsqueeze(1) * attended
    weight = share.view(len(dv), 1, -1, 1).to(dv.dtype)
    dk.addcmul_(means["dk"].unsqueeze(0), weight)
    dv.addcmul_(means["dv"].unsqueeze(0), weight)
    return dq, dk, dv


def means_for_rows(do: Tensor, gradients: Gradients, sample: int | Tensor | None) -> Means:
    """What later backwards fill in.

    Args:
        sample: which one to remember, as a number or int64 [1] on the device; None for the mean over all.
    """
    named = zip(REMEMBERED, (do, *gradients), strict=True)
    return {name: _one(x, sample) for name, x in named}


def by_elements(
    do: Tensor, f: WrittenOut, means: Means | None, method: Reuse, live: Tensor | None
) -> tuple[Gradients, Tensor]:
    """((dQ, dK, dV), dS), dS before its own entries are chosen.

    Args:
        means: of an earlier backward, or None: then all is exact.
        live: bool [B, T], the rows that are not zero; None if none is.
    """
    alive = None if live is None else live[:, None, :, None]

    def masked(x: Tensor) -> Tensor:
        return x if alive is None else torch.where(alive, x, torch.zeros_like(x))

    q, k, v, a = f.q, f.k, f.v, f.dropped
    if means is None:
        ds = scores_gradient(do @ v.mT, a, f.probabilities) * f.scale
        return (ds @ k, ds.mT @ q, a.mT @ do), ds
    attended = (a != 0).any(2, keepdim=True).any(1, keepdim=True).transpose(2, 3)
    for_da, for_dv = _largest(masked(do - means["do"]), method)
    dv = a.mT @ for_dv + means["dv"] * attended
    da = masked(for_da @ v.mT + means["da"])
    ds = masked(scores_gradient(da, a, f.probabilities) * f.scale)
    for_dq, for_dk = _largest(masked(ds - means["ds"]), method)
    dq = masked(for_dq @ k + means["dq"])
    return (dq, for_dk.mT @ q + means["dk"] * attended, dv), ds


def kept_entries(do: Tensor, means: Means, method: Reuse, live: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which entries of dO :func:`by_elements` takes as they are, for dA' (and so dQ and dK) and for dV: bool
    [B, H, T, D] each. Of rows that are zero it is not said."""
    residual = do - means["do"]
    if live is not None:
        residual = torch.where(live[:, None, :, None], residual, torch.zeros_like(residual))
    for_da, for_dv = ((some != 0) | (residual == 0) for some in _largest(residual, method))
    return for_da, for_dv


def means_for_elements(do: Tensor, ds: Tensor, f: WrittenOut, sample: int | None) -> Means:
    """dŌ, dS̄ and the four products of means that later backwards add; ``sample`` as above."""
    a, o, s, q, k, v = (_one(x, sample) for x in (f.dropped, do, ds, f.q, f.k, f.v))
    return {"do": o, "ds": s, "dv": a.mT @ o, "da": o @ v.mT, "dq": s @ k, "dk": s.mT @ q}


def _one(x: Tensor, sample: int | Tensor | None) -> Tensor:
    """The mean over the samples, or one of them, laid out as x is.

    Summed in the order of memory: with heads side by side there, 16 samples of 128 rows of 768 take 0.2 ms,
    and 3 ms in the order of the dimensions (one core).
    """
    if isinstance(sample, Tensor):
        return x.index_select(0, sample).squeeze(0)
    if sample is not None:
        return x[sample].clone()
    order = sorted(range(1, x.dim()), key=lambda dim: -x.stride()[dim])
    mean = x.permute(0, *order).mean(0)
    return mean.permute([order.index(dim) for dim in range(1, x.dim())])


def _largest(residual: Tensor, method: Reuse) -> tuple[Tensor, Tensor]:
    """S(R) for the product that contracts R's last dimension, and for the one that contracts its queries: the
    same single entries of R [B, H, T, …], or by n:m the largest of neighbours along what is contracted."""
    ratio = method.phases[0][0]
    if isinstance(ratio, str):
        n, m = parse_n_m(ratio)
        along_last = torch.where(reuse.largest_of_neighbours(residual.abs(), n, m), residual, 0)
        queries = residual.mT
        along_queries = torch.where(reuse.largest_of_neighbours(queries.abs(), n, m), queries, 0)
        return along_last, along_queries.mT
    kept = residual.abs().flatten().topk(number_kept(method.keep, residual.numel()), sorted=False).indices
    some = torch.zeros_like(residual, memory_format=torch.contiguous_format)
    some.view(-1)[kept] = residual.flatten()[kept]
    return some, some
