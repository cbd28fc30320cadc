"""VCAS in plain eager PyTorch, written from the paper (Wang et al., ICLR 2024). Of ours it takes the drawing
itself alone, `sample.systematic`, so that both draw the same.

Algorithm 1: M batches give M gradients, and each batch M more with only the samples drawn (SampleA):

    V_s   = 1 / (M − 1) · Σ_i ‖G_i − mean‖²                                SGD
    V_act = 1 / M² · Σ_i Σ_j ‖G_ij − G_i‖²                                 dropping samples
    V_w   = 1 / M² · Σ_i Σ_j (Σ_rows (1 − q) / q · ‖dY_row‖² ‖X_row‖²)     drawing rows, equation 3
    s    ← s + α · sign(V_act − τ_act · V_s)
    p_l   = the smallest n / N such that the n largest norms behind block l sum to s of all of them
    ρ_l   = max_{j ≤ l} p_j
    ν_l  ← ν_l · β^sign(τ_w · V_s,l − V_w,l)

Lists and loops where they read like the formula; nothing here is fast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_compile.methods import sample


def share_of_norm(norms: list[float], s: float) -> float:
    """p: the smallest n / N, n from 1, with which the n largest norms sum to s of all."""
    descending = sorted(norms, reverse=True)
    for n in range(1, len(norms) + 1):
        if sum(descending[:n]) >= s * sum(descending):
            return n / len(norms)
    return 1.0


def keep_probabilities(scores: list[float], k: int) -> list[float]:
    """min(1, λ · score) with Σ = k, or 1 for all that have a score if those are no more than k.

    The paper's rule for both kinds of sampling: what would have more than 1 gets 1, and the others share the
    rest.
    """
    p = [1.0 if score > 0 else 0.0 for score in scores]
    certain: set[int] = {i for i, score in enumerate(scores) if score == 0}
    room = k
    if sum(p) <= k:
        return p
    while True:
        others = [i for i in range(len(scores)) if i not in certain]
        total = sum(scores[i] for i in others)
        over = [i for i in others if room * scores[i] >= total]
        if not over:
            return [p[i] if i in certain else room * scores[i] / total for i in range(len(scores))]
        certain.update(over)
        room -= len(over)


@dataclasses.dataclass
class Paper:
    """The state of algorithm 1 between two measurements, one entry of ``rho`` for each block, first to last.

    The moving average is the published code's: ρ ← smoothing · ρ + (1 − smoothing) · new.
    """

    rho: list[float]
    nu: dict[str, float]
    s: float = 1.0
    act_tau: float = 0.025
    weight_tau: float = 0.025
    alpha: float = 0.01
    beta: float = 0.95
    smoothing: float = 0.6

    def update_samples(self, v_act: float, v_sgd: float, norms: list[list[float]]) -> None:
        """``norms``: for each block, first to last, the gradient norm of every sample behind it."""
        self.s += self.alpha if v_act > self.act_tau * v_sgd else -self.alpha
        self.s = min(1.0, max(0.0, self.s))
        largest = 0.0
        for block, of_block in enumerate(norms):
            largest = max(largest, share_of_norm(of_block, self.s))
            self.rho[block] = self.smoothing * self.rho[block] + (1 - self.smoothing) * largest

    def update_rows(self, name: str, v_rows: float, v_sgd: float) -> None:
        more = v_rows > self.weight_tau * v_sgd
        self.nu[name] = min(1.0, self.nu[name] / self.beta) if more else self.nu[name] * self.beta


def variance_of_rows(dy: Tensor, x: Tensor, q: list[float]) -> float:
    """Equation 3: what independent coin flips with probabilities q add to dYᵀ · X."""
    total = 0.0
    for row in range(len(dy)):
        if 0 < q[row] < 1:
            total += (1 - q[row]) / q[row] * float(torch.outer(dy[row], x[row]).square().sum())
    return total


def error_of_capped_rows(dy: Tensor, x: Tensor, q: list[float], cap: float) -> float:
    """E‖Ĝ − dYᵀ · X‖² of independent coin flips with probabilities q, where a drawn row counts min(1/q, cap)
    times: the variance of each row, and what is missing on average of all of them together."""
    variance, missing = 0.0, torch.zeros(dy.shape[1], x.shape[1], dtype=dy.dtype)
    for row in range(len(dy)):
        if q[row] > 0:
            g, weight = torch.outer(dy[row], x[row]), min(1 / q[row], cap)
            variance += q[row] * (1 - q[row]) * weight**2 * float(g.square().sum())
            missing += (1 - q[row] * weight) * g
    return variance + float(missing.square().sum())


def variance_of_batches(gradients: list[Tensor]) -> float:
    """What the gradients g_b of B samples say of the variance of their sum over batches."""
    batch = len(gradients)
    mean = sum(gradients[1:], gradients[0]) / batch
    one = sum(float((g - mean).square().sum()) for g in gradients) / (batch - 1)
    return batch * one


def variance_of_fixed_size(gradients: list[Tensor], p: list[float]) -> float:
    """Hájek's: what drawing Σ p of the items, never more nor fewer, adds to the sum of their gradients.

    Each is compared with what all of them share, Σ (1 − p) g / Σ p (1 − p), times its p.
    """
    drawn = [(g, q) for g, q in zip(gradients, p, strict=True) if 0 < q < 1]
    if not drawn:
        return 0.0
    spread = sum(q * (1 - q) for _, q in drawn)
    common = sum(((1 - q) * g for g, q in drawn), torch.zeros_like(gradients[0])) / spread
    return sum((1 - q) / q * float((g - q * common).square().sum()) for g, q in drawn)


class SampledBoundary(torch.autograd.Function):
    """SampleA: in the backward, draw samples by their norms, and remember the norms."""

    @staticmethod
    def forward(ctx, h, seen, name, share, draw):
        ctx.settings = seen, name, share, draw
        return h.clone()

    @staticmethod
    def backward(ctx, dh):
        seen, name, share, draw = ctx.settings
        norms = dh.flatten(1).norm(dim=1)
        seen[name] = norms.tolist()
        k = max(1, round(share * len(dh)))
        p = torch.tensor(keep_probabilities(norms.tolist(), k), dtype=torch.float64)
        if draw is None or bool(((p == 0) | (p == 1)).all()):
            return dh, None, None, None, None
        weights = torch.zeros(len(dh), dtype=dh.dtype)
        kept = sample.systematic(p, k, draw)
        weights[kept] = 1 / p[kept].to(dh.dtype)
        return dh * weights.view(-1, *[1] * (dh.dim() - 1)), None, None, None, None


class Blocks(nn.Module):
    """Two blocks, [B, T, 6] to [B, T, 6], without biases, so that the linears hold all of the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ToyBlock(), ToyBlock()])

    def forward(self, x: Tensor, boundary: Callable[[Tensor, str], Tensor] | None = None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if boundary is not None:
                x = boundary(x, f"blocks.{i}")
        return x


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9, bias=False), nn.Linear(9, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def gradients(
    model: Blocks,
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    rho: list[float],
    draw: sample.Draw | None,
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """The gradient of every parameter with samples drawn at every boundary, or the exact one without a draw;
    and the norms of the samples there."""
    seen: dict[str, list[float]] = {}

    def boundary(h: Tensor, name: str) -> Tensor:
        share = rho[int(name.rpartition(".")[2])]
        return SampledBoundary.apply(h, seen, name, share, draw)

    found = torch.autograd.grad(loss(model(x, boundary)), list(model.parameters()))
    return dict(zip((name for name, _ in model.named_parameters()), found, strict=True)), seen


def probe(
    model: Blocks,
    loss: Callable[[Tensor], Tensor],
    batches: list[Tensor],
    rho: list[float],
    draws: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """(V_s, V_act) of every parameter: the paper's Monte-Carlo probing, M batches and ``draws`` of each."""
    exact = [gradients(model, loss, x, rho, None)[0] for x in batches]
    v_sgd, v_act = {}, {}
    for name in exact[0]:
        stacked = torch.stack([each[name] for each in exact])
        v_sgd[name] = float((stacked - stacked.mean(0)).square().sum() / (len(batches) - 1))
        v_act[name] = 0.0
    for i, x in enumerate(batches):
        for j in range(draws):
            drawn, _ = gradients(model, loss, x, rho, sample.Draw(f"{i} {j}"))
            for name, gradient in drawn.items():
                v_act[name] += float((gradient - exact[i][name]).square().sum()) / (len(batches) * draws)
    return v_sgd, v_act
