"""Estimates of dY whose products are cheap: of few distinct rows, or pruned to a pattern that a GPU knows."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Ŷ [N, O], an estimate of dY, given by which of its rows are computed and what the others are.

    Row i of Ŷ is dY_i, times its ``scale``, where i is in ``kept``; base_t with t = i mod T where
    ``dropped[i]``; else zero.

    Attributes:
        kept: int64 [k], or int32 on a GPU, ascending, no index twice.
        base: [T, O], or None if the other rows are all zero.
        dropped: bool [N], or None together with ``base``.
        scale: what the kept rows are multiplied by, [k], or None: nothing.
        count: int32 [1], or None: all of ``kept`` count. With a count, only its first ``count`` entries do,
            and are ascending. The others fill a buffer of a fixed size, so that the host need not know the
            number: rows that are zero, with scale 0, or, where it is ``padded``, anything.
        slot: int64 [N], which of [kept rows; base rows] row i of Ŷ is, or N − 1 if it is zero; None if nobody
            has counted.
        padded: whether most of ``kept`` may be beyond the count: a buffer for all rows that are not zero.
    """

    kept: Tensor
    base: Tensor | None = None
    dropped: Tensor | None = None
    scale: Tensor | None = None
    count: Tensor | None = None
    slot: Tensor | None = None
    padded: bool = False

    @property
    def computed(self) -> int:
        """The number of rows that take part in the products; with a ``count``, the most that may."""
        return self.kept.numel() + (0 if self.base is None else self.base.shape[0])

    @property
    def exact(self) -> bool:
        """Whether nothing was dropped but what adds nothing. (Rows drawn at random have a scale, and those
        that reuse chooses a base.)"""
        return self.base is None and self.scale is None

    def dense(self, dy: Tensor) -> Tensor:
        """Ŷ written out, [N, O]."""
        estimate = torch.zeros_like(dy)
        if self.base is not None and self.dropped is not None:
            tiled = self.base.expand(dy.shape[0] // self.base.shape[0], *self.base.shape).reshape(dy.shape)
            estimate = torch.where(self.dropped.unsqueeze(1), tiled, estimate)
        kept = dy.index_select(0, self.kept)
        if self.scale is not None:
            kept = (kept * self.scale.unsqueeze(1)).to(dy.dtype)
        return estimate.index_copy_(0, self.kept.long(), kept)


def number_kept(keep: float, total: int) -> int:
    """How many of ``total`` rows or entries a share is: the nearest number, but at least one."""
    return max(1, round(keep * total))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums and norms of values of this dtype are added up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True, slots=True)
class Neighbours:
    """Ŷ = S + P, where S keeps n of every four neighbours of dY − P; zero in the rows in which dY is.

    Attributes:
        residual: S, [N, O], pruned along the features; or, ``transposed``, [O, N], pruned along the rows.
        base: P, [T, O].
        live: bool [N], the rows of dY that are not zero.
        transposed: which of the two.
    """

    residual: Tensor
    base: Tensor
    live: Tensor
    transposed: bool

    @property
    def kept(self) -> Tensor:
        """S, [N, O]."""
        return self.residual.t() if self.transposed else self.residual

    def dense(self) -> Tensor:
        """Ŷ written out, [N, O]."""
        samples = self.kept.reshape(-1, *self.base.shape)
        alive = self.live.view(-1, len(self.base), 1)
        return torch.where(alive, samples + self.base, 0.0).view(self.kept.shape)


# An estimate of dY: few distinct rows, n of four neighbours, or written out, [N, O].
Estimate = Rows | Neighbours | Tensor


def written(estimate: Estimate) -> Rows | Tensor:
    """An estimate as ATen's products take it."""
    return estimate.dense() if isinstance(estimate, Neighbours) else estimate
