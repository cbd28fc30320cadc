"""The end of a block while it trains: which samples' gradients go on into it, and how much they count."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from sparse_compile.memory import Use
from sparse_compile.methods import sample
from sparse_compile.methods.rows import number_kept
from sparse_compile.schedule import Phase
from sparse_compile.settings.adaptive import Adaptive
from sparse_compile.settings.sample import Sample
from sparse_compile.site import Site


class BlockSite(Site):
    """The boundary behind one block; see :class:`Site`. Its shape is (B,), its rows are samples."""

    _draws = 0

    def weights(self, squares: Tensor, *, phase: Phase | None, use: Use = (0, 0)) -> Tensor:
        """What the gradient of each sample is to be multiplied by, [B].

        Args:
            squares: Σ dH² of each sample, [B].
            phase: what the schedule says of this step; None is exact.
            use: which run of the block this is.
        """
        self.shape = tuple(squares.shape)
        self.method = "exact"
        # One number a sample: a GPU is waited for once, and all else is done by the host.
        device, squares = squares.device, squares.cpu()
        live = computed = int(squares.count_nonzero())
        weights = torch.ones_like(squares)
        setting = None if phase is None else phase.blocks
        share = 1.0 if phase is None else self.keep(phase)
        measured = setting is not None and phase is not None and self.controller.measures(phase.step)
        # What is not finite must reach the gradient, where a GradScaler looks for it.
        if setting is not None and (measured or share < 1.0) and bool(squares.sum().isfinite()):
            norms = squares.sqrt()
            draw = sample.Draw(f"{self.seed}/{self.name}/{use}/{self._draws}")
            self._draws += 1
            if measured:
                if not (self.left_alone or self.held_back):  # else nothing is dropped here, whatever is seen
                    self.controller.observe_samples(self.name, norms, draw)
            else:
                self.method = setting.method
                clip = setting.clip if isinstance(setting, Sample) else None
                kept = sample.rows(norms, number_kept(share, len(norms)), clip, draw)
                computed = kept.computed
                self.controller.dropped(live - computed, len(norms))
                weights = torch.zeros_like(squares)
                weights[kept.kept] = 1.0 if kept.scale is None else kept.scale.to(weights)
        self.counters.backwards += 1
        self.counters.rows += len(squares)
        self.counters.rows_zero += len(squares) - live
        self.counters.rows_computed += computed
        return weights.to(device)

    def keep(self, phase: Phase) -> float:
        """The share of the samples that goes on. A fixed K means K^((n − i)/n) behind block i of n (from 0):
        the share falls evenly from the last block to K behind the first."""
        if phase.blocks is None or self.left_alone or self.held_back:
            return 1.0
        if isinstance(phase.blocks, Adaptive):
            return self.controller.sample_share(self.name)
        index, count = self.block or (0, 1)
        return round(cast(float, phase.blocks.keep) ** ((count - index) / count), 6)

    def forget(self) -> None:
        """There is nothing remembered."""

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self._draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws = state.get("draws", 0)
