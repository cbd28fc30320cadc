"""One compiled graph as one model runs it, and its forwards that are in flight."""

from __future__ import annotations

import dataclasses

from sparse_compile.carried import Carried
from sparse_compile.linear_site import LinearSite
from sparse_compile.planner import Planner
from sparse_compile.site import Site
from sparse_compile.sites import SiteRecord

LANES = 16  # what is remembered for each is kept


@dataclasses.dataclass(slots=True)
class Lanes:
    """The forwards in flight of the same layers, through whichever of their graphs (there is one for each
    kind of input).

    Attributes:
        first: the lowest number.
    """

    first: int = 0
    taken: dict[int, None] = dataclasses.field(default_factory=dict)  # the longest taken first
    step: int = 0
    graph: int | None = None  # that ran last

    def open(self, step: int) -> int:
        """The lowest free lane. Forwards of earlier steps that never saw a backward give theirs back, and so
        does the one that has waited longest where none is free: a validation without no_grad, or activation
        checkpointing, has many that never see one."""
        if step != self.step:
            self.taken.clear()
            self.step = step
        lane = self.next(step)
        self.taken.pop(lane, None)
        self.taken[lane] = None
        return lane

    def next(self, step: int) -> int:
        """The lane that a forward would be given."""
        taken = self.taken if step == self.step else {}
        free = (lane for lane in range(self.first, self.first + LANES) if lane not in taken)
        return next(free, next(iter(taken), self.first))


@dataclasses.dataclass(frozen=True, slots=True)
class RunningGraph:
    """One compiled graph as one model runs it, with its sites by number."""

    records: list[SiteRecord]
    sites: list[Site]
    lanes: Lanes
    planner: Planner
    carried: dict[tuple[int, ...], Carried] = dataclasses.field(default_factory=dict)

    def count_carried(self, numbers: tuple[int, ...], rows: int, total: int) -> None:
        """A backward of so many rows, of the ``total``, of the linears with these numbers."""
        if numbers not in self.carried:
            linears = [(self.sites[i], self.records[i]) for i in numbers]
            self.carried[numbers] = Carried(
                [(site, record) for site, record in linears if isinstance(site, LinearSite)]
            )
        self.carried[numbers].count(rows, total)

    def share_carried(self) -> float | None:
        """The share of its rows that it has carried since this was last asked; None if it carried none."""
        shares = [each.share() for each in self.carried.values()]
        return max((share for share in shares if share is not None), default=None)
