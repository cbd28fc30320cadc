"""An attention on a GPU, decided ahead; see ``plan.py``.

As ``planned_linear.py``: the gradients are those of ``device_attention.py``, decided ahead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sparse_compile.device_attention import WORTH_LOOKING, DeviceAttention, flops_of
from sparse_compile.device_forward import share_skipped
from sparse_compile.kernels import on_device
from sparse_compile.kernels.attention import Gradients
from sparse_compile.kernels.attention_cuda import CudaFused, Queries
from sparse_compile.memory import Use, last_step
from sparse_compile.methods import attention
from sparse_compile.methods.rows import number_kept
from sparse_compile.plan import Choice, Counts, Plan, Seen, hashable, plain
from sparse_compile.planned_memory import PASSED_OVER, Held, PlannedMemory
from sparse_compile.schedule import Phase
from sparse_compile.settings.reuse import Reuse
from sparse_compile.settings.sample import Sample
from sparse_compile.tally import Tally

if TYPE_CHECKING:
    from sparse_compile.attention_site import AttentionSite


@dataclasses.dataclass(frozen=True, slots=True)
class Backward:
    """Of a backward: its shape [B, H, T, D], the number of keys, its FLOPs, and what its time depends on."""

    shape: tuple[int, int, int, int]
    keys: int
    flops: int
    by_kernel: bool
    timed_as: tuple[object, ...] = ()

    @property
    def sizes(self) -> tuple[int, int]:
        """The lengths of the sequences."""
        return self.shape[2], self.keys


class PlannedAttention:
    """What an attention's site does where it is planned."""

    def __init__(self, site: AttentionSite) -> None:
        self._site = site
        self.memory = PlannedMemory()
        self._seen: dict[tuple[int, Hashable], Backward] = {}
        self.device: DeviceAttention | None = None
        self.too_small = False  # to launch anything for
        self._tally = Tally()
        self._counts = Counts()

    @property
    def used(self) -> bool:
        """Whether a backward was planned."""
        return bool(self._seen)

    def size(self, use: Use, shapes: Hashable) -> tuple[int, int]:
        """See :class:`plan.Planned`."""
        last = self._seen.get((use[0], shapes))
        return (0, 0) if last is None else (last.shape[0] * last.shape[2], last.flops)

    def age(self, use: Use, shapes: Hashable, step: int) -> int | None:
        """See :class:`plan.Planned`."""
        last = self._seen.get((use[0], shapes))
        return None if last is None else self.memory.age(use, last.sizes, last.shape[0], step)

    def choose(self, phase: Phase, use: Use, shapes: Hashable, look: bool, seen: Seen) -> Choice:
        """See :class:`plan.Planned`."""
        last, self.too_small = self._seen.get((use[0], shapes)), not seen.worth
        if self._site.left_alone:
            return Choice(left_alone=True)
        if self.too_small:
            return Choice()
        measured = self._site.controller.measures(phase.step)
        method = None if measured else phase.attention
        choice = self._choose_backward(method, use, last, look, seen, phase.step)
        telemetry = self._site.telemetry
        watched = choice.method is not None and telemetry is not None and telemetry.due_at(phase.step)
        return dataclasses.replace(choice, measured=measured, watched=watched)

    def _choose_backward(
        self,
        method: Reuse | Sample | None,
        use: Use,
        last: Backward | None,
        look: bool,
        seen: Seen,
        step: int,
    ) -> Choice:
        if last is None:
            # Whether what needs sizes is done, is not known yet; to draw rows needs none.
            asked = None if self._site.held_back else method
            if asked is not None and (asked.keep == 1.0 or not _keeps_rows(asked)):
                asked = None
            skip = 0 if isinstance(asked, Sample) else seen.skip
            return Choice(asked, look=look or skip > 0, skip=skip)
        if method is None or not self._applies(method, last):
            skip = seen.skip
            worth_looking = last.by_kernel and last.flops >= WORTH_LOOKING
            return Choice(look=look or skip > 0, skip=skip) if worth_looking else Choice()
        if isinstance(method, Sample):
            return Choice(method)
        if not self.memory.has_room(use, last.sizes):
            return Choice(method, look=look)
        age = self.memory.age(use, last.sizes, last.shape[0], step) if seen.finite else None
        if age is None or age == PASSED_OVER:
            return Choice(method, renew=age is None, look=look)
        return Choice(method, recall=True, renew=age + 1 >= method.refresh_every)

    def _applies(self, method: Reuse | Sample, last: Backward) -> bool:
        if method.keep == 1.0 or self._site.held_back or not last.by_kernel:
            return False
        if not _keeps_rows(method):
            return False
        faster = DeviceAttention.is_faster(method, last.timed_as)
        if self.device is not None:
            self.device.slower = not faster  # for the report
        return faster

    def reserve(self, device: torch.device) -> None:
        """Make what launches write to."""
        self._tally.on(device)
        self.memory.reserve(device)

    def prepare(self, plan: Plan, number: int, step: int) -> list[int]:
        """See :class:`plan.Planned`."""
        choice, use, site = plan.choices[number], plan.uses[number], self._site
        last = self._seen.get((use[0], plan.shapes))
        if isinstance(choice.method, Sample):
            draw = site.next_draw(use)
            return [draw.number(), draw.number()]
        if not isinstance(choice.method, Reuse) and not choice.measured:
            self.memory.clear()  # or it would be of long ago, should it be reused again
        if not isinstance(choice.method, Reuse) or last is None:
            return []
        if choice.recall:
            self.memory.recalled(use, last.sizes)
        elif not choice.renew and self.memory.has_room(use, last.sizes):
            self.memory.passed_over(use, last.sizes)
        if not choice.renew:
            return []
        seed = f"{site.seed}/{site.name}/{use}/{self.memory.refreshes + 1}"
        return self.memory.renewed(
            *(use, last.sizes),
            source=choice.method.source,
            samples=last.shape[0],
            until=last_step(step, choice.method.refresh_every),
            seed=seed,
        )

    def launch(self, plan: Plan, number: int, numbers: Tensor, do: Tensor, forward: CudaFused) -> Gradients:
        """(dQ, dK, dV), as :meth:`AttentionSite.backward`. ``numbers`` are those of :meth:`prepare`."""
        site, choice, use = self._site, plan.choices[number], plan.uses[number]
        site.shape, site.method = forward.shape, "dense" if choice.left_alone else "exact"
        rows = forward.shape[0] * forward.shape[2]
        self.device = device = DeviceAttention.of(do, forward, self.device, site.settle, self._tally)
        assert device is not None
        assert plan.status is not None
        flops, by_kernel = flops_of(forward, rows), forward.by_kernel
        timed_as = device.sizes(do, forward)
        self._seen[use[0], plan.shapes] = Backward(forward.shape, forward.keys, flops, by_kernel, timed_as)
        report, computed = plan.status.on_device[number], rows
        queries = None
        if choice.left_alone:
            gradients = forward.backward(do)
        elif isinstance(choice.method, Sample):
            site.method, keep = choice.method.method, cast(float, choice.method.keep)
            device.pays(choice.method, do, forward)
            queries = device.draw(do, forward, keep, choice.method.clip, numbers[:2])
            gradients = device.backward(do, forward, queries)
            computed = number_kept(keep, rows)
        elif isinstance(choice.method, Reuse) and choice.recall:
            site.method = choice.method.method
            queries, gradients = self._reuse(device, do, forward, choice.method, use)
            computed = number_kept(choice.method.keep, rows)
        else:
            gradients = device.backward(do, forward, self._live(choice, do, report))
        if not choice.left_alone:
            site.kernel = device.kernel
        if isinstance(choice.method, Reuse):
            self._remember(choice, choice.method, use, numbers, do, gradients, report)
        computed = computed if site.kernel == "triton" else rows
        self._count(plan, use, forward, computed)
        if choice.watched and queries is not None and (telemetry := site.watched()):
            live = queries.live[:, None, :, None]
            site.observe(telemetry, do, forward, gradients, (live, live, live))
        return gradients

    def _live(self, choice: Choice, do: Tensor, report: Tensor) -> Queries | None:
        """The rows of ``do`` [B, H, T, D] that are not zero, if others are to be skipped."""
        if not choice.look:
            return None
        live = on_device.live_queries(do)
        report[0].copy_(live.sum())
        return Queries(live, None, share_skipped(choice.skip)) if choice.skip else None

    def _reuse(
        self, device: DeviceAttention, do: Tensor, forward: CudaFused, method: Reuse, use: Use
    ) -> tuple[Queries, Gradients]:
        means = self.memory.tensors(use, (forward.shape[2], forward.keys))
        device.pays(method, do, forward)
        queries, rows = device.choose(do, means["do"], method.keep)

        def fill_in(some: Gradients) -> Gradients:
            return attention.fill_in(some, rows, means, on_device.live_queries(some[2]))

        return queries, device.backward(do, forward, queries, fill_in)

    def _remember(
        self,
        choice: Choice,
        method: Reuse,
        use: Use,
        numbers: Tensor,
        do: Tensor,
        gradients: Gradients,
        report: Tensor,
    ) -> None:
        sizes = (do.shape[2], gradients[1].shape[2])
        if choice.renew:
            which = numbers[:1] if method.source == "sample" else None
            new = attention.means_for_rows(do, gradients, which)
            self.memory.renew(use, sizes, new, report[2])
        elif not choice.recall:
            named = zip(attention.REMEMBERED, (do, *gradients), strict=True)
            self.memory.want(use, sizes, {name: (tuple(x.shape[1:]), x.dtype) for name, x in named})

    def _count(self, plan: Plan, use: Use, forward: CudaFused, computed: int) -> None:
        site, shape, keys = self._site, forward.shape, forward.keys
        method, kernel = site.method, site.kernel

        def count(times: int) -> None:
            site.shape, site.method, site.kernel = shape, method, kernel
            site.count(0, computed, keys, products=5, times=times)

        self._counts.each(plan, use, count)

    def settle(self) -> tuple[int, int, int]:
        """As :meth:`DeviceAttention.settle`."""
        self._counts.settle()
        return self._tally.settle()

    def state_dict(self) -> dict[str, Any]:
        """As :class:`Memories`'; and what was seen of batches."""
        snapshots = {
            f"{call}/{lane}": (held.tensors, list(sizes), held.age, held.samples, held.until)
            for (call, lane), sizes, held in self.memory.items()
        }
        sizes = [
            [call, shapes, seen.shape, seen.keys, seen.flops, seen.by_kernel]
            for (call, shapes), seen in self._seen.items()
        ]
        return {"snapshots": snapshots, "draws": self.memory.refreshes, "sizes": plain(sizes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.clear()
        self.memory.refreshes = state.get("draws", 0)
        for call, shapes, shape, *seen in state.get("sizes", []):
            self._seen[call, hashable(shapes)] = Backward(tuple(shape), *seen)
        for key, (tensors, sizes, *held) in state.get("snapshots", {}).items():
            call, lane = key.split("/")
            self.memory.load((int(call), int(lane)), tuple(sizes), Held(tensors, *held))


def _keeps_rows(method: Reuse | Sample) -> bool:
    return isinstance(method, Sample) or method.keeps_rows
