"""The boundary behind one block on a GPU, decided ahead; see ``plan.py``."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_compile.kernels import on_device
from sparse_compile.memory import Use
from sparse_compile.methods.rows import number_kept
from sparse_compile.plan import Choice, Counts, Plan, Seen
from sparse_compile.schedule import Phase
from sparse_compile.settings.sample import Sample
from sparse_compile.tally import Tally

if TYPE_CHECKING:
    from sparse_compile.block_site import BlockSite


class PlannedBlock:
    """What a block's site does where it is planned; draws what :meth:`BlockSite.weights` does."""

    def __init__(self, site: BlockSite, tally: Tally) -> None:
        self._site = site
        self._tally = tally
        self._counts = Counts()
        self._samples: dict[tuple[int, Hashable], int] = {}

    def size(self, use: Use, shapes: Hashable) -> tuple[int, int]:
        """See :class:`plan.Planned`."""
        return 0, 0

    def age(self, use: Use, shapes: Hashable, step: int) -> int | None:
        """See :class:`plan.Planned`."""
        return None

    def choose(self, phase: Phase, use: Use, shapes: Hashable, look: bool, seen: Seen) -> Choice:
        """See :class:`plan.Planned`."""
        method, share = phase.blocks, self._site.keep(phase)
        if method is None or self._site.controller.measures(phase.step):
            return Choice(measured=method is not None)
        return Choice(method, share=share) if share < 1.0 else Choice()

    def reserve(self, device: torch.device) -> None:
        """Make what launches write to."""
        self._tally.on(device)

    def prepare(self, plan: Plan, number: int, step: int) -> list[int]:
        """See :class:`plan.Planned`."""
        choice, use = plan.choices[number], plan.uses[number]
        if choice.method is None:
            return []
        if n := self._samples.get((use[0], plan.shapes)):
            self._site.controller.dropped(n - number_kept(choice.share, n), n)
        draw = self._site.next_draw(use)
        return [draw.number(), draw.number()]

    def launch(self, plan: Plan, number: int, numbers: Tensor, squares: Tensor) -> Tensor:
        """As :meth:`BlockSite.weights`, of ``squares`` [B]; ``numbers`` are those of :meth:`prepare`."""
        choice, n, use = plan.choices[number], len(squares), plan.uses[number]
        self._site.shape = (n,)
        self._samples[use[0], plan.shapes] = n
        tally = self._tally.on(squares.device)
        if choice.measured:
            self._site.method = "exact"
            self._site.measure(squares, use)
            return torch.ones_like(squares)
        if choice.method is None or n == 0:
            self._site.method = "exact"
            self._count(plan, number, n, n)
            tally[:2] += (squares == 0).sum()
            return torch.ones_like(squares)
        self._site.method = choice.method.method
        k = number_kept(choice.share, n)
        self._count(plan, number, n, k)
        return on_device.drawn_weights(squares.sqrt(), k, cap_of(choice.method), numbers[:2], tally)

    def _count(self, plan: Plan, number: int, n: int, computed: int) -> None:
        site, method = self._site, self._site.method

        def count(times: int) -> None:
            site.shape, site.method = (n,), method
            site.counters.backwards += times
            site.counters.rows += times * n
            site.counters.rows_computed += times * computed

        self._counts.each(plan, plan.uses[number], count)

    def settle_counts(self) -> None:
        """Count the backwards since the last call."""
        self._counts.settle()


def cap_of(method: object) -> float | None:
    """On the weights of samples that are drawn; adaptive sampling has none for whole samples."""
    return method.clip if isinstance(method, Sample) else None
