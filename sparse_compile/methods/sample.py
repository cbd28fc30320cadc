"""Sampling: a few rows of dY, drawn at random and scaled up, so that on average nothing is missing.

    s_i            how much row i matters: ‖dY_i‖ for dX, ‖dY_i‖ · ‖X_i‖ for dW (leverage score)
    p_i ∝ s_i      capped at 1, with Σ p_i = k: the probability that row i is drawn
    Ŷ_i = dY_i / p_i  if it was drawn, else 0          so that E[Ŷ] = dY

Source: VCAS (Wang et al., ICLR 2024, section 4), where rows are drawn by independent coin flips. Here the
design is *randomised systematic sampling* (Hartley and Rao, 1962): the rows are put in random order, their
p_i laid end to end on a line of length k, and the line is read at u, u + 1, … u + k − 1 with one u from
[0, 1). Each row is drawn with exactly its p_i, and always exactly k rows are: shapes are static, and the
part of the variance that comes from a varying number of rows is gone. The random order matters: in the
order of the tokens, equal probabilities would take every 1/p-th token, the same ones of each sample.

``clip`` caps the weights 1 / p_i at c. At c = 1 the drawn rows stand for themselves alone (biased, but
no row is ever blown up); no cap is unbiased.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random

import torch
from torch import Tensor

from sparse_compile.methods.rows import Rows

_GOLDEN, _WORD = 0x9E3779B97F4A7C15, (1 << 64) - 1


@functools.lru_cache(maxsize=4096)
def _key(seed: str) -> int:
    return int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "little")


def _mixed(number: int) -> int:
    """64 bits of ``number``, each of which depends on all of them (SplitMix64; Steele, Lea and Flood, 2014).
    To seed a Mersenne Twister takes the host 20 µs; a step has two such numbers for every draw."""
    number &= _WORD
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _WORD
    return number ^ number >> 31


class Draw:
    """The random numbers of one draw; equal seeds give equal ones. (A GPU computes its own order: see
    ``kernels/triton/draw.py``.)

    Args:
        seed: of a site, say.
        turn: which of the draws with this seed it is.
    """

    def __init__(self, seed: str, turn: int | None = None) -> None:
        self._seed, self._turn = seed, turn
        self._numbers = 0

    @functools.cached_property
    def _random(self) -> random.Random:
        return random.Random(self._seed if self._turn is None else f"{self._seed}/{self._turn}")

    def number(self) -> int:
        """Uniform in [0, 2³¹), for a kernel."""
        self._numbers += 1
        return _mixed(_key(self._seed) + _GOLDEN * ((self._turn or 0) << 8 | self._numbers)) >> 33

    def start(self) -> float:
        """u, uniform in [0, 1)."""
        return self._random.random()

    def order(self, n: int) -> Tensor:
        """A random permutation of 0 … n − 1, int64 on CPU."""
        return torch.randperm(n, generator=torch.Generator().manual_seed(self._random.getrandbits(60)))


def probabilities(scores: Tensor, k: int) -> Tensor:
    """p_i = min(1, λ · s_i) with λ such that Σ p_i = k.

    Args:
        scores: s, [N], none negative.
        k: how many rows are to be drawn. If no more than k scores are above zero, those get p = 1.

    Returns:
        float64 [N]; zero exactly where the score is.
    """
    s = scores.double()
    descending = s.sort(descending=True).values
    # With the m largest at 1, the others share k − m in proportion to their scores: λ = (k − m) / rest(m).
    # The right m is the first at which the largest of the others stays below 1.
    rest = descending.flip(0).cumsum(0).flip(0)
    room = k - torch.arange(len(s), dtype=s.dtype, device=s.device)
    fits = room * descending <= rest
    certain = int(fits.to(torch.uint8).argmax()) if bool(fits.any()) else len(s)
    if certain >= min(k, len(s)) or rest[certain] == 0:  # nothing is left to chance
        return (s >= descending[min(k, len(s)) - 1]).double() * (s > 0)
    return (s * (room[certain] / rest[certain])).clamp_(max=1.0)


def systematic(p: Tensor, k: int, draw: Draw) -> Tensor:
    """Draw k rows, each with its own probability.

    Args:
        p: float64 [N], at most 1 each, with Σ p = k.

    Returns:
        int64 [k], ascending; a row whose p is zero is never among them.
    """
    order = draw.order(len(p)).to(p.device)
    line = p[order].cumsum(0)
    # Rounding must not push the last reading past the end of the line.
    readings = (torch.arange(k, dtype=p.dtype, device=p.device) + draw.start()) * (line[-1] / k)
    return order[torch.searchsorted(line, readings, right=True)].sort().values


def rows(scores: Tensor, k: int, clip: float | None, draw: Draw) -> Rows:
    """Ŷ, with k rows of dY, or all that have a score if those are no more.

    Args:
        scores: s, [N], finite.
        k: how many rows are drawn, at least 1.
        clip: cap on the weights 1 / p_i, or None.
    """
    if int(scores.count_nonzero()) <= k:
        return Rows(kept=scores.nonzero().squeeze(1))
    p = probabilities(scores, k)
    kept = systematic(p, k, draw)
    return Rows(kept, scale=(1 / p[kept]).clamp_(max=math.inf if clip is None else clip))
