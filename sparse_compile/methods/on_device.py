"""Choosing rows without telling the host how many: the forms of ``reuse.rows`` and ``sample.rows`` for a GPU.

The number of rows that are alive is known to the device alone, and to ask for it is to wait for everything
that was queued before. So the buffer of kept rows has a fixed size k, the live ones come first in it, and a
count beside it says how many those are. What fills the rest are rows that are zero: whoever multiplies them
all the same adds nothing. The results are those of the other forms, row for row.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from sparse_compile.methods.rows import Rows, number_kept
from sparse_compile.methods.sample import Draw


def largest(scores: Tensor, live: Tensor, keep: float, base: Tensor) -> Rows:
    """The round(keep · N) live rows with the largest score; the other live ones are dropped. See
    :func:`reuse.rows`.

    Args:
        scores: [N], none negative: squared norms of the residual, say. A NaN counts as the largest.
        live: bool [N], the rows of dY that are not zero.
        keep: share of the N rows that is computed.
        base: P, [T, O].
    """
    if len(scores) == 0:
        return _no_rows(live, base)
    k = number_kept(keep, len(scores))
    kept = torch.where(live, scores, -1.0).topk(k, sorted=False).indices
    kept = _live_first(kept, live)
    dropped = live.index_fill(0, kept, False)
    return Rows(kept, base=base, dropped=dropped, count=_at_most(k, live.sum()))


def drawn(scores: Tensor, k: int, clip: float | None, draw: Draw) -> Rows:
    """k rows drawn at random; see :func:`sample.rows`.

    Scores that are not finite have no probabilities. Every weight is then NaN, and so are both gradients:
    what is not finite must reach them, for a GradScaler to see.
    """
    n = len(scores)
    s = scores.double()
    if n == 0:
        return dataclasses.replace(_no_rows(s != 0), scale=scores)
    alive = s.count_nonzero()
    few = alive <= k
    descending, by_score = s.sort(descending=True)

    p = _probabilities(s, descending, k)
    order = _to_device(draw.order(n), scores.device)
    line = p[order].cumsum(0)
    readings = (torch.arange(k, dtype=p.dtype, device=p.device) + draw.start()) * (line[-1] / k)
    # What is not finite leads nowhere; any row will do then.
    place = torch.searchsorted(line, readings, right=True).clamp_(max=n - 1)
    kept = _live_first(torch.where(few, by_score[:k], order[place]), s != 0)

    weight = torch.where(few, torch.ones_like(p), 1 / p)[kept].clamp_(max=math.inf if clip is None else clip)
    weight = torch.where(s[kept] != 0, weight, torch.zeros_like(weight))
    weight = torch.where(s.sum().isfinite(), weight, torch.full_like(weight, torch.nan))
    return Rows(kept, scale=weight.to(scores.dtype), count=_at_most(k, alive))


def _probabilities(s: Tensor, descending: Tensor, k: int) -> Tensor:
    """:func:`sample.probabilities` of scores of which more than k are above zero."""
    rest = descending.flip(0).cumsum(0).flip(0)
    room = k - torch.arange(len(s), dtype=s.dtype, device=s.device)
    certain = (room * descending <= rest).to(torch.uint8).argmax(0, keepdim=True)
    rate = room.gather(0, certain) / rest.gather(0, certain)
    return torch.where(certain >= k, (s >= descending[k - 1]).double(), (s * rate).clamp_(max=1.0))


def _no_rows(live: Tensor, base: Tensor | None = None) -> Rows:
    """Of none: those of an expert without tokens."""
    kept = torch.empty(0, dtype=torch.int64, device=live.device)
    count = torch.zeros(1, dtype=torch.int32, device=live.device)
    return Rows(kept, base=base, dropped=None if base is None else live, count=count)


def _live_first(kept: Tensor, live: Tensor) -> Tensor:
    """``kept``, ascending, those that are not live behind the others."""
    n = len(live)
    return torch.where(live[kept], kept, kept + n).sort().values % n


def _at_most(k: int, alive: Tensor) -> Tensor:
    return alive.clamp(max=k).to(torch.int32).view(1)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for, which it would for memory that is not pinned."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
