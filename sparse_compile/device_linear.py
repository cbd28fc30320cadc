"""A linear layer on a GPU: the same methods and products, with no waiting for the GPU.

On the CPU a site looks at its rows and then decides. Here looking means to wait, so

- rows are chosen by kernels (``kernels/triton/draw.py``, ``largest.py``); their number stays on the device;
- whether to skip zero rows is decided by how many there were at the backward before. Both ways are exact, so
  a wrong guess costs time only. Where there were none, the next looks are further and further apart;
- what multiplies is timed once for every shape (``kernels/choice.py``): ATen, on the whole of dY or on
  gathered rows; Triton, which gathers inside the product; or, for 2:4, cuSPARSELt;
- and so is whether choosing rows pays: to choose them takes a pass over dY, and X.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from sparse_compile.device_forward import WORTH_SKIPPING, Needed
from sparse_compile.kernels import choice, on_device, semi_structured, triton
from sparse_compile.kernels import linear as aten
from sparse_compile.later import Later
from sparse_compile.looks import LaterLooks
from sparse_compile.methods.rows import Estimate, Neighbours, Rows, number_kept
from sparse_compile.methods.sample import Draw
from sparse_compile.phases import parse_n_m
from sparse_compile.settings.adaptive import Adaptive
from sparse_compile.settings.reuse import Reuse
from sparse_compile.settings.sample import Sample
from sparse_compile.tally import Tally

# FLOPs of the two products, below which looking takes longer than multiplying: an H100 does 4e9 in 5 µs.
WORTH_LOOKING = 4e9
# The n:m of which any four neighbours hold two at most, as how many of four.
_OF_FOUR = {(1, 4): 1, (2, 4): 2}
# Backwards between two looks, at most. A look costs about 10 µs where a 1024 × 1024 layer of 16 k tokens
# takes 100 (an estimate from bandwidths and launches, not a measurement).
_LONGEST_PAUSE = 15

T = TypeVar("T")


class DeviceLinear:
    """What a site of a linear keeps for its GPU.

    Attributes:
        kernel: what its last products ran on.
        needed: the rows that the forward of this backward needed, or None: nobody knows.
        alive: int32, how many rows had a score in the last draw of an adaptive share; for dX, if drawn.
    """

    @classmethod
    def of(
        cls,
        dy: Tensor,
        last: DeviceLinear | None,
        settle: Callable[[], None],
        tally: Tally | None = None,
    ) -> DeviceLinear | None:
        """What is kept for ``dy``, or None: there are no kernels for it. It is the ``last``, unless the model
        has moved (``model.cpu()``, ``.to("cuda:1")``, ``.double()``); then ``settle`` is called before. A new
        one counts in ``tally``, if there is one."""
        where = (dy.device, dy.dtype)
        if last is not None:
            if last._where == where:
                return last
            settle()
        return cls(where, tally) if on_device.usable(dy) else None

    def __init__(
        self, where: tuple[torch.device, torch.dtype] | None = None, tally: Tally | None = None
    ) -> None:
        self.kernel = ""
        self.needed: Needed | None = None
        self._where = where
        self._asked: tuple[object, ...] | None = None
        self._lacks = (False, False)  # whether X was not there in the last backward, and W
        # What chose rows in this backward, if it is to be timed.
        self._chosen_by: list[Callable[[], object]] = []
        self._tally = tally or Tally()
        self.alive: Tensor | None = None
        self._live: Later | None = None
        self._looks = LaterLooks(_LONGEST_PAUSE, WORTH_SKIPPING)

    def live_rows(self, dy: Tensor, inputs: int) -> Rows | None:
        """The rows of ``dy`` [N, O] that are not zero, or None: nobody looked, or it would not pay. Where the
        forward knew the rows that are needed, it is those."""
        if (rows := self.needed_rows()) is not None:
            return rows
        if 4 * dy.numel() * inputs < WORTH_LOOKING:
            return None
        if not self._looks.due():
            return None
        rows = on_device.live_rows(dy)
        assert rows.count is not None
        return rows if self._looks.found(rows.count, len(dy)) else None

    def needed_rows(self) -> Rows | None:
        """The rows that the forward needed, if it knew some."""
        if self.needed is None:
            return None
        rows = self.needed.rows
        assert rows.slot is not None
        return dataclasses.replace(rows, slot=rows.slot.clone())  # an op must not return what it was given

    def pays(self, method: Reuse | Sample | Adaptive, share: float, shape: tuple[int, ...]) -> bool:
        """Whether to choose rows by ``method``: False where the dense products were found to be as fast. The
        first backward chooses in any case, and is timed.

        Ranks of one run may find different answers, and one then is exact where another samples. Their
        gradients are averaged, and exact ones are no worse than what they stand for: no rank has to know.

        Args:
            share: of the rows that ``method`` keeps.
            shape: (N, I, O), or () before the first backward.
        """
        self._chosen_by.clear()
        if not shape or share == 1.0:
            return True
        n, inputs, outputs = shape
        products = method.gradients if isinstance(method, Sample) else ""
        what = ("chosen", method.method, products, round(16 * share))
        self._asked = (*what, self._where, choice.bucket(n), inputs, outputs)
        return choice.known((*self._asked, self._lacks)) != "dense"

    def can_reuse(self, dy: Tensor, base: Tensor, method: Reuse) -> bool:
        """Whether ``method`` keeps whole rows, and few enough of them."""
        computed = number_kept(method.keep, len(dy)) + len(base)
        return method.granularity == "row" and computed <= aten.DENSE_SHARE * len(dy)

    def reuse(self, dy: Tensor, base: Tensor, keep: float) -> Rows:
        """Rows of dY [N, O] by the norm of their residual; see ``methods/reuse.py``."""

        def choose(tally: Tensor) -> Rows:
            stats = on_device.row_stats(dy, base.contiguous())
            return on_device.largest(*stats, number_kept(keep, len(dy)), base, tally)

        return self._choose(choose, dy.device)

    def neighbours(
        self, dy: Tensor, base: Tensor, method: Reuse, inputs: int
    ) -> tuple[Neighbours, Neighbours] | None:
        """Estimates of dY [N, O] for dX and dW that keep at most two of four neighbours of dY − P; None:
        ``method`` keeps something else, or sparse tensor cores do not take it."""
        ratio = method.phases[0][0]
        if not isinstance(ratio, str) or parse_n_m(ratio) not in _OF_FOUR:
            return None
        if not semi_structured.usable(dy, inputs):
            return None
        _, live = on_device.row_stats(dy)
        self._tally.on(dy.device)[0] += len(dy) - live.sum()
        return on_device.keep_of_four(dy, base.contiguous(), live, _OF_FOUR[parse_n_m(ratio)])

    def live_before(self, n: int) -> int:
        """How many rows were not zero in the last backward that drew a share of those; at most ``n``,
        which it is before the first."""
        return n if self._live is None else min(n, int(self._live.read()))

    def draw(
        self,
        dy: Tensor,
        x: Tensor | None,
        k: int,
        cap: float | None,
        draw: Draw | Tensor,
        *,
        for_dx: bool,
        share: float | None = None,
    ) -> list[Rows]:
        """k rows of dY [N, O] drawn at random, once for dX, if wanted, and once for dW, if X [N, I] is given:
        one of both at least. See ``methods/sample.py``.

        Args:
            draw: or its numbers, on the device.
            share: of the rows that are not zero; so many are drawn, and at most k.
        """
        draws = range(for_dx + (x is not None))
        numbers: list[tuple[int, int]] | Tensor
        numbers = draw if isinstance(draw, Tensor) else [(draw.number(), draw.number()) for _ in draws]

        def choose(tally: Tensor) -> tuple[list[Rows], Tensor]:
            return on_device.drawn(dy, x, k, cap, numbers, for_dx=for_dx, tally=tally, share=share)

        rows, alive = self._choose(choose, dy.device)
        # What is recorded into a CUDA graph must let go of all that it makes; an adaptive share is not.
        self.alive = None if share is None else alive
        if share is not None and not isinstance(draw, Tensor):
            self._live = Later(alive[:1])
        return rows

    def _choose(self, choose: Callable[[Tensor], T], device: torch.device) -> T:
        """What ``choose`` gives, which counts in a tally."""
        self._chosen_by.append(lambda: choose(torch.empty(3, dtype=torch.int64, device=device)))
        return choose(self._tally.on(device))

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        w: Tensor | None,
        for_dx: Estimate,
        for_dw: Estimate,
        *,
        dw_transposed: bool,
    ) -> tuple[aten.DistinctRows | None, Tensor | None]:
        """As :func:`kernels.linear.backward`, on whatever is fastest.

        Zero rows that could be skipped may as well be multiplied: ATen gets the whole of dY there. It gets
        gathered rows where their number is fixed.
        """
        estimates = (for_dx, for_dw)
        for_aten = [dy if isinstance(e, Rows) and e.padded else e for e in estimates]

        def by_aten() -> tuple[aten.DistinctRows | None, Tensor | None]:
            return aten.backward(dy, x, w, *for_aten, dw_transposed=dw_transposed)

        def by_triton() -> tuple[aten.DistinctRows | None, Tensor | None]:
            return on_device.backward(dy, x, w, *estimates, dw_transposed=dw_transposed)

        def by_both() -> tuple[aten.DistinctRows | None, Tensor | None]:
            dx, _ = on_device.backward(dy, None, w, *estimates, dw_transposed=dw_transposed)
            _, dw = aten.backward(dy, x, None, *for_aten, dw_transposed=dw_transposed)
            return dx, dw

        def by_cusparselt() -> tuple[aten.DistinctRows | None, Tensor | None]:
            return semi_structured.backward(x, w, for_dx, for_dw, dw_transposed=dw_transposed)

        wanted = [e for e, other in zip(estimates, (w, x), strict=True) if other is not None]
        candidates = {"aten": by_aten}
        if any(isinstance(e, Neighbours) for e in wanted):
            candidates["cusparselt"] = by_cusparselt
        elif any(isinstance(e, Rows) and e.count is not None for e in wanted):
            if len(wanted) == 2 and all(isinstance(e, Rows) and not e.padded for e in wanted):
                candidates["triton+aten"] = by_both  # dX by one, dW by the other
            candidates["triton"] = by_triton
        inputs = next(t.shape[1] for t in (x, w) if t is not None)
        key = (
            *(dy.device, dy.dtype, choice.bucket(len(dy)), dy.shape[1], inputs, x is None, w is None),
            *(dw_transposed, for_dx is for_dw, *map(self._describe, estimates)),
        )
        counted = bool(self._chosen_by)  # what chose rows has counted those that are zero
        with triton.current(dy.device):  # whose time is taken
            self.kernel = choice.fastest(key, candidates) if len(candidates) > 1 else "aten"
            self._time_choosing(dy, x, w, candidates[self.kernel], dw_transposed)
        if self.kernel == "triton":
            padded = [e for e in wanted if isinstance(e, Rows) and e.padded]
            if padded and padded[0].count is not None:
                flops = 2 * dy.shape[1] * inputs * len(padded)
                tally = self._tally.on(dy.device)
                on_device.tally_rows(tally, padded[0].count, len(dy), zero=not counted, flops=flops)
        return candidates[self.kernel]()

    def _time_choosing(
        self,
        dy: Tensor,
        x: Tensor | None,
        w: Tensor | None,
        products: Callable[[], object],
        dw_transposed: bool,
    ) -> None:
        """Choosing rows and the ``products`` of them against the dense products, if rows were chosen. (What
        renews a base is not in it: one pass over dY in ``refresh_every`` backwards.)"""
        steps, self._chosen_by = self._chosen_by, []
        self._lacks = (x is None, w is None)
        if not steps or self._asked is None:
            return
        steps.append(products)
        candidates: dict[str, Callable[[], object]] = {
            "dense": lambda: aten.backward(dy, x, w, dy, dy, dw_transposed=dw_transposed),
            "chosen": lambda: [step() for step in steps],
        }
        choice.fastest((*self._asked, self._lacks), candidates)

    def _describe(self, estimate: Estimate) -> tuple[object, ...]:
        """What the time of a product depends on. Numbers that may change from step to step (the rows of a
        share that is adaptive, the tokens of a batch) are taken roughly: each new key is timed."""
        if isinstance(estimate, Neighbours):
            return ("n of 4", choice.bucket(len(estimate.base)))
        if not isinstance(estimate, Rows):
            return ("dense",)
        if estimate.padded:
            return ("live", round(8 * (self._looks.alive if self.needed is None else self.needed.share)))
        tokens = 0 if estimate.base is None else choice.bucket(len(estimate.base))
        return ("kept", choice.bucket(len(estimate.kept)), tokens, estimate.scale is None)

    def settle(self) -> tuple[int, int, int]:
        """The tally since the last call, on the host."""
        return self._tally.settle()
