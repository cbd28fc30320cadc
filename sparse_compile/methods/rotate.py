"""Sparse weight gradients in a rotated basis, as formulas.

    G          the gradient of a weight W [O, I]: dYᵀ · X
    U, V       orthonormal columns, [O, P] and [I, Q]: of all gradients of the calibration, the leading
               eigenvectors of Σ G·Gᵀ and of Σ Gᵀ·G. That is the HOSVD of their stack; the stack itself is
               not needed, since its unfoldings have these Gram matrices.
    S          Uᵀ · G · V = (dY · U)ᵀ · (X · V), [P, Q]: the corner of the rotated gradient with the most
               energy, as both bases are ordered by it
    K          the k = density · O · I entries of S that are largest; all others are dropped
    ΔW         U · D · Vᵀ, with D zero except at K, where an optimizer has put its update

Source: SparseGrad (Chekalina et al., EMNLP 2024), which rotates by the whole of U and V: that costs more
than the product dYᵀ · X that it replaces. The corner costs P · (1/O + 1/I) of it (or as much with Q).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def count(density: float, outputs: int, inputs: int) -> int:
    """k, at least 1."""
    return max(1, round(density * outputs * inputs))


def corner(entries: float, outputs: int, inputs: int) -> tuple[int, int]:
    """(P, Q) of about ``entries`` entries (never fewer), in the proportions of the weight."""
    scale = math.sqrt(min(1.0, entries / (outputs * inputs)))
    p = min(outputs, math.ceil(outputs * scale))
    return p, min(inputs, math.ceil(entries / p))


def gradient(dy: Tensor, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """S [P, Q] = (dY · U)ᵀ · X · V.

    One side is rotated before the product and the other after it, where it costs nothing for each token:
    the side with the smaller rank goes first.

    Args:
        dy: [N, O].
        x: [N, I].
        u: [O, P].
        v: [I, Q].
    """
    if u.shape[1] <= v.shape[1]:
        return torch.mm(torch.mm((dy @ u).t(), x), v)
    return torch.mm(u.t(), torch.mm(dy.t(), x @ v))


def flops(n: int, outputs: int, inputs: int, p: int, q: int) -> int:
    """What :func:`gradient` costs for N rows."""
    if p <= q:
        return 2 * n * p * (outputs + inputs) + 2 * p * inputs * q
    return 2 * n * q * (outputs + inputs) + 2 * p * outputs * q


def choose(s: Tensor, k: int) -> Tensor:
    """K: positions in the flattened S [P, Q] of its k largest entries, ascending, int32 [k].

    What is not finite counts as zero.
    """
    size = s.flatten().abs()
    size = torch.where(size.isfinite(), size, 0)
    return size.topk(k, sorted=False).indices.sort().values.to(torch.int32)


def update(entries: Tensor, indices: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """ΔW [O, I] = U · D · Vᵀ, where D is ``entries`` [k] at ``indices`` [k] of the flattened [P, Q]."""
    d = entries.new_zeros(u.shape[1] * v.shape[1])
    d[indices.long()] = entries
    d = d.view(u.shape[1], v.shape[1])
    if u.shape[1] <= v.shape[1]:
        return u @ (d @ v.t())
    return (u @ d) @ v.t()
