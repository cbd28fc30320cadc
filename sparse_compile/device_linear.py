"""A linear layer on a GPU: the same methods and products, with no waiting for the GPU.

On the CPU a site looks at its rows and then decides. Here looking means to wait, so

- rows are chosen by the forms of ``methods/on_device.py``, whose number stays on the device;
- whether to skip zero rows is decided by how many there were at the backward before. Both ways are exact, so
  a wrong guess costs time only. Where there were none, the next looks are further and further apart;
- what multiplies is timed once for every shape (``kernels/choice.py``): ATen, on the whole of dY or on
  gathered rows; Triton, which gathers inside the product; or, for 2:4, cuSPARSELt;
- and so is whether choosing rows pays: to choose them takes dozens of small launches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_compile.kernels import choice, on_device, semi_structured, triton
from sparse_compile.kernels import linear as aten
from sparse_compile.later import Later
from sparse_compile.looks import LaterLooks
from sparse_compile.methods import on_device as methods
from sparse_compile.methods.rows import Estimate, Neighbours, Rows, number_kept
from sparse_compile.methods.sample import Draw
from sparse_compile.phases import parse_n_m
from sparse_compile.settings.adaptive import Adaptive
from sparse_compile.settings.reuse import Reuse
from sparse_compile.settings.sample import Sample

# Products over gathered rows are not as fast as dense ones: fewer zero rows than this are not skipped.
_WORTH_SKIPPING = 1 / 16
# FLOPs of the two products, below which looking takes longer than multiplying: an H100 does 4e9 in 5 µs.
_WORTH_LOOKING = 4e9
# The n:m of which any four neighbours hold two at most, as how many of four.
_OF_FOUR = {(1, 4): 1, (2, 4): 2}
# Backwards between two looks, at most. A look costs about 10 µs where a 1024 × 1024 layer of 16 k tokens
# takes 100 (an estimate from bandwidths and launches, not a measurement).
_LONGEST_PAUSE = 15


@dataclasses.dataclass(slots=True)
class Tally:
    """Sums that are kept on the device: rows that were zero, those of them that were skipped, and the FLOPs
    that this saved."""

    zero: Tensor | int = 0
    skipped: Tensor | int = 0
    flops: Tensor | int = 0


class DeviceLinear:
    """What a site of a linear keeps for its GPU. Attributes: ``kernel``, what its last products ran on."""

    @classmethod
    def of(cls, dy: Tensor, last: DeviceLinear | None, settle: Callable[[], None]) -> DeviceLinear | None:
        """What is kept for ``dy``, or None: there are no kernels for it. It is the ``last``, unless the model
        has moved (``model.cpu()``, ``.to("cuda:1")``, ``.double()``); then ``settle`` is called before."""
        where = (dy.device, dy.dtype)
        if last is not None:
            if last._where == where:
                return last
            settle()
        return cls(where) if on_device.usable(dy) else None

    def __init__(self, where: tuple[torch.device, torch.dtype] | None = None) -> None:
        self.kernel = ""
        self._where = where
        self._asked: tuple[object, ...] | None = None
        self._lacks = (False, False)  # whether X was not there in the last backward, and W
        # What chose rows in this backward, if it is to be timed.
        self._chosen_by: list[Callable[[], object]] = []
        self._tally = Tally()
        self._live: Later | None = None
        self._looks = LaterLooks(_LONGEST_PAUSE, _WORTH_SKIPPING)

    def live_rows(self, dy: Tensor, inputs: int) -> Rows | None:
        """The rows of ``dy`` [N, O] that are not zero, or None: nobody looked, or it would not pay."""
        if 4 * dy.numel() * inputs < _WORTH_LOOKING:
            return None
        if not self._looks.due():
            return None
        rows = on_device.live_rows(dy)
        assert rows.count is not None
        return rows if self._looks.found(rows.count, len(dy)) else None

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

        def choose() -> tuple[Rows, Tensor]:
            squares, live = on_device.row_stats(dy, base.contiguous())
            return methods.largest(squares, live, keep, base), live

        self._chosen_by.append(choose)
        rows, live = choose()
        self._tally.zero = self._tally.zero + (len(dy) - live.sum())
        return rows

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
        self._tally.zero = self._tally.zero + (len(dy) - live.sum())
        return on_device.keep_of_four(dy, base.contiguous(), live, _OF_FOUR[parse_n_m(ratio)])

    def norms(self, dy: Tensor) -> Tensor:
        """‖dY_i‖ in float32, [N]; zero exactly where the row is."""

        def measure() -> tuple[Tensor, Tensor]:
            squares, live = on_device.row_stats(dy)
            # The square of an entry below 1e-23 is zero, and yet its row needs a chance.
            smallest = torch.finfo(squares.dtype).tiny
            return torch.where(live, squares.sqrt().clamp(min=smallest), 0.0), live

        self._chosen_by.append(measure)
        norms, live = measure()
        self._tally.zero = self._tally.zero + (len(dy) - live.sum())
        return norms

    def live(self, norms: Tensor) -> int:
        """How many rows were not zero in the backward before, and at most all of these; of the first one the
        host waits for the count. (An adaptive share is of those rows: one that lags behind draws a few more
        or less, as unbiased.)"""
        last, self._live = self._live, Later(norms.count_nonzero())
        return min(len(norms), (last or self._live).read())

    def draw(self, scores: Tensor, k: int, clip: float | None, draw: Draw) -> Rows:
        """k rows drawn at random by ``scores`` [N]; see ``methods/sample.py``."""
        self._chosen_by.append(lambda: methods.drawn(scores, k, clip, draw))
        return methods.drawn(scores, k, clip, draw)

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

        def by_cusparselt() -> tuple[aten.DistinctRows | None, Tensor | None]:
            return semi_structured.backward(x, w, for_dx, for_dw, dw_transposed=dw_transposed)

        wanted = [e for e, other in zip(estimates, (w, x), strict=True) if other is not None]
        candidates = {"aten": by_aten}
        if any(isinstance(e, Neighbours) for e in wanted):
            candidates["cusparselt"] = by_cusparselt
        elif any(isinstance(e, Rows) and e.count is not None for e in wanted):
            candidates["triton"] = by_triton
        inputs = next(t.shape[1] for t in (x, w) if t is not None)
        key = (
            *(dy.device, dy.dtype, choice.bucket(len(dy)), dy.shape[1], inputs, x is None, w is None),
            *(dw_transposed, for_dx is for_dw, *map(self._describe, estimates)),
        )
        counted = bool(self._chosen_by)  # what chose rows has counted those that are zero
        with triton.current(dy.device):  # whose time is taken
            self.kernel = choice.fastest(key, candidates) if len(candidates) > 1 else "aten"
            self._time_choosing(dy, x, w, for_dw, candidates[self.kernel], dw_transposed)
        if self.kernel == "triton":
            self._count_skipped(len(dy), 2 * dy.shape[1] * inputs, wanted, counted)
        return candidates[self.kernel]()

    def _time_choosing(
        self,
        dy: Tensor,
        x: Tensor | None,
        w: Tensor | None,
        for_dw: Estimate,
        products: Callable[[], object],
        dw_transposed: bool,
    ) -> None:
        """Choosing rows and the ``products`` of them against the dense products, if rows were chosen. (What
        renews a base is not in it: one pass over dY in ``refresh_every`` backwards.)"""
        steps, self._chosen_by = self._chosen_by, []
        self._lacks = (x is None, w is None)
        if not steps or self._asked is None:
            return
        if x is not None and isinstance(for_dw, Rows) and for_dw.scale is not None:
            steps.append(lambda: torch.linalg.vector_norm(x, dim=1, dtype=torch.float32))
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
            return ("live", round(8 * self._looks.alive))
        tokens = 0 if estimate.base is None else choice.bucket(len(estimate.base))
        return ("kept", choice.bucket(len(estimate.kept)), tokens, estimate.scale is None)

    def _count_skipped(self, n: int, flops: int, wanted: list[Estimate], counted: bool) -> None:
        counts = [e.count for e in wanted if isinstance(e, Rows) and e.padded and e.count is not None]
        if counts:
            skipped = (n - counts[0]).to(torch.int64).sum()
            if not counted:
                self._tally.zero = self._tally.zero + skipped
            self._tally.skipped = self._tally.skipped + skipped
            self._tally.flops = self._tally.flops + skipped * (flops * len(counts))

    def settle(self) -> tuple[int, int, int]:
        """The tally since the last call, on the host."""
        done, self._tally = self._tally, Tally()
        return int(done.zero), int(done.skipped), int(done.flops)
