"""The leading directions of many matrices of one shape, from sums that are kept while they come by.

The HOSVD of a stack of matrices G₁, G₂, … [O, I] has the eigenvectors of M = Σ G·Gᵀ as the basis of its rows,
and those of Σ Gᵀ·G as that of its columns. No stack is kept. Where few of many directions are wanted M itself
is not either, only Y = M·Ω for a random orthonormal Ω [O, L]: that is enough for M's leading eigenvectors
(Nyström's approximation; Tropp, Yurtsever, Udell & Cevher, "Fixed-Rank Approximation of a
Positive-Semidefinite Matrix from Streaming Data", NeurIPS 2017, algorithm 3).
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from sparse_compile.methods.rows import wide

# Up to this size M is kept whole and its eigenvectors are exact: float32 [1024, 1024] is 4 MB.
WHOLE = 1024


class Directions:
    """The leading eigenvectors of M = Σ G·Gᵀ, over the G that were added.

    Args:
        size: O, of M [O, O].
        rank: how many eigenvectors will be asked for.
        seed: of Ω.
    """

    def __init__(self, size: int, rank: int, seed: str) -> None:
        self.size = size
        self.rank = rank
        width = size if size <= WHOLE else min(size, 2 * rank + 16)
        self._omega: Tensor | None = None if width == size else _orthonormal(size, width, seed)
        self.sums: Tensor | None = None  # Y [O, L]; M itself where there is no Ω

    def add(self, g: Tensor) -> None:
        """Add G [O, I]; sums are of its dtype, float32 at least."""
        g = g.to(wide(g.dtype))
        if self._omega is None:
            term = g @ g.t()
        else:
            self._omega = self._omega.to(g)
            term = g @ (g.t() @ self._omega)
        self.sums = term if self.sums is None else self.sums.to(term).add_(term)

    def leading(self) -> Tensor:
        """The eigenvectors of the largest eigenvalues, in descending order: [O, rank]."""
        assert self.sums is not None
        y = self.sums.double()
        if self._omega is None:
            vectors = torch.linalg.eigh((y + y.t()) / 2).eigenvectors.flip(1)
        else:
            omega = self._omega.double()
            # A small multiple of the identity keeps the Cholesky factor in existence.
            shift = torch.finfo(self.sums.dtype).eps * torch.linalg.matrix_norm(y)
            shift = shift.clamp(min=torch.finfo(torch.float32).tiny)
            y = y + shift * omega
            core = omega.t() @ y
            factor = torch.linalg.cholesky((core + core.t()) / 2, upper=True)
            half = torch.linalg.solve_triangular(factor, y, upper=True, left=False)
            vectors = torch.linalg.svd(half, full_matrices=False).U
        return vectors[:, : self.rank].to(self.sums.dtype).contiguous()


def _orthonormal(rows: int, columns: int, seed: str) -> Tensor:
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q
