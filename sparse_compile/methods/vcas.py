"""How much may be sampled: VCAS's controller, and the variances that it looks at.

Variance of a gradient G = Σ_b g_b, per-sample gradients g_b = dY_bᵀ · X_b, all summed over the entries of G:

    of SGD           B / (B − 1) · (Σ_b ‖g_b‖² − ‖G‖² / B)
    of sampling      Σ_i (1 / p_i − 1) ‖g_i‖² − ‖Σ_i (1 − p_i) g_i‖² / Σ_i p_i (1 − p_i)

    of capped weights w_i = min(1 / p_i, c)     Σ_i p_i (1 − p_i) w_i² ‖g_i‖² + ‖Σ_i (1 − p_i w_i) g_i‖²

The first is that of a batch of B independent samples. The second is Hájek's approximation (1964) for designs
that always draw the same number; independent coin flips would have its first term alone. i runs over the
samples of a batch, or over the rows of dY. The third is a squared error: a cap trades variance, its first
term, for bias, its second. No extra pass through the model is needed for either:
‖g_b‖² = Σ_{t,t'} (dY_bt · dY_bt') (X_bt · X_bt'), the Gram trick, and ‖g_i‖² = ‖dY_i‖² ‖X_i‖² for a row.

Source: VCAS (Wang et al., ICLR 2024), sections 4 and 5 and algorithm 1, which estimates all of these by
extra passes, M = 2 batches and 2 draws of each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The caps among which one is chosen; no cap first.
CAPS = (math.inf, 8.0, 4.0, 2.0, 1.5)
# Columns of dY and X that are left where a bias is estimated.
_SKETCHED = 32


def sample_squares(dy: Tensor, x: Tensor) -> Tensor:
    """‖dY_bᵀ · X_b‖² of every sample, [B]; dY [B, T, O] and X [B, T, I]."""
    if dy.shape[1] == 1:
        return row_squares(dy.squeeze(1), x.squeeze(1))
    return (torch.bmm(dy, dy.mT) * torch.bmm(x, x.mT)).sum((1, 2)).clamp_(min=0)


def row_squares(dy: Tensor, x: Tensor) -> Tensor:
    """‖dY_iᵀ · X_i‖² of every row, [N]; dY [N, O] and X [N, I]."""
    return dy.square().sum(1) * x.square().sum(1)


def sgd_variance(squares: Tensor, total: float) -> float:
    """Variance of a gradient over batches.

    Args:
        squares: ‖g_b‖², [B], B > 1.
        total: ‖G‖².
    """
    batch = len(squares)
    return max(0.0, batch / (batch - 1) * (float(squares.sum()) - total / batch))


def sampling_variance(squares: Tensor, p: Tensor, dy: Tensor, x: Tensor) -> float:
    """Variance that drawing a fixed number of rows, or of samples, adds to G = dYᵀ · X.

    Args:
        squares: ‖g_i‖², [n].
        p: the probability of each, [n].
        dy: [N, O], where every N / n neighbouring rows are drawn together.
        x: [N, I].
    """
    random = p * (1 - p)
    if not bool((random > 0).any()):
        return 0.0
    missing = (1 - p).repeat_interleave(len(dy) // len(p)).to(dy).unsqueeze(1)
    common = (missing * dy).t() @ x
    return max(0.0, flips_variance(squares, p) - float(common.square().sum() / random.sum()))


def flips_variance(squares: Tensor, p: Tensor) -> float:
    """The same for independent coin flips, Σ (1 / p_i − 1) ‖g_i‖²: an upper bound that needs no products."""
    drawn = p > 0  # what has no probability has no gradient
    return float(((1 / p[drawn] - 1) * squares[drawn]).sum())


@dataclasses.dataclass(frozen=True, slots=True)
class Sketch:
    """dY and X, each multiplied by a random matrix with few columns: [N, 32]. Sums Σ_i m_i dY_iᵀ X_i are then
    found in a hundredth of the time, and their norms to about a third. (Random signs: the square of the norm
    is right on average. What has no more columns than that is left as it is, and exact.)
    """

    dy: Tensor
    x: Tensor

    @classmethod
    def of(cls, dy: Tensor, x: Tensor) -> Sketch:
        """From dY [N, O] and X [N, I]; the same matrices each time."""
        return cls(_project(dy, 0), _project(x, 1))

    def square(self, factors: Tensor) -> float:
        """‖Σ_i m_i dY_iᵀ X_i‖², with m [N]."""
        return float(((factors.to(self.dy).unsqueeze(1) * self.dy).t() @ self.x).square().sum())


def _project(matrix: Tensor, seed: int) -> Tensor:
    columns = matrix.shape[1]
    if columns <= _SKETCHED:
        return matrix
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (columns, _SKETCHED), generator=generator) * 2 - 1
    return matrix @ (signs.to(matrix) / math.sqrt(_SKETCHED))


def capped_error(squares: Tensor, p: Tensor, cap: float, sketch: Sketch) -> float:
    """Squared error of G = dYᵀ · X where drawn rows count min(1 / p, cap) times: variance, as for independent
    coin flips, and bias².

    Args:
        squares: ‖g_i‖², [N].
        p: the probability of each row, [N]; zero where it has no gradient.
        cap: c, at least 1.
        sketch: of dY and X.
    """
    weights = torch.where(p > 0, (1 / p).clamp(max=cap), 0.0)
    variance = float((p * (1 - p) * weights.square() * squares).sum())
    missing = (1 - p * weights) * (p > 0)
    return variance + (sketch.square(missing) if bool(missing.any()) else 0.0)


def share_of_norm(norms: Tensor, s: float) -> float:
    """The smallest share of the samples whose norms [B], the largest first, add up to s of the whole sum."""
    descending = norms.double().sort(descending=True).values.cumsum(0)
    below = int((descending < s * descending[-1]).sum())
    return min(below + 1, len(norms)) / len(norms)


def monotone(shares: Sequence[float]) -> list[float]:
    """Shares of the blocks from the first to the last, each raised to the largest of those before it."""
    return [max(shares[: i + 1]) for i in range(len(shares))]


def next_s(s: float, act: float, sgd: float, *, tau: float, step: float) -> float:
    """s ± alpha: up if dropping samples adds more than tau times SGD's own variance, else down."""
    return min(1.0, s + step) if act > tau * sgd else max(0.0, s - step)


def next_weight_share(share: float, weight: float, sgd: float, *, tau: float, step: float) -> float:
    """nu / beta if drawing rows adds more than tau times the layer's SGD variance, else nu · beta."""
    return min(1.0, share / step) if weight > tau * sgd else share * step
