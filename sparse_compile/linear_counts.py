"""What is counted of a linear's backwards, the share of the rows that a method computes, and its error."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from sparse_compile.kernels import linear as kernel
from sparse_compile.methods import fidelity
from sparse_compile.methods.rows import Estimate, Rows, number_kept
from sparse_compile.rotation import RotatedWeight
from sparse_compile.settings.adaptive import Adaptive
from sparse_compile.settings.reuse import Reuse
from sparse_compile.settings.sample import Sample
from sparse_compile.site import Site
from sparse_compile.telemetry import Observed, Telemetry

# Estimates of dY, the one that dX and the one that dW is computed from.
Estimates = tuple[Estimate, Estimate]


class LinearCounts(Site):
    """Its shape is (N, I, O).

    Attributes:
        rotated: where its weight gradient goes if the graph hands it over, or None.
    """

    rotated: RotatedWeight | None = None

    @staticmethod
    def layer(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[1:]

    def share(self, method: Reuse | Sample | Adaptive) -> float:
        """The share that a method keeps at this step; an adaptive one's is of the rows that are not zero."""
        if isinstance(method, Adaptive):
            return self.controller.row_share(self.name)
        return cast(float, method.keep)

    def saved(self, share: float, live: int, size: int) -> int:
        """Of so many rows that are not zero, how many an adaptive share draws; the controller is told what
        that saves. ``size``: I · O."""
        k = number_kept(share, live)
        self.controller.saved(2.0 * (live - k) * size)
        return k

    def saved_on_device(self, share: float, n: int, live: int, size: int) -> None:
        """The same of n rows, of which the device knows how many are zero, and the host how many were. For
        all n, so many are drawn that those of the zero rows have to be taken off what is counted."""
        k = self.saved(share, min(live, n), size)
        self.counters.flops_backward -= 2 * (number_kept(share, n) - k) * size

    def cap(self, method: Sample | Adaptive) -> float | None:
        """The cap on the weights of the rows that are drawn."""
        return method.clip if isinstance(method, Sample) else self.controller.cap(self.name)

    def count_forward(self, unneeded: int) -> None:
        """Take off the rows that the forward of this backward did not compute."""
        _, inputs, outputs = self.shape
        self.counters.rows_unneeded += unneeded
        self.counters.flops_forward -= 2 * unneeded * inputs * outputs

    def count(self, zero: int, computed: list[int], times: int = 1) -> None:
        """Count a backward with so many zero rows, and so many rows computed in each of its products."""
        n, inputs, outputs = self.shape
        flops = 2 * times * outputs * inputs  # of one row in one product
        self.counters.backwards += times
        self.counters.rows += times * n
        self.counters.rows_zero += times * zero
        self.counters.rows_computed += times * max(computed)
        self.counters.flops_forward_dense += n * flops
        self.counters.flops_forward += n * flops
        self.counters.flops_backward_dense += n * flops * len(computed)
        self.counters.flops_backward += sum(computed) * flops

    def _count_rotated(self, rows: int) -> None:
        """Count, in place of a dW of so many rows, the corner of the rotated one."""
        assert self.rotated is not None
        _, inputs, outputs = self.shape
        self.counters.flops_backward += self.rotated.basis.flops(rows) - 2 * rows * outputs * inputs

    def measure(self, dy: Tensor, x: Tensor | None, dw: Tensor | None, tokens: int) -> None:
        """Show the controller of adaptive sampling a backward that was exact; its arguments are those of
        `LinearSite.linear_backward`."""
        if x is None or dw is None or len(dy) == 0:
            return
        if tokens < 0:
            samples, tokens = -tokens, len(dy) // -tokens
            dy, x = kernel.by_sample(dy, samples), kernel.by_sample(x, samples)
        self.counters.flops_backward += int(self.controller.observe_rows(self.name, dy, x, dw, tokens))

    def observe(
        self,
        telemetry: Telemetry,
        dy: Tensor,
        x: Tensor | None,
        w: Tensor | None,
        estimates: Estimates,
        found: tuple[kernel.DistinctRows | None, Tensor | None],
        dw_transposed: bool,
    ) -> None:
        """Compare what was found by ``estimates`` that are not exact with the products of the whole of dY,
        which are ATen's on every device."""
        (for_dx, for_dw), (dx, dw) = estimates, found
        seen = {}
        if dx is not None and w is not None and not _is_exact(for_dx, dy):
            seen["dX"] = Observed(kernel.written_out(dx), dy @ w, fidelity.energy_kept(dy, for_dx))
        if dw is not None and x is not None and not _is_exact(for_dw, dy):
            whole = kernel.weight_gradient(dy, x, transposed=dw_transposed)
            seen["dW"] = Observed(dw, whole, fidelity.energy_kept(dy, for_dw))
        telemetry.observe(self.name, self.method, seen)


def _is_exact(estimate: Estimate, dy: Tensor) -> bool:
    return estimate.exact if isinstance(estimate, Rows) else estimate is dy
