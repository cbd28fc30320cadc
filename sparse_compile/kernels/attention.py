"""What both forms of an attention's backward share: groups of query rows, and what is asked of a form.

Shapes, in all files: Q, dO [B, H, T, D]; K, V [B, H, U, D], where H may be fewer in grouped-query attention;
the probabilities A [B, H, T, U]. What autograd needs is

    dV = Aᵀ · dO    dA = dO · Vᵀ    dS = A ∘ (dA − rowsum(dA ∘ A)) · s    dQ = dS · K    dK = dSᵀ · Q

and every query row of dO goes through it alone: A is needed only in the rows that are computed, and the
sums over queries, dV and dK, only have those rows as terms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]  # dQ, dK, dV

# Samples are computed together if the smallest lacks no more rows than this, or than a quarter, of the
# largest's. What it lacks is filled up with rows that add nothing, and that is cheaper than the copies of
# K, V, dK and dV that a group of its own needs: as long as 20 to 30 rows of 64 (one core, AVX-512, float32).
_FILLED_UP = 24


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Samples with about the same number of query rows to compute.

    Attributes:
        samples: int64 [G], ascending.
        queries: int64 [G, k], rows of each, no row twice; those that are to be computed come first.
        counts: int64 [G], how many those are. The others fill up, and count as rows whose dO is zero.
    """

    samples: Tensor
    queries: Tensor
    counts: Tensor

    @property
    def index(self) -> tuple[Tensor, Tensor]:
        """Of the rows, in a tensor [B, T, …]."""
        return self.samples.unsqueeze(1), self.queries

    @property
    def filled_up(self) -> Tensor:
        """Which of the rows only fill up: bool [G, k]."""
        return torch.arange(self.queries.shape[1], device=self.counts.device) >= self.counts.unsqueeze(1)


def groups(chosen: Tensor) -> list[Group]:
    """Sort samples into groups, by the number of their chosen rows; those with none are in no group.

    Args:
        chosen: bool [B, T].
    """
    counts = chosen.sum(1).tolist()
    chosen_first = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    waiting = sorted((i for i, count in enumerate(counts) if count), key=lambda i: -counts[i])
    found = []
    while waiting:
        most = counts[waiting[0]]
        size = sum(counts[i] >= most - max(_FILLED_UP, most // 4) for i in waiting)
        taken = sorted(waiting[:size])
        samples, rows = (torch.tensor(x, device=chosen.device) for x in (taken, [counts[i] for i in taken]))
        found.append(Group(samples, chosen_first[samples, :most], rows))
        waiting = waiting[size:]
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class WrittenOut:
    """An attention with its probabilities: A, before dropout, and A' (``dropped``), after it; A may be None
    where they are the same. H is that of Q everywhere."""

    q: Tensor
    k: Tensor
    v: Tensor
    dropped: Tensor
    probabilities: Tensor | None
    scale: float


class Forward(Protocol):
    """What the forward of an attention left, in one of the forms that it has in a graph."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, T, D)."""

    @property
    def keys(self) -> int:
        """U."""

    @property
    def stored(self) -> bool:
        """Whether the probabilities are at hand, or have to be computed again."""

    def backward(self, do: Tensor) -> Gradients:
        """All rows."""

    def backward_of_rows(self, do: Tensor, groups: Sequence[Group]) -> Gradients:
        """The query rows in the groups alone. The dQ of all others is zero."""

    def written_out(self) -> WrittenOut:
        """The probabilities in full."""

    def like_gradients(self, gradients: Gradients) -> Gradients:
        """The gradients of :meth:`written_out`, in the sizes and layout of this form's own."""
