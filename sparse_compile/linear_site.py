"""A linear layer while it trains: picks the method, estimates dY by it, and runs the two products."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_compile.device_forward import DeviceForward, Needed
from sparse_compile.device_linear import DeviceLinear
from sparse_compile.kernels import choice
from sparse_compile.kernels import linear as kernel
from sparse_compile.linear_counts import Estimates, LinearCounts
from sparse_compile.looks import Looks
from sparse_compile.memory import Memory, Use
from sparse_compile.methods import exact, reuse, sample
from sparse_compile.methods.rows import Estimate, Rows, number_kept, wide
from sparse_compile.plan import TOO_SMALL
from sparse_compile.planned_linear import PlannedLinear
from sparse_compile.schedule import Phase
from sparse_compile.settings.adaptive import Adaptive
from sparse_compile.settings.reuse import Reuse
from sparse_compile.settings.sample import Sample
from sparse_compile.site import NOTHING_TO_REUSE

if TYPE_CHECKING:
    from sparse_compile.carried import Carried

# Backwards between two looks for rows that are zero, at most.
_LONGEST_PAUSE = 7


class LinearSite(LinearCounts):
    """The backward of one linear layer; see :class:`Site`. Its shape is (N, I, O).

    Attributes:
        carried: what counts its backwards where their products are the graph's own.
        on_device: its forwards on a GPU.
        planned: its backwards on a GPU where they are decided ahead.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        self._memory = Memory()
        self._draws = 0
        # The number of a forward, and the rows that it computed, until its backward.
        self._needed: dict[Use, tuple[int, Tensor]] = {}
        self._live: int | None = None  # rows that the last backward did not find to be zero
        self._looks = Looks(_LONGEST_PAUSE)
        self._nothing_to_ask: tuple[object, ...] | None = None
        self._device: DeviceLinear | None = None
        self.carried: list[Carried] = []
        self.on_device = DeviceForward()
        self.planned: PlannedLinear = PlannedLinear(self)

    def linear_forward(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        needed: Tensor,
        *,
        use: Use = (0, 0),
        forward: int = 0,
    ) -> Tensor:
        """Y [N, O] of a linear; only the rows with ``needed``, bool [N], have to be right.

        Args:
            x: [N, I].
            w: [O, I].
            bias: [O], or None.
            use: whose backward will count it.
            forward: which forward of the graph it is.
        """
        rows = None if self.left_alone else needed.nonzero().squeeze(1)
        if rows is None or len(rows) > kernel.DENSE_SHARE * len(x):
            self._needed.pop(use, None)
            return torch.nn.functional.linear(x, w, bias)
        self._needed[use] = forward, rows
        return kernel.forward(x, w, bias, rows)

    def linear_backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        w: Tensor | None,
        *,
        tokens: int,
        dw_transposed: bool,
        phase: Phase | None,
        use: Use = (0, 0),
        forward: int = 0,
        handed_over: bool = False,
        rows: Tensor | None = None,
        total: int = 0,
        on_gpu: Needed | None = None,
    ) -> tuple[kernel.DistinctRows | None, Tensor | None]:
        """(dX, dW) of a linear; None for the one that is not asked for. dX comes as its distinct rows.

        Args:
            dy: [N, O]; or [n, O], if only the ``rows`` [n] of ``total`` are given: x and dX have these, too,
                and all others of dY are zero.
            x: [N, I], or None: no dW.
            w: [O, I], or None: no dX.
            tokens: T, rows per sample; or −B, where the rows of B samples alternate ([T, B, O]).
            dw_transposed: return dW as [I, O].
            phase: what the schedule says of this step; None is exact.
            use: whose base it is.
            forward: whose rows are needed: a second backward of one graph must not take those of a newer one.
            handed_over: give dW to ``rotated``, and return None for it.
            on_gpu: the rows that the forward needed, on a GPU.
        """
        needed = self._needed.pop(use)[1] if self._needed.get(use, (None,))[0] == forward else None
        measured = phase is not None and self.controller.measures(phase.step) and not self.left_alone
        reuses = phase is not None and isinstance(phase.linear, Reuse)
        again = functools.partial(
            self.linear_backward,
            w=w,
            dw_transposed=dw_transposed,
            phase=phase,
            use=use,
            forward=forward,
            handed_over=handed_over,
        )
        if rows is not None and (measured or reuses):
            # What is remembered of tokens, or measured of samples, is of whole ones.
            self._needed[use] = forward, rows if needed is None else rows[needed]
            all_of_x = None if x is None else kernel.on_all_rows(x, rows, total)
            dx, dw = again(kernel.on_all_rows(dy, rows, total), all_of_x, tokens=tokens)
            return None if dx is None else (kernel.written_out(dx).index_select(0, rows), None), dw
        if tokens < 0 and reuses and len(dy) and not self._is_exact(phase):
            if needed is not None:
                among = torch.zeros(len(dy), dtype=torch.bool).index_fill_(0, needed, True)
                self._needed[use] = forward, kernel.by_sample(among, -tokens).nonzero().squeeze(1)
            if on_gpu is not None:
                self.on_device.count(on_gpu, len(dy), 2 * _inputs(x, w) * dy.shape[1])
            turned = None if x is None else kernel.by_sample(x, -tokens)
            dx, dw = again(kernel.by_sample(dy, -tokens), turned, tokens=len(dy) // -tokens)
            return None if dx is None else kernel.by_token(dx, -tokens), dw
        n = len(dy) if rows is None else total
        operands = (dy.device, dy.dtype, dy.shape[rows is not None :], n, x is None, w is None)
        same = operands == self._nothing_to_ask and needed is None and not measured
        if same and self._has_no_method(phase) and not self._looks.due():
            # As the last time. To ask all of the below takes 0.1 ms, since none of it is in the cache.
            self.count(n - len(dy), [len(dy)] * ((x is not None) + (w is not None)))
            self.count_forward(n - len(dy))
            return kernel.backward(dy, x, w, dy, dy, dw_transposed=dw_transposed)
        inputs = _inputs(x, w)
        self.shape = (n, inputs, dy.shape[1])
        self._device = DeviceLinear.of(dy, self._device, self.settle)
        if self._device is not None:
            self._device.needed = on_gpu
        if on_gpu is not None:
            self.on_device.count(on_gpu, n, 2 * inputs * dy.shape[1])
        method = None if phase is None or measured or self.held_back else phase.linear
        zero: int
        estimates: Estimates
        if self.left_alone:
            self.method = "dense"
            zero, estimates = 0, (dy, dy)
        elif method is None or self._has_no_method(phase):
            self.method = "exact"
            if method is not None:
                self._memory.clear()  # or it would be of long ago, should it be reused again
            zero, estimates = self._exactly(dy, needed)
        elif isinstance(method, Reuse):
            self.method = method.method
            zero, estimates = self._reuse(dy, tokens, method, use, needed, 0 if phase is None else phase.step)
        else:
            self.method = method.method
            zero, estimates = self._sample(dy, x, method, use, needed)
        for_dx, for_dw = estimates
        rotating = handed_over and self.rotated is not None and self.rotated.entries is not None
        wanted = ((for_dx, w), (for_dw, x))
        # Rows that the device alone has counted are taken as computed here, and taken off by settle().
        computed = [e.computed if isinstance(e, Rows) else len(dy) for e, _ in wanted]
        self.count(
            n - len(dy) + zero,
            [k for k, (_, operand) in zip(computed, wanted, strict=True) if operand is not None],
        )
        self.count_forward(n - (len(dy) if needed is None else len(needed)))
        if rotating:
            self._count_rotated(computed[1])
        multiply = kernel.backward
        if self._device is not None and not self.left_alone:
            multiply = self._device.backward
        dx, dw = multiply(dy, None if rotating else x, w, for_dx, for_dw, dw_transposed=dw_transposed)
        if handed_over:
            self._hand_over(dy, x, dw, for_dw)
            dw = None
        self.kernel = ""
        if self._device is not None:
            self.kernel, self._device.needed = self._device.kernel, None
        if telemetry := self.watched():
            self.observe(telemetry, dy, x, w, estimates, (dx, dw), dw_transposed)
        ordinary = not (self._device or self.telemetry or handed_over)
        self._nothing_to_ask = operands if self.method == "exact" and ordinary else None
        if measured:
            self.measure(dy, x, dw, tokens)
        return dx, dw

    def _hand_over(self, dy: Tensor, x: Tensor | None, dw: Tensor | None, for_dw: Estimate) -> None:
        """Give the weight gradient away: dW [O, I] in the calibration, then the corner of the rotated one."""
        if self.rotated is None:
            raise RuntimeError(
                f"The gradient of '{self.name}' is for an optimizer of sparse_compile.optim, and the model "
                "or backend that its graph was compiled for is gone, or was not found when it ran."
            )
        if dw is not None:
            self.rotated.accept_dense(dw)
        elif x is not None:
            self.rotated.accept(self.rotated.basis.gradient(*kernel.contracted(dy, x, for_dw)))

    @property
    def density(self) -> float:
        return 1.0 if self.rotated is None else self.rotated.density

    def note(self, phase: Phase) -> str:
        if self.controller.saw_nothing(phase.step):
            return "nothing was measured: no batch had two samples or more, of as many rows each"
        if self.planned.too_small and not self.left_alone:
            return TOO_SMALL
        if self.finds_nothing_to_reuse(phase.linear):
            return NOTHING_TO_REUSE
        if phase.linear is not None and not self.held_back and not self._pays(phase.linear):
            what = "reuse" if isinstance(phase.linear, Reuse) else "sampling"
            return f"{what} would cost more than it saves at this size and share: only zero rows are skipped"
        return "" if self.rotated is None else self.rotated.note

    def keep(self, phase: Phase) -> float:
        method = phase.linear
        if (
            method is None
            or self.left_alone
            or self._has_no_method(phase)
            or self.finds_nothing_to_reuse(method)
        ):
            return 1.0
        return round(self.share(method), 6)

    def _has_no_method(self, phase: Phase | None) -> bool:
        """Whether this step is exact here, whatever the gradient."""
        if phase is None or phase.linear is None or self.held_back or self.planned.too_small:
            return True
        return self.share(phase.linear) == 1.0 or not self._pays(phase.linear)

    def _is_exact(self, phase: Phase | None) -> bool:
        """Whether this step is exact here, whatever the sizes of the batch."""
        exact = phase is None or phase.linear is None or self.share(phase.linear) == 1.0
        return exact or bool(self.held_back or self.left_alone)

    def _pays(self, method: Reuse | Sample | Adaptive) -> bool:
        """Whether an adaptive share saves time at this shape: else exact is both better and cheaper. A GPU
        has measured that, of every method; on a CPU a share that the user has fixed is kept to. What exact
        skips, sampling cannot save once more."""
        device = self._device or self.planned.device
        if device is not None:
            with choice.device_alone() if self._device is None else contextlib.nullcontext():
                return device.pays(method, self.share(method), self.shape)
        if not isinstance(method, Adaptive) or not self.shape or self.share(method) == 1.0:
            return True
        rows, inputs, outputs = self.shape
        live = rows if self._live is None else min(rows, self._live)
        skipped = live - number_kept(self.share(method), live)
        return skipped >= exact.fewest_to_skip(rows, inputs, outputs, products=1)

    def _fewest_to_skip(self, dy: Tensor) -> int:
        _, inputs, outputs = self.shape
        return exact.fewest_to_skip(len(dy), inputs, outputs)

    def _exactly(self, dy: Tensor, needed: Tensor | None = None) -> tuple[int, Estimates]:
        """The number of rows skipped as zero, as far as the host knows, and dY without them.

        Args:
            dy: [N, O].
            needed: the rows that the forward needed, int64; what no output depends on has no gradient.
        """
        if self._device is not None:
            estimate = self._device.live_rows(dy, self.shape[1])
            return 0, (dy, dy) if estimate is None else (estimate, estimate)
        self._live = len(dy)
        if needed is not None:
            rows = Rows(exact.live_among(dy, needed))
            self._live = rows.computed
            enough = len(dy) - rows.computed >= self._fewest_to_skip(dy)
            return (len(dy) - rows.computed, (rows, rows)) if enough else (0, (dy, dy))
        if not self._looks.due():
            return 0, (dy, dy)
        live = exact.live_rows(dy, self._fewest_to_skip(dy))
        self._looks.found(live is not None)
        if live is None:
            return 0, (dy, dy)
        rows = exact.rows(live)
        self._live = rows.computed
        return len(dy) - rows.computed, (rows, rows)

    def _reuse(
        self, dy: Tensor, tokens: int, method: Reuse, use: Use, needed: Tensor | None, step: int
    ) -> tuple[int, Estimates]:
        """Estimate dY by reuse, and remember it as the schedule says."""
        another = self._memory.has_another(use, dy, tokens)
        base = self._memory.recall(use, dy, tokens, step)
        self.recalled(use, base is not None, another)
        if base is None:
            zero, estimates = self._exactly(dy, needed)
        elif self._device is not None and self._device.can_reuse(dy, base, method):
            estimate = self._device.reuse(dy, base, method.keep)
            zero, estimates = 0, (estimate, estimate)
        elif self._device is not None and (pair := self._device.neighbours(dy, base, method, self.shape[1])):
            zero, estimates = 0, pair
        else:
            live = exact.live_rows(dy)
            zero = 0 if live is None else len(dy) - int(live.sum())
            estimates = reuse.estimates(dy, base, method, live)
        self._memory.renew(
            use,
            dy,
            tokens,
            step,
            source=method.source,
            every=method.refresh_every,
            seed=f"{self.seed}/{self.name}",
        )
        return zero, estimates

    def _sample(
        self, dy: Tensor, x: Tensor | None, method: Sample | Adaptive, use: Use, needed: Tensor | None
    ) -> tuple[int, Estimates]:
        """Estimate dY by rows drawn at random, once for dX and once for dW."""
        gradients = "weight" if isinstance(method, Adaptive) else method.gradients
        _, inputs, outputs = self.shape
        draw = self.next_draw(use)
        wanted = (gradients != "weight", gradients != "input" and x is not None)
        drawn: list[Rows] = []
        if self._device is not None:
            zero = 0  # as far as the host knows
            if any(wanted):
                operands, share, cap = (dy, x if wanted[1] else None), self.share(method), self.cap(method)
                if isinstance(method, Adaptive):
                    self.saved_on_device(share, len(dy), self._device.live_before(len(dy)), inputs * outputs)
                drawn = self._device.draw(
                    *(*operands, number_kept(share, len(dy)), cap, draw),
                    for_dx=wanted[0],
                    share=share if isinstance(method, Adaptive) else None,
                )
        else:
            norms = torch.linalg.vector_norm(dy, dim=1, dtype=wide(dy.dtype))
            if not bool(norms.sum().isfinite()):  # what is not finite must reach the gradient whole
                return 0, (dy, dy)
            self._live = int(norms.count_nonzero())
            zero = len(dy) - self._live
            cap, k = self.cap(method), number_kept(self.share(method), self.shape[0])
            if isinstance(method, Adaptive):
                k = self.saved(self.share(method), self._live, inputs * outputs)
            if wanted[0]:
                drawn.append(sample.rows(norms, k, cap, draw))
            if wanted[1] and x is not None:
                scores = norms * torch.linalg.vector_norm(x, dim=1, dtype=norms.dtype)
                if not bool(scores.sum().isfinite()):  # 0 · inf, or an overflow
                    return 0, (dy, dy)
                drawn.append(sample.rows(scores, k, cap, draw))
        if len(drawn) == 2:
            return zero, (drawn[0], drawn[1])
        # A product is not sampled, or not asked for.
        _, (exactly, _) = self._exactly(dy, needed) if zero or self._device else (0, (dy, dy))
        return zero, (drawn[0] if wanted[0] else exactly, drawn[0] if wanted[1] else exactly)

    def next_draw(self, use: Use) -> sample.Draw:
        """The random numbers of one backward."""
        self._draws += 1
        return sample.Draw(f"{self.seed}/{self.name}/{use}", self._draws - 1)

    def settle(self) -> None:
        for rows in self.carried:
            rows.settle()
        for on_gpu in (self._device, self.planned):
            zero, skipped, flops = (0, 0, 0) if on_gpu is None else on_gpu.settle()
            self.counters.rows_zero += zero
            self.counters.rows_computed -= skipped
            self.counters.flops_backward -= flops
        unneeded, flops = self.on_device.settle()
        self.counters.rows_unneeded += unneeded
        self.counters.flops_forward -= flops

    def forget(self) -> None:
        self._memory.clear()
        self.planned.memory.forget()
        self._needed.clear()

    def state_dict(self) -> dict[str, Any]:
        own = {"draws": self._draws, "looks": self._looks.state(), "live": self._live}
        memory = self.planned if self.planned.used else self._memory
        return {**memory.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memory.load_state_dict(state)
        self.planned.load_state_dict(state)
        self._draws = state.get("draws", 0)
        self._looks.load(state.get("looks", [0, 0]))
        self._live = state.get("live")


def _inputs(x: Tensor | None, w: Tensor | None) -> int:
    """I, of X [N, I] or W [O, I]."""
    return next(operand.shape[1] for operand in (x, w) if operand is not None)
