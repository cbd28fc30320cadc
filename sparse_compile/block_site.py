"""The end of a block while it trains: which samples' gradients go on into it, and how much they count."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from sparse_compile.kernels import on_device
from sparse_compile.memory import Use
from sparse_compile.methods import sample
from sparse_compile.methods.rows import number_kept
from sparse_compile.planned_block import PlannedBlock, cap_of
from sparse_compile.schedule import Phase
from sparse_compile.settings.adaptive import Adaptive
from sparse_compile.settings.sample import Sample
from sparse_compile.site import Site
from sparse_compile.tally import Tally


class BlockSite(Site):
    """The boundary behind one block; see :class:`Site`. Its shape is (B,), its rows are samples."""

    _draws = 0

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        self._tally = Tally()
        self.planned: PlannedBlock = PlannedBlock(self, self._tally)

    def weights(self, squares: Tensor, *, phase: Phase | None, use: Use = (0, 0)) -> Tensor:
        """What the gradient of each sample is to be multiplied by, [B].

        Args:
            squares: Σ dH² of each sample, [B].
            phase: what the schedule says of this step; None is exact.
            use: which run of the block this is.
        """
        self.shape = tuple(squares.shape)
        self.method = "exact"
        setting = None if phase is None else phase.blocks
        share = 1.0 if phase is None else self.keep(phase)
        measured = setting is not None and phase is not None and self.controller.measures(phase.step)
        if measured:
            self.measure(squares, use)
            return torch.ones_like(squares)
        self.counters.backwards += 1
        self.counters.rows += len(squares)
        if on_device.usable(squares):
            return self._on_device(squares, setting, share, use)
        # One number a sample: a GPU is waited for once, and all else is done by the host.
        device, squares = squares.device, squares.cpu()
        live = computed = int(squares.count_nonzero())
        weights = torch.ones_like(squares)
        # What is not finite must reach the gradient, where a GradScaler looks for it.
        if setting is not None and share < 1.0 and bool(squares.sum().isfinite()):
            self.method = setting.method
            k = number_kept(share, len(squares))
            kept = sample.rows(squares.sqrt(), k, cap_of(setting), self.next_draw(use))
            computed = kept.computed
            self.controller.dropped(live - computed, len(squares))
            weights = torch.zeros_like(squares)
            weights[kept.kept] = 1.0 if kept.scale is None else kept.scale.to(weights)
        self.counters.rows_zero += len(squares) - live
        self.counters.rows_computed += computed
        return weights.to(device)

    def measure(self, squares: Tensor, use: Use) -> None:
        """Show the controller of adaptive sampling a backward in which all samples go on. Waits for a GPU.
        Arguments are those of :meth:`weights`."""
        squares = squares.cpu()
        live = int(squares.count_nonzero())
        self.counters.backwards += 1
        self.counters.rows += len(squares)
        self.counters.rows_zero += len(squares) - live
        self.counters.rows_computed += live
        if bool(squares.sum().isfinite()):
            draw = self.next_draw(use)
            if not (self.left_alone or self.held_back):  # else nothing is dropped here, whatever is seen
                self.controller.observe_samples(self.name, squares.sqrt(), draw)

    def _on_device(
        self, squares: Tensor, setting: Sample | Adaptive | None, share: float, use: Use
    ) -> Tensor:
        """As :meth:`weights`, with nothing that waits for the GPU. Of how many samples there is a gradient
        only the GPU knows: those that go on are counted as if there were enough."""
        tally, n = self._tally.on(squares.device), len(squares)
        if setting is None or share == 1.0 or n == 0:
            self.counters.rows_computed += n
            tally[:2] += (squares == 0).sum()
            return torch.ones_like(squares)
        self.method = setting.method
        k, draw = number_kept(share, n), self.next_draw(use)
        self.controller.dropped(n - k, n)
        self.counters.rows_computed += k
        numbers = (draw.number(), draw.number())
        return on_device.drawn_weights(squares.sqrt(), k, cap_of(setting), numbers, tally)

    def next_draw(self, use: Use) -> sample.Draw:
        """The random numbers of one backward."""
        self._draws += 1
        return sample.Draw(f"{self.seed}/{self.name}/{use}", self._draws - 1)

    def keep(self, phase: Phase) -> float:
        """The share of the samples that goes on. A fixed K means K^((n − i)/n) behind block i of n (from 0):
        the share falls evenly from the last block to K behind the first."""
        if phase.blocks is None or self.left_alone or self.held_back:
            return 1.0
        if isinstance(phase.blocks, Adaptive):
            return self.controller.sample_share(self.name)
        index, count = self.block or (0, 1)
        return round(cast(float, phase.blocks.keep) ** ((count - index) / count), 6)

    def settle(self) -> None:
        self.planned.settle_counts()
        zero, skipped, _ = self._tally.settle()
        self.counters.rows_zero += zero
        self.counters.rows_computed -= skipped

    def forget(self) -> None:
        """There is nothing remembered."""

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self._draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws = state.get("draws", 0)
