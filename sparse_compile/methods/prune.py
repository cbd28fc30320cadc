"""Pruning of what is saved for backward, as a formula. The fast form is ``kernels/pack.py``.

    x_b        the entries of sample b of an activation, n of them
    k          round((1 − ratio) · n), at least 1
    x̂_b        x_b at its k entries of largest magnitude, zero elsewhere; of equal ones the first are kept

With means, x̂ = μ + the same of x − μ, where μ is the mean over the tokens of the sample (of a head of it),
for each feature, but for rows that are small beside it (:func:`rows_with_mean`). The published method has
none. (Nor does it know the other two things in which
``PruneSaved`` differs by default: what reads a norm's result reads ``normed`` of the norm's x̂, and operands
of fused attention are rounded as below.)

The forward is computed with x; the backward reads x̂ in its place. Source: Back Razor (Jiang et al.,
NeurIPS 2022, section 3), where the kept entries are found per sample, too. The input of a GELU or SiLU
is not pruned there, but kept in 16 or 8 bits. Here

    x̂_i        s_i · round(x_i / s_i) for each of its rows (the last dimension), with s_i = max |x_i| / 127
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.methods.rows import wide

GROUP = 128  # kept values that share a scale when they are stored as int8


def count(keep: float, entries: int) -> int:
    """k: how many of a sample's n entries are kept. ``entries`` may be symbolic.

    In whole millionths, so that the compiler of a graph with dynamic shapes gets integers only.
    """
    millionths = round(keep * 1_000_000)
    return torch.sym_max(1, (entries * millionths + 500_000) // 1_000_000)


def prune(x: Tensor, samples: int, keep: float) -> Tensor:
    """x̂.

    Args:
        x: of any shape; its first 1/samples of all entries are sample 0, and so on.
        keep: 1 − ratio.

    Returns:
        a tensor like x.
    """
    flat = x.reshape(samples, -1)
    order = flat.abs().sort(dim=1, descending=True, stable=True).indices
    kept = order[:, : count(keep, flat.shape[1])]
    return torch.zeros_like(flat).scatter_(1, kept, flat.gather(1, kept)).view(x.shape)


def rows_with_mean(x: Tensor, means: Tensor) -> Tensor:
    """The rows of which the mean is taken off, and for whose dropped entries it stands in.

    Not those that are smaller than half of it, or vary less over their features: zero rows of padding, say. A
    norm's backward divides by what they are, and the mean in their place would be as much too large.

    Args:
        x: its rows [..., I] are those of the groups, one group after the other.
        means: [G, I].

    Returns:
        bool [G, R].
    """
    rows = x.reshape(len(means), -1, means.shape[1])
    size, spread = _size_and_spread(rows)
    of_mean, spread_of_mean = _size_and_spread(means.unsqueeze(1))
    return (size >= of_mean / 4) & (spread >= spread_of_mean / 4)


def _size_and_spread(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row, Σ x² and Σ (x − its mean)²."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    size = torch.linalg.vector_norm(rows, dim=-1, dtype=dtype).square()
    mean = rows.mean(-1, dtype=dtype)
    return size, (size - rows.shape[-1] * mean.square()).clamp_(min=0)


def narrow(kept: Tensor, values: str) -> tuple[Tensor, Tensor]:
    """The kept values of an activation in the form in which they are stored.

    Args:
        kept: [K].
        values: "same", "fp16", "bf16" or "int8".

    Returns:
        [K], and the scales: float32 [ceil(K / 128)] for int8, empty otherwise. What a form cannot hold is
        stored as its largest number.
    """
    dtype = stored_dtype(kept.dtype, values)
    scales = torch.empty(0, device=kept.device)
    if dtype == torch.int8:
        groups = torch.nn.functional.pad(kept.float(), (0, -len(kept) % GROUP)).view(-1, GROUP)
        scales = groups.abs().amax(1) / 127
        whole = (groups / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).round_()
        return whole.flatten()[: len(kept)].to(torch.int8), scales
    if dtype != kept.dtype:
        limit = torch.finfo(dtype).max
        kept = kept.clamp(-limit, limit).to(dtype)
    return kept, scales


def widen(stored: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`narrow`, up to the rounding: [K] of ``dtype``."""
    if stored.dtype == torch.int8:
        each = scales.repeat_interleave(GROUP)[: len(stored)]
        return (stored * each).to(dtype)
    return stored.to(dtype)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every row of x in steps of a 127th of its largest magnitude.

    Args:
        x: floating, [..., I].

    Returns:
        int8 [..., I], and the size of a step, float32 (of a float64 x, float64) [..., 1]. It is not finite
        where a row is not, and then nor is anything that is restored from it.
    """
    entries = x.to(wide(x.dtype))
    steps = entries.abs().amax(-1, keepdim=True) / 127
    never_zero = steps + torch.finfo(steps.dtype).tiny
    return (entries / never_zero).round().to(torch.int8), steps


def restore_rows(whole: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`round_rows`, up to the rounding."""
    return (whole * steps).to(dtype)


def normed(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """A layer norm's result for x̂, with the mean and the reciprocal deviation of the whole x."""
    y = (x - mean) * rstd
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(dtype)


def stored_dtype(dtype: torch.dtype, values: str) -> torch.dtype:
    """What kept values of a floating ``dtype`` are stored as; never something wider."""
    if values == "int8":
        return torch.int8
    named = {"same": dtype, "fp16": torch.float16, "bf16": torch.bfloat16}[values]
    return named if named.itemsize < dtype.itemsize else dtype
