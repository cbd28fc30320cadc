"""One layer while it trains: what it remembers of earlier gradients, and what it has saved so far."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels import linear as kernel
from sparse_compile.methods import exact, reuse
from sparse_compile.methods.rows import Rows
from sparse_compile.phases import parse_n_m
from sparse_compile.schedule import Reuse

Use = tuple[int, int]  # which use of the layer in one forward, and which of the forwards now in flight
Estimate = Rows | tuple[Tensor, Tensor]  # of dY: a few rows, or written out, once for dX and once for dW

# Beyond this share of the rows, writing the estimate out and multiplying it whole is as cheap.
_DENSE_SHARE = 0.9


@dataclasses.dataclass(slots=True)
class Base:
    """The remembered gradient, P [T, O], and how many backwards ago it was made."""

    value: Tensor
    age: int = 0


@dataclasses.dataclass(slots=True)
class Counters:
    """Sums over all backwards of a site; rows are rows of dY."""

    backwards: int = 0
    rows: int = 0
    rows_zero: int = 0
    rows_computed: int = 0
    flops_forward: int = 0
    flops_backward_dense: int = 0
    flops_backward: int = 0


class Site:
    """A layer's backward: picks the method, keeps its state, runs it, counts.

    Attributes:
        name: the layer's module path.
        left_alone: why it is to be done densely, or None.
        held_back: why a method of the schedule is not applied and only zero rows are skipped, or None.
    """

    def __init__(
        self, name: str, *, seed: int = 0, left_alone: str | None = None, held_back: str | None = None
    ) -> None:
        self.name = name
        self.left_alone = left_alone
        self.held_back = held_back
        self.shape = (0, 0, 0)  # N, O, I at the last backward
        self.method = "dense" if left_alone else "exact"
        self.counters = Counters()
        self.seed = seed
        self._bases: dict[Use, Base] = {}
        self._refreshes = 0

    def linear_backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        w: Tensor | None,
        *,
        tokens: int,
        dw_transposed: bool,
        method: Reuse | None,
        use: Use = (0, 0),
    ) -> tuple[kernel.DistinctRows | None, Tensor | None]:
        """(dX, dW) of a linear; None for the one that is not asked for. dX comes as its distinct rows.

        Args:
            dy: [N, O].
            x: [N, I], or None: no dW.
            w: [O, I], or None: no dX.
            tokens: T, rows per sample.
            dw_transposed: return dW as [I, O].
            method: what the schedule says of linears at this step; None is exact.
            use: whose base it is.
        """
        self.shape = (*dy.shape, next(t.shape[1] for t in (x, w) if t is not None))
        live = None if self.left_alone else exact.live_rows(dy)
        if self.left_alone or self.held_back:
            method = None
        if method is None or method.keep == 1.0:
            self.method = "dense" if self.left_alone else "exact"
            estimate = self._skip_zero_rows(dy, live)
        else:
            self.method = method.method
            estimate = self._reuse(dy, tokens, live, method, use)
        self._count(estimate, live, products=(x is not None) + (w is not None))
        if isinstance(estimate, Rows):
            compact = kernel.gather(dy, estimate)
            return (
                None if w is None else kernel.input_gradient_of_rows(compact, w, estimate, len(dy)),
                None
                if x is None
                else kernel.weight_gradient_of_rows(compact, x, estimate, transposed=dw_transposed),
            )
        for_dx, for_dw = estimate
        return (
            None if w is None else kernel.input_gradient(for_dx, w),
            None if x is None else kernel.weight_gradient(for_dw, x, transposed=dw_transposed),
        )

    def keep(self, method: Reuse | None) -> float:
        """The share of dY that ``method`` lets this site compute."""
        return 1.0 if method is None or self.left_alone or self.held_back else round(method.keep, 6)

    def _skip_zero_rows(self, dy: Tensor, live: Tensor | None) -> Estimate:
        n, outputs, inputs = self.shape
        if live is None or not exact.skip_pays(n - int(live.sum()), n, inputs, outputs):
            return dy, dy
        return exact.rows(live)

    def _reuse(self, dy: Tensor, tokens: int, live: Tensor | None, method: Reuse, use: Use) -> Estimate:
        """Estimate dY by reuse, and remember it as the schedule says."""
        base = self._bases.get(use)
        if base is not None and (base.value.shape[0] != tokens or len(dy) % tokens):
            base = None  # sequences of another length: there is nothing to compare with
        if base is None:
            estimate = self._skip_zero_rows(dy, live)
        else:
            base.value = base.value.to(dy)
            estimate = _reuse_estimate(dy, base.value, method, live)
            base.age += 1
        if base is None or base.age >= method.refresh_every:
            self._refresh(dy, tokens, method, use)
        return estimate

    def _refresh(self, dy: Tensor, tokens: int, method: Reuse, use: Use) -> None:
        sample = None
        if method.source == "sample":
            choice = random.Random(f"{self.seed}/{self.name}/{use}/{self._refreshes}")
            sample = choice.randrange(len(dy) // tokens)
        self._refreshes += 1
        value = reuse.next_base(dy, tokens, sample)
        # The sum is finite if all are (added up in float32: 0.04 ms where isfinite().all() takes 0.6).
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        if bool(value.sum(dtype=wide).isfinite()):
            self._bases[use] = Base(value)
        else:  # an overflow under mixed precision: the step will be skipped, and must not be remembered
            self._bases.pop(use, None)

    def _count(self, estimate: Estimate, live: Tensor | None, products: int) -> None:
        n, outputs, inputs = self.shape
        computed = estimate.computed if isinstance(estimate, Rows) else n
        zero = n - int(live.sum()) if live is not None and isinstance(estimate, Rows) else 0
        self.counters.backwards += 1
        self.counters.rows += n
        self.counters.rows_zero += zero
        self.counters.rows_computed += computed
        self.counters.flops_forward += 2 * n * outputs * inputs
        self.counters.flops_backward_dense += 2 * n * outputs * inputs * products
        self.counters.flops_backward += 2 * computed * outputs * inputs * products

    def forget(self) -> None:
        """Free the remembered gradients; the next backward is exact."""
        self._bases.clear()

    def state_dict(self) -> dict[str, Any]:
        bases = {f"{call}/{lane}": (base.value, base.age) for (call, lane), base in self._bases.items()}
        return {"bases": bases, "refreshes": self._refreshes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._refreshes = state["refreshes"]
        self._bases = {}
        for key, (value, age) in state["bases"].items():
            call, lane = key.split("/")
            self._bases[int(call), int(lane)] = Base(value.clone(), age)


def _reuse_estimate(dy: Tensor, base: Tensor, method: Reuse, live: Tensor | None) -> Estimate:
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
    return rows
