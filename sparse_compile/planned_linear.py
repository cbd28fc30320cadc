"""A linear layer on a GPU, decided ahead; see ``plan.py``.

The gradients are those of ``device_linear.py``, which does the work: what is different is who decides when.
What depends on the sizes of dY is decided by what was seen of them in an earlier step of the same shapes: in
the first one nothing is reused, and in the second one remembered. And a first base that is not finite (an
overflow under a GradScaler, whose step is skipped) is noticed two steps later: until then rows that are not
kept count as zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_compile.device_forward import Needed
from sparse_compile.device_linear import WORTH_LOOKING, DeviceLinear
from sparse_compile.kernels import linear as aten
from sparse_compile.kernels import on_device
from sparse_compile.memory import Use, last_step
from sparse_compile.methods.rows import Estimate, Rows, number_kept
from sparse_compile.plan import NUMBERS, Choice, Counts, Plan, Seen, hashable, plain
from sparse_compile.planned_memory import PASSED_OVER, Held, PlannedMemory
from sparse_compile.schedule import Phase
from sparse_compile.settings.adaptive import Adaptive
from sparse_compile.settings.reuse import Reuse
from sparse_compile.settings.sample import Sample
from sparse_compile.tally import Tally

if TYPE_CHECKING:
    from sparse_compile.linear_site import LinearSite


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Of a backward: N, I, O, the rows of a sample, and whether X and W are there."""

    n: int
    inputs: int
    outputs: int
    tokens: int
    has_x: bool
    has_w: bool

    @property
    def samples(self) -> int:
        return self.n // max(self.tokens, 1)


class PlannedLinear:
    """What a linear's site keeps where it is planned."""

    def __init__(self, site: LinearSite) -> None:
        self._site = site
        self.memory = PlannedMemory()
        self._sizes: dict[tuple[int, Hashable], Sizes] = {}
        self.device: DeviceLinear | None = None
        self.too_small = False  # to launch anything for
        self._tally = Tally()
        self._counts = Counts()

    @property
    def used(self) -> bool:
        """Whether a backward was planned."""
        return bool(self._sizes)

    def size(self, use: Use, shapes: Hashable) -> tuple[int, int]:
        """See :class:`plan.Planned`."""
        sizes = self._sizes.get((use[0], shapes))
        return (0, 0) if sizes is None else (sizes.n, 4 * sizes.n * sizes.inputs * sizes.outputs)

    def age(self, use: Use, shapes: Hashable, step: int) -> int | None:
        """See :class:`plan.Planned`."""
        sizes = self._sizes.get((use[0], shapes))
        return None if sizes is None else self.memory.age(use, (sizes.tokens,), sizes.samples, step)

    def choose(self, phase: Phase, use: Use, shapes: Hashable, look: bool, seen: Seen) -> Choice:
        """See :class:`plan.Planned`."""
        site, sizes, self.too_small = self._site, self._sizes.get((use[0], shapes)), not seen.worth
        measured = site.controller.measures(phase.step) and not site.left_alone
        if site.left_alone or self.too_small:
            choice = Choice(left_alone=True)
        else:
            method = None if measured or site.held_back else phase.linear
            choice = self._choose_backward(method, use, sizes, look, seen, phase.step)
        due = site.telemetry is not None and site.telemetry.due_at(phase.step)
        return dataclasses.replace(
            choice,
            measured=measured,
            watched=choice.method is not None and due,
            # Also of one that is left alone: other linears may share its mask. And where none was counted
            # yet, as of most linears, which make none.
            count_mask=sizes is None or not seen.makes_mask or look or seen.skip_mask > 0,
            skip_mask=seen.skip_mask,
        )

    def _choose_backward(
        self,
        method: Reuse | Sample | Adaptive | None,
        use: Use,
        sizes: Sizes | None,
        look: bool,
        seen: Seen,
        step: int,
    ) -> Choice:
        site, skip = self._site, seen.skip
        share = 1.0 if method is None else site.share(method)
        if method is None or share == 1.0 or not self._pays(method, share, sizes):
            if sizes is not None and 4 * sizes.n * sizes.inputs * sizes.outputs < WORTH_LOOKING:
                return Choice()
            return Choice(look=look or skip > 0, skip=skip)
        if isinstance(method, Adaptive):
            return Choice(method, share, site.cap(method), look=look or skip > 0, skip=skip)
        if isinstance(method, Sample):
            # The product that is not sampled is exact.
            exactly = method.gradients != "both"
            return Choice(method, look=exactly and (look or skip > 0), skip=skip if exactly else 0)
        if sizes is None:  # whether it is reused, is not known yet
            return Choice(method, look=look or skip > 0, skip=skip)
        if not _few(method, sizes) or not self.memory.has_room(use, (sizes.tokens,)):
            return Choice(method, look=look)
        age = self.memory.age(use, (sizes.tokens,), sizes.samples, step) if seen.finite else None
        if age is None or age == PASSED_OVER:
            return Choice(method, renew=age is None, look=look)
        return Choice(method, recall=True, renew=age + 1 >= method.refresh_every)

    def _pays(self, method: Reuse | Sample | Adaptive, share: float, sizes: Sizes | None) -> bool:
        if sizes is None or self.device is None:
            return True
        return self.device.pays(method, share, (sizes.n, sizes.inputs, sizes.outputs))

    def reserve(self, device: torch.device) -> None:
        """Make what launches write to."""
        self._tally.on(device)
        self._site.on_device.reserve(device)
        self.memory.reserve(device)

    def prepare(self, plan: Plan, number: int, step: int) -> list[int]:
        """See :class:`plan.Planned`."""
        choice, use = plan.choices[number], plan.uses[number]
        sizes = self._sizes.get((use[0], plan.shapes))
        if isinstance(choice.method, Adaptive) and sizes is not None:
            assert plan.status is not None
            alive = plan.status.known[number][0]
            live = sizes.n if alive < 0 else alive
            self._site.saved_on_device(choice.share, sizes.n, live, sizes.inputs * sizes.outputs)
        if isinstance(choice.method, Sample | Adaptive):
            draw = self._site.next_draw(use)
            return [draw.number() for _ in range(NUMBERS)]
        if not isinstance(choice.method, Reuse) and not choice.measured:
            self.memory.clear()  # or it would be of long ago, should it be reused again
        if not isinstance(choice.method, Reuse) or sizes is None:
            return []
        if choice.recall:
            self.memory.recalled(use, (sizes.tokens,))
        elif not choice.renew and self.memory.has_room(use, (sizes.tokens,)):
            self.memory.passed_over(use, (sizes.tokens,))
        if not choice.renew:
            return []
        seed = f"{self._site.seed}/{self._site.name}/{use}/{self.memory.refreshes}"
        return self.memory.renewed(
            *(use, (sizes.tokens,)),
            source=choice.method.source,
            samples=sizes.samples,
            until=last_step(step, choice.method.refresh_every),
            seed=seed,
        )

    def launch(
        self,
        plan: Plan,
        number: int,
        numbers: Tensor,
        dy: Tensor,
        x: Tensor | None,
        w: Tensor | None,
        *,
        tokens: int,
        dw_transposed: bool,
        needed: Needed | None,
    ) -> tuple[aten.DistinctRows | None, Tensor | None]:
        """(dX, dW), as :meth:`LinearSite.linear_backward`. Decides nothing.

        Args:
            numbers: int64 [NUMBERS], those of :meth:`prepare`, on the device.
            needed: the rows that the forward needed, if those are all that is computed.
        """
        site, choice, use = self._site, plan.choices[number], plan.uses[number]
        inputs = next(t.shape[1] for t in (x, w) if t is not None)
        if tokens < 0 and isinstance(choice.method, Reuse) and len(dy):
            if needed is not None:
                site.on_device.count(needed, len(dy), 2 * inputs * dy.shape[1])
            turned = None if x is None else aten.by_sample(x, -tokens)
            dx, dw = self.launch(
                *(plan, number, numbers, aten.by_sample(dy, -tokens), turned, w),
                tokens=len(dy) // -tokens,
                dw_transposed=dw_transposed,
                needed=None,
            )
            return None if dx is None else aten.by_token(dx, -tokens), dw
        per_sample = tokens if tokens >= 0 else len(dy) // -tokens
        sizes = Sizes(len(dy), inputs, dy.shape[1], per_sample, x is not None, w is not None)
        self._sizes[use[0], plan.shapes] = sizes
        site.shape = (sizes.n, inputs, sizes.outputs)
        site.method = "dense" if choice.left_alone else "exact"
        self.device = DeviceLinear.of(dy, self.device, site.settle, self._tally)
        if choice.left_alone or self.device is None:
            self._count(plan, use, sizes, [sizes.n, sizes.n])
            dx, dw = aten.backward(dy, x, w, dy, dy, dw_transposed=dw_transposed)
            if choice.measured:
                site.measure(dy, x, dw, tokens)
            return dx, dw
        self.device.needed = needed
        if needed is not None:
            site.on_device.count(needed, sizes.n, 2 * inputs * sizes.outputs)
        assert plan.status is not None
        report = plan.status.on_device[number]
        for_dx, for_dw = self._estimates(choice, use, numbers, dy, x, tokens, report)
        dx, dw = self.device.backward(dy, x, w, for_dx, for_dw, dw_transposed=dw_transposed)
        site.kernel, self.device.needed = self.device.kernel, None
        if isinstance(choice.method, Reuse):
            self._remember(choice, choice.method, use, numbers, dy, sizes, report)
        computed = [e.computed if isinstance(e, Rows) else sizes.n for e in (for_dx, for_dw)]
        self._count(plan, use, sizes, computed)
        if choice.watched and (telemetry := site.watched()):
            site.observe(telemetry, dy, x, w, (for_dx, for_dw), (dx, dw), dw_transposed)
        if choice.measured:
            site.measure(dy, x, dw, tokens)
        return dx, dw

    def _estimates(
        self,
        choice: Choice,
        use: Use,
        numbers: Tensor,
        dy: Tensor,
        x: Tensor | None,
        tokens: int,
        report: Tensor,
    ) -> tuple[Estimate, Estimate]:
        """dY [N, O], as the choice has it, for dX and for dW. ``report`` int64 [3] is this site's status."""
        assert self.device is not None
        site, device, method = self._site, self.device, choice.method
        shape = (len(dy), *site.shape[1:])
        if isinstance(method, Reuse) and choice.recall:
            site.method = method.method
            device.pays(method, method.keep, shape)
            rows = device.reuse(dy, self.memory.tensors(use, (tokens,))["base"], method.keep)
            return rows, rows
        if isinstance(method, Reuse):
            return self._exactly(choice, dy, report)
        if isinstance(method, Sample | Adaptive):
            adaptive = isinstance(method, Adaptive)
            gradients = "weight" if isinstance(method, Adaptive) else method.gradients
            share, cap = (choice.share, choice.cap) if adaptive else (site.share(method), site.cap(method))
            wanted = (gradients != "weight", gradients != "input" and x is not None)
            device.pays(method, share, shape)
            site.method = method.method
            exactly, _ = (dy, dy) if all(wanted) else self._exactly(choice, dy, report)
            if not any(wanted):
                return exactly, exactly
            drawn = device.draw(
                *(dy, x if wanted[1] else None, number_kept(share, len(dy)), cap, numbers),
                for_dx=wanted[0],
                share=share if adaptive else None,
            )
            if adaptive and not choice.look and device.alive is not None:
                report[:1].copy_(device.alive)
            return drawn[0] if wanted[0] else exactly, drawn[-1] if wanted[1] else exactly
        return self._exactly(choice, dy, report)

    def _exactly(self, choice: Choice, dy: Tensor, report: Tensor) -> tuple[Estimate, Estimate]:
        assert self.device is not None
        if (rows := self.device.needed_rows()) is not None:
            return rows, rows
        if not choice.look:
            return dy, dy
        rows = on_device.live_rows(dy)
        assert rows.count is not None
        report[:1].copy_(rows.count)
        if not choice.skip:
            return dy, dy
        self.device.needed = Needed.of(rows, choice.skip)
        return rows, rows

    def _remember(
        self,
        choice: Choice,
        method: Reuse,
        use: Use,
        numbers: Tensor,
        dy: Tensor,
        sizes: Sizes,
        report: Tensor,
    ) -> None:
        of = (sizes.tokens,)
        if choice.renew:
            which = numbers[:1] if method.source == "sample" else None
            on_device.renew_base(dy, self.memory.tensors(use, of)["base"], which, report[2:])
        elif not choice.recall and _few(method, sizes):
            self.memory.want(use, of, {"base": ((sizes.tokens, sizes.outputs), dy.dtype)})

    def _count(self, plan: Plan, use: Use, sizes: Sizes, computed: list[int]) -> None:
        site = self._site
        asked = [k for k, there in zip(computed, (sizes.has_w, sizes.has_x), strict=True) if there]
        method, kernel = site.method, site.kernel

        def count(times: int) -> None:
            site.shape, site.method, site.kernel = (sizes.n, sizes.inputs, sizes.outputs), method, kernel
            site.count(0, asked, times)

        self._counts.each(plan, use, count)

    def settle(self) -> tuple[int, int, int]:
        """As :meth:`DeviceLinear.settle`."""
        self._counts.settle()
        return self._tally.settle()

    def state_dict(self) -> dict[str, Any]:
        """As :class:`Memory`'s; and what was seen of batches."""
        bases = {
            f"{call}/{lane}": (held.tensors["base"], held.age, held.samples, held.until)
            for (call, lane), _, held in self.memory.items()
        }
        sizes = [[call, shapes, *dataclasses.astuple(seen)] for (call, shapes), seen in self._sizes.items()]
        return {"bases": bases, "refreshes": self.memory.refreshes, "sizes": plain(sizes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.clear()
        self.memory.refreshes = state.get("refreshes", 0)
        for call, shapes, *seen in state.get("sizes", []):
            self._sizes[call, hashable(shapes)] = Sizes(*seen)
        for key, (value, age, samples, until) in state.get("bases", {}).items():
            call, lane = key.split("/")
            held = Held({"base": value}, age, samples, until)
            self.memory.load((int(call), int(lane)), (len(value),), held)


def _few(method: Reuse, sizes: Sizes) -> bool:
    """Whether reuse leaves so few distinct rows that it saves anything."""
    if sizes.n == 0 or sizes.n % sizes.tokens:
        return False
    return number_kept(method.keep, sizes.n) + sizes.tokens <= aten.DENSE_SHARE * sizes.n
