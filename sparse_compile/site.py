"""What every kind of site has: a name, a method, and the sums that the report is made of.

The kinds are in files of their own: ``linear_site.py``, ``attention_site.py``, ``block_site.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sparse_compile.controller import Controller
from sparse_compile.plan import NotPlanned, Planned
from sparse_compile.schedule import Phase, Schedule
from sparse_compile.settings.reuse import Reuse
from sparse_compile.telemetry import Telemetry

NOTHING_TO_REUSE = (
    "nothing to reuse, so steps are exact: the batch of the step before had another size. "
    "Pad to a fixed length, and take as many samples each time."
)


@dataclasses.dataclass(slots=True)
class Counters:
    """Sums over all backwards of a site; rows are rows of the output gradient, and those ``rows_unneeded`` of
    the output that were not computed."""

    backwards: int = 0
    rows: int = 0
    rows_zero: int = 0
    rows_computed: int = 0
    rows_unneeded: int = 0
    flops_forward_dense: int = 0
    flops_forward: int = 0
    flops_backward_dense: int = 0
    flops_backward: int = 0


class Site:
    """One matched place of a model while it trains.

    Attributes:
        name: the layer's module path.
        left_alone: why it is to be done densely, or None.
        held_back: why a method of the schedule is not applied and only zero rows are skipped, or None.
        controller: the backend's, which knows the shares of adaptive sampling.
        telemetry: the backend's, or None: nothing is measured.
        block: (index, count) of the repeated block of the model that it is in, or None.
        shape: as the report gives it, at the last backward; empty before the first.
        method: that of the last backward.
        kernel: what its products ran on, where there was a choice (on a GPU).
        planned: what it does on a GPU where that is decided ahead.
    """

    def __init__(
        self,
        name: str,
        *,
        seed: int = 0,
        left_alone: str | None = None,
        held_back: str | None = None,
        block: tuple[int, int] | None = None,
        controller: Controller | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.name = name
        self.seed = seed
        self.left_alone = left_alone
        self.held_back = held_back
        self.block = block
        self.controller = controller or Controller(Schedule.exact())
        self.telemetry = telemetry
        self.shape: tuple[int, ...] = ()
        self.method = "dense" if left_alone else "exact"
        self.kernel = ""
        self.counters = Counters()
        self.planned: Planned = NotPlanned()
        # Backwards in succession that found what is of batches of another size, by use.
        self._missed: dict[tuple[int, int], int] = {}

    @staticmethod
    def layer(shape: tuple[int, ...]) -> tuple[int, ...]:
        """Those sizes of a shape that are the layer's, and no batch's; empty if it has none."""
        return ()

    @property
    def density(self) -> float:
        """The share of the weight's entries that a step updates."""
        return 1.0

    def keep(self, phase: Phase) -> float:
        """The share of the output gradient that ``phase`` lets this site compute."""
        raise NotImplementedError

    def note(self, phase: Phase) -> str:
        """For the report: why what ``phase`` says is not done at the shape of the last backward, or what
        becomes of the weight gradient; may be empty."""
        return ""

    def recalled(self, use: tuple[int, int], found: bool, another: bool) -> None:
        """A backward by reuse has found what is to be reused; or not, and is exact: there is nothing yet, or
        something of ``another`` size."""
        self._missed[use] = 0 if found else self._missed.get(use, 0) + another
        if not found:
            self.method = "exact"

    def finds_nothing_to_reuse(self, method: object) -> bool:
        """Whether sizes change again and again."""
        return isinstance(method, Reuse) and max(self._missed.values(), default=0) > 1

    def watched(self) -> Telemetry | None:
        """The telemetry, if the present backward is to be measured."""
        return self.telemetry if self.telemetry is not None and self.telemetry.due(self.name) else None

    def settle(self) -> None:
        """Bring what is still counted on a device into ``counters``. Waits for the device."""

    def forget(self) -> None:
        """Free the remembered gradients; the next backward is exact."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; an empty one is that of a site that has never run."""
        raise NotImplementedError
