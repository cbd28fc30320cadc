"""What is counted of linears whose products, over few rows, are the graph's own; see
``passes/own_products.py``."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_compile.linear_site import LinearSite
from sparse_compile.sites import SiteRecord


class Carried:
    """Counts, for all linears of a graph at once, the rows that it carries.

    Args:
        linears: sites and records of these.
    """

    def __init__(self, linears: Sequence[tuple[LinearSite, SiteRecord]]) -> None:
        self._linears = linears
        self._backwards = self._total = self._rows = 0
        self._seen: tuple[int, int] = (0, 0)
        for site, _ in linears:
            site.carried.append(self)

    def count(self, rows: int, total: int) -> None:
        """A backward of so many rows, of the ``total`` of its batch."""
        self._backwards += 1
        self._rows += rows
        self._total += total
        seen, of = self._seen
        self._seen = seen + rows, of + total

    def share(self) -> float | None:
        """The share of the rows that was carried since this was last asked; None if there was no backward."""
        (seen, of), self._seen = self._seen, (0, 0)
        return seen / of if of else None

    def settle(self) -> None:
        """Bring what was counted into the counters of the sites."""
        if not self._backwards:
            return
        for site, record in self._linears:
            _, inputs, outputs = record.shape
            left_out, products = self._total - self._rows, record.flops_backward // record.flops_forward
            site.shape = (self._total, inputs, outputs)  # as one backward of all of them
            site.count(left_out, [self._rows] * products)
            site.count_forward(left_out)
            site.counters.backwards += self._backwards - 1
            site.shape = (self._total // self._backwards, inputs, outputs)
        self._backwards = self._total = self._rows = 0
