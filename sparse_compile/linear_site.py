"""A linear layer while it trains: picks the method, estimates dY by it, and runs the two products."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from sparse_compile.kernels import linear as kernel
from sparse_compile.memory import Memory, Use
from sparse_compile.methods import exact, reuse, sample
from sparse_compile.methods.rows import Rows
from sparse_compile.phases import parse_n_m
from sparse_compile.schedule import Phase
from sparse_compile.settings.adaptive import Adaptive
from sparse_compile.settings.reuse import Reuse
from sparse_compile.settings.sample import Sample
from sparse_compile.site import Site

# Estimates of dY, the one that dX and the one that dW is computed from: a few rows, or written out.
Estimate = Rows | Tensor
Estimates = tuple[Estimate, Estimate]

# Beyond this share of the rows, writing the estimate out and multiplying it whole is as cheap.
_DENSE_SHARE = 0.9


class LinearSite(Site):
    """The backward of one linear layer; see :class:`Site`. Its shape is (N, I, O)."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        self._memory = Memory()
        self._draws = 0

    def linear_backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        w: Tensor | None,
        *,
        tokens: int,
        dw_transposed: bool,
        phase: Phase | None,
        use: Use = (0, 0),
    ) -> tuple[kernel.DistinctRows | None, Tensor | None]:
        """(dX, dW) of a linear; None for the one that is not asked for. dX comes as its distinct rows.

        Args:
            dy: [N, O].
            x: [N, I], or None: no dW.
            w: [O, I], or None: no dX.
            tokens: T, rows per sample.
            dw_transposed: return dW as [I, O].
            phase: what the schedule says of this step; None is exact.
            use: whose base it is.
        """
        (n, outputs), inputs = dy.shape, next(t.shape[1] for t in (x, w) if t is not None)
        self.shape = (n, inputs, outputs)
        measured = phase is not None and self.controller.measures(phase.step) and not self.left_alone
        method = None if phase is None or measured or self.held_back else phase.linear
        zero: int
        estimates: Estimates
        if self.left_alone:
            self.method = "dense"
            zero, estimates = 0, (dy, dy)
        elif method is None or self._share(method) == 1.0:
            self.method = "exact"
            zero, estimates = self._skip_zero_rows(dy, exact.live_rows(dy))
        elif isinstance(method, Reuse):
            self.method = method.method
            zero, estimates = self._reuse(dy, tokens, method, use)
        else:
            self.method = method.method
            zero, estimates = self._sample(dy, x, method, use)
        for_dx, for_dw = estimates
        self._count(zero, None if w is None else for_dx, None if x is None else for_dw)
        dx = dw = None
        compact = None
        if w is not None:
            if isinstance(for_dx, Rows):
                compact = kernel.gather(dy, for_dx)
                dx = kernel.input_gradient_of_rows(compact, w, for_dx, n)
            else:
                dx = kernel.input_gradient(for_dx, w)
        if x is not None:
            if isinstance(for_dw, Rows):
                if compact is None or for_dw is not for_dx:
                    compact = kernel.gather(dy, for_dw)
                dw = kernel.weight_gradient_of_rows(compact, x, for_dw, transposed=dw_transposed)
            else:
                dw = kernel.weight_gradient(for_dw, x, transposed=dw_transposed)
        if measured and x is not None and dw is not None:
            self.controller.observe_rows(self.name, dy, x, dw, tokens)
        return dx, dw

    def keep(self, phase: Phase) -> float:
        method = phase.linear
        return 1.0 if method is None or self.left_alone or self.held_back else round(self._share(method), 6)

    def _share(self, method: Reuse | Sample | Adaptive) -> float:
        """The share that a method keeps at this step; an adaptive one's is of the rows that are not zero."""
        if isinstance(method, Adaptive):
            return self.controller.row_share(self.name)
        return cast(float, method.keep)

    def _skip_zero_rows(self, dy: Tensor, live: Tensor | None) -> tuple[int, Estimates]:
        """The number of rows skipped as zero, and dY without them."""
        if live is None:
            return 0, (dy, dy)
        n, inputs, outputs = self.shape
        zero = n - int(live.sum())
        if not exact.skip_pays(zero, n, inputs, outputs):
            return 0, (dy, dy)
        rows = exact.rows(live)
        return zero, (rows, rows)

    def _reuse(self, dy: Tensor, tokens: int, method: Reuse, use: Use) -> tuple[int, Estimates]:
        """Estimate dY by reuse, and remember it as the schedule says."""
        live = exact.live_rows(dy)
        base = self._memory.recall(use, dy, tokens)
        if base is None:
            zero, estimates = self._skip_zero_rows(dy, live)
        else:
            zero = 0 if live is None else len(dy) - int(live.sum())
            estimates = _reuse_estimates(dy, base, method, live)
        self._memory.renew(
            use,
            dy,
            tokens,
            source=method.source,
            every=method.refresh_every,
            recalled=base is not None,
            seed=f"{self.seed}/{self.name}",
        )
        return zero, estimates

    def _sample(
        self, dy: Tensor, x: Tensor | None, method: Sample | Adaptive, use: Use
    ) -> tuple[int, Estimates]:
        """Estimate dY by rows drawn at random, once for dX and once for dW."""
        norms = torch.linalg.vector_norm(dy, dim=1, dtype=sample.wide(dy.dtype))
        if not bool(norms.sum().isfinite()):  # what is not finite must reach the gradient whole
            return 0, (dy, dy)
        live = int(norms.count_nonzero())
        draw = sample.Draw(f"{self.seed}/{self.name}/{use}/{self._draws}")
        self._draws += 1
        if isinstance(method, Adaptive):
            k, gradients, clip = sample.count(self._share(method), live), "weight", None
        else:
            k, gradients, clip = sample.count(self._share(method), len(dy)), method.gradients, method.clip
        for_dx = for_dw = None
        if gradients != "weight":
            for_dx = sample.rows(norms, k, clip, draw)
        if gradients != "input" and x is not None:
            scores = norms * torch.linalg.vector_norm(x, dim=1, dtype=norms.dtype)
            for_dw = sample.rows(scores, k, clip, draw)
        zero = len(dy) - live
        if for_dx is None or for_dw is None:  # a product that is not sampled, or not asked for
            _, (exactly, _) = self._skip_zero_rows(dy, exact.live_rows(dy) if zero else None)
            return zero, (exactly if for_dx is None else for_dx, exactly if for_dw is None else for_dw)
        return zero, (for_dx, for_dw)

    def _count(self, zero: int, for_dx: Estimate | None, for_dw: Estimate | None) -> None:
        n, inputs, outputs = self.shape
        computed = [
            estimate.computed if isinstance(estimate, Rows) else n
            for estimate in (for_dx, for_dw)
            if estimate is not None
        ]
        self.counters.backwards += 1
        self.counters.rows += n
        self.counters.rows_zero += zero
        self.counters.rows_computed += max(computed)
        self.counters.flops_forward += 2 * n * outputs * inputs
        self.counters.flops_backward_dense += 2 * n * outputs * inputs * len(computed)
        self.counters.flops_backward += 2 * sum(computed) * outputs * inputs

    def forget(self) -> None:
        self._memory.clear()

    def state_dict(self) -> dict[str, Any]:
        return {**self._memory.state_dict(), "draws": self._draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memory.load_state_dict(state)
        self._draws = state.get("draws", 0)


def _reuse_estimates(dy: Tensor, base: Tensor, method: Reuse, live: Tensor | None) -> Estimates:
    ratio = method.phases[0][0]
    if method.granularity == "element":
        estimate = reuse.elements(dy, base, method.keep, live)
        return estimate, estimate
    if isinstance(ratio, str):
        n, m = parse_n_m(ratio)
        return (
            reuse.n_of_m(dy, base, n, m, live, dim=1),
            reuse.n_of_m(dy, base, n, m, live, dim=0),
        )
    rows = reuse.rows(dy, base, method.keep, live)
    if rows.computed > _DENSE_SHARE * len(dy):
        estimate = rows.dense(dy)
        return estimate, estimate
    return rows, rows
