"""An attention while it trains: finds the query rows to compute, and remembers what stands in for others."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from sparse_compile.device_attention import DeviceAttention
from sparse_compile.kernels import attention as kernel
from sparse_compile.kernels import on_device
from sparse_compile.kernels.attention_cuda import CudaFused, Queries
from sparse_compile.memory import Memories, Use, last_step
from sparse_compile.methods import attention, exact, fidelity, sample
from sparse_compile.methods.rows import number_kept
from sparse_compile.plan import TOO_SMALL
from sparse_compile.planned_attention import PlannedAttention
from sparse_compile.schedule import Method, Phase
from sparse_compile.settings.reuse import Reuse
from sparse_compile.settings.sample import Sample
from sparse_compile.site import NOTHING_TO_REUSE, Site
from sparse_compile.telemetry import Observed, Telemetry


class AttentionSite(Site):
    """The backward of one attention; see :class:`Site`. Its shape is that of Q, [B, H, T, D]; a row of its
    output gradient is that of one query of one sample, in all heads."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        self._memories = Memories()
        self._draws = 0
        self._keys, self._stored, self._step = 0, False, 0  # of the last backward
        self._device: DeviceAttention | None = None
        self.planned: PlannedAttention = PlannedAttention(self)

    def backward(
        self,
        do: Tensor,
        forward: kernel.Forward | CudaFused,
        *,
        method: Method | None,
        use: Use = (0, 0),
        step: int = 0,
    ) -> kernel.Gradients:
        """(dQ, dK, dV).

        Args:
            do: [B, H, T, D].
            forward: what the forward left.
            method: what the schedule says of attentions at this step; None is exact.
            use: whose means are reused.
            step: of the training.
        """
        self._step = step
        self.shape, self._keys, self._stored = forward.shape, forward.keys, forward.stored
        if self.left_alone:
            self.method = "dense"
            self._count(0, self._rows, forward)
            return forward.backward(do)
        self._device = DeviceAttention.of(do, forward, self._device, self.settle)
        if isinstance(forward, CudaFused):
            assert self._device is not None
            return self._on_device(self._device, do, forward, method, use)
        self.kernel = ""
        if self.held_back or not isinstance(method, Reuse | Sample) or method.keep == 1.0:
            self.method = "exact"
            if method is not None:  # not in a measurement
                self._memories.clear()  # or it would be of long ago, should it be reused again
            return self._exact(do, forward)
        if not self._pays(method):
            self.method = "exact"
            self._memories.clear()
            return self._exact(do, forward)
        self.method = method.method
        if isinstance(method, Sample):
            return self._sample_rows(do, forward, method, use)
        live = exact.live_queries(do)
        if method.granularity == "row":
            return self._reuse_rows(do, forward, live, method, use)
        return self._reuse_elements(do, forward, live, method, use)

    def _on_device(
        self, device: DeviceAttention, do: Tensor, forward: CudaFused, method: Method | None, use: Use
    ) -> kernel.Gradients:
        """As :meth:`backward`, by methods that need not wait for the device."""
        device.by_kernel, scheduled = forward.by_kernel, method
        if not isinstance(method, Reuse | Sample) or method.keep == 1.0 or self.held_back:
            method = None
        if method is not None and not (device.pays(method, do, forward) and self._pays(method)):
            method = None
        if method is None and scheduled is not None:  # not in a measurement
            self._memories.clear()  # or it would be of long ago, should it be reused again
        self.method = "exact" if method is None else method.method
        if isinstance(method, Reuse):
            queries, gradients = self._reuse_on_device(device, do, forward, method, use)
        elif isinstance(method, Sample):
            keep = cast(float, method.keep)
            queries = device.draw(do, forward, keep, method.clip, self.next_draw(use))
            gradients = device.backward(do, forward, queries)
        else:
            queries = device.live_queries(do, forward)
            gradients = device.backward(do, forward, queries)
        self.kernel = device.kernel
        computed = self._rows
        if queries is not None and queries.weights is not None:
            if self.kernel == "triton":
                computed = number_kept(queries.share, self._rows)
            if telemetry := self.watched():
                live = queries.live[:, None, :, None]
                self.observe(telemetry, do, forward, gradients, (live, live, live))
        # Rows that the device alone has counted are taken off by settle().
        self._count(0, computed, forward)
        return gradients

    def _reuse_on_device(
        self, device: DeviceAttention, do: Tensor, forward: CudaFused, method: Reuse, use: Use
    ) -> tuple[Queries | None, kernel.Gradients]:
        means = self._recall(use, do, forward)
        queries: Queries | None
        if means is None:
            queries = device.live_queries(do, forward)
            gradients = device.backward(do, forward, queries)
        else:
            queries, rows = device.choose(do, means["do"], method.keep)

            def fill_in(some: kernel.Gradients) -> kernel.Gradients:
                return attention.fill_in(some, rows, means, on_device.live_queries(some[2]))

            gradients = device.backward(do, forward, queries, fill_in)
        if self._memories.due(use, method.refresh_every):
            self._remember(attention.means_for_rows(do, gradients, self._sample(method, use)), method, use)
        return queries, gradients

    @staticmethod
    def layer(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[1::2] if len(shape) == 4 else ()

    def settle(self) -> None:
        for on_gpu in (self._device, self.planned):
            zero, skipped, flops = (0, 0, 0) if on_gpu is None else on_gpu.settle()
            self.counters.rows_zero += zero
            self.counters.rows_computed -= skipped
            self.counters.flops_backward -= flops

    def _pays(self, method: Reuse | Sample) -> bool:
        """Whether ``method`` is to be done: not if some rows would cost more than all; a CPU estimates that,
        a GPU has measured it. (Single entries never save time; they are there for comparisons.)"""
        device = self._device or self.planned.device
        if device is not None:
            return not (self._cannot(method) or device.slower)
        size = (self._rows, self._keys, self.shape[3])
        if isinstance(method, Sample):
            return attention.sampling_pays(cast(float, method.keep), *size, stored=self._stored)
        return method.granularity != "row" or attention.reuse_pays(method.keep, *size, stored=self._stored)

    def _cannot(self, method: Reuse | Sample) -> bool:
        """Whether there is no kernel for ``method`` on the GPU that this attention is on."""
        device = self._device or self.planned.device
        if device is None:
            return False
        return not device.by_kernel or (isinstance(method, Reuse) and method.granularity != "row")

    def _exact(self, do: Tensor, forward: kernel.Forward) -> kernel.Gradients:
        """Skip the rows that are zero, if that pays."""
        fewest = exact.fewest_to_skip_in_attention(
            self._rows, forward.keys, self.shape[3], stored=forward.stored
        )
        live = exact.live_queries(do, fewest)
        if live is not None:
            groups = kernel.groups(live)
            computed = _rows_in(groups)
            if self._rows - computed >= fewest:
                self._count(self._rows - int(live.sum()), computed, forward)
                return forward.backward_of_rows(do, groups)
        self._count(0, self._rows, forward)
        return forward.backward(do)

    def _sample_rows(self, do: Tensor, forward: kernel.Forward, method: Sample, use: Use) -> kernel.Gradients:
        drawn = attention.draw_rows(do, cast(float, method.keep), method.clip, self.next_draw(use))
        if drawn is None:
            return self._exact(do, forward)
        weights, zero = drawn
        groups = kernel.groups(weights != 0)
        self._count(zero, _rows_in(groups), forward)
        gradients = forward.backward_of_rows((do * weights[:, None, :, None]).to(do.dtype), groups)
        if telemetry := self.watched():
            kept = (weights != 0)[:, None, :, None]
            self.observe(telemetry, do, forward, gradients, (kept, kept, kept))
        return gradients

    def next_draw(self, use: Use) -> sample.Draw:
        """The random numbers of one backward."""
        self._draws += 1
        return sample.Draw(f"{self.seed}/{self.name}/{use}", self._draws - 1)

    def _reuse_rows(
        self, do: Tensor, forward: kernel.Forward, live: Tensor | None, method: Reuse, use: Use
    ) -> kernel.Gradients:
        means = self._recall(use, do, forward)
        if means is None:
            gradients = self._exact(do, forward)
        else:
            rows = attention.choose_rows(do, means["do"], method.keep, live)
            groups = kernel.groups(rows.computed)
            self._count(0 if live is None else self._rows - int(live.sum()), _rows_in(groups), forward)
            gradients = forward.backward_of_rows(do, groups)
            gradients = attention.fill_in(gradients, rows, means, exact.live_queries(gradients[2]))
            if telemetry := self.watched():
                kept = rows.computed[:, None, :, None]
                self.observe(telemetry, do, forward, gradients, (kept, kept, kept))
        if self._memories.due(use, method.refresh_every):
            self._remember(attention.means_for_rows(do, gradients, self._sample(method, use)), method, use)
        return gradients

    def _reuse_elements(
        self, do: Tensor, forward: kernel.Forward, live: Tensor | None, method: Reuse, use: Use
    ) -> kernel.Gradients:
        means = self._recall(use, do, forward)
        written_out = forward.written_out()
        gradients, ds = attention.by_elements(do, written_out, means, method, live)
        self._count(0, self._rows, forward)
        if self._memories.due(use, method.refresh_every):
            renewed = attention.means_for_elements(do, ds, written_out, self._sample(method, use))
            self._remember(renewed, method, use)
        gradients = forward.like_gradients(gradients)
        if means is not None and (telemetry := self.watched()):
            for_da, for_dv = attention.kept_entries(do, means, method, live)
            self.observe(telemetry, do, forward, gradients, (for_da, for_da, for_dv))
        return gradients

    def observe(
        self,
        telemetry: Telemetry,
        do: Tensor,
        forward: kernel.Forward | CudaFused,
        gradients: kernel.Gradients,
        kept: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Compare gradients with those of the whole of dO; ``kept`` is what each of them takes from it."""
        whole = zip(("dQ", "dK", "dV"), gradients, forward.backward(do), kept, strict=True)
        seen = {
            name: Observed(some, exact, fidelity.energy_in(do, part)) for name, some, exact, part in whole
        }
        telemetry.observe(self.name, self.method, seen)

    def _recall(self, use: Use, do: Tensor, forward: kernel.Forward | CudaFused) -> dict[str, Tensor] | None:
        sizes = (self.shape[2], forward.keys)
        another = self._memories.has_another(use, do, sizes)
        means = self._memories.recall(use, do, sizes, self._step)
        self.recalled(use, means is not None, another)
        return means

    def _remember(self, renewed: dict[str, Tensor], method: Reuse, use: Use) -> None:
        sizes, until = (self.shape[2], self._keys), last_step(self._step, method.refresh_every)
        self._memories.remember(use, renewed, sizes, samples=self.shape[0], until=until)

    def _sample(self, method: Reuse, use: Use) -> int | None:
        if method.source == "mean":
            return None
        return self._memories.draw(self.shape[0], f"{self.seed}/{self.name}/{use}")

    @property
    def _rows(self) -> int:
        return self.shape[0] * self.shape[2]

    def keep(self, phase: Phase) -> float:
        method = phase.attention
        if self.left_alone or self.held_back or method is None or self.note(phase):
            return 1.0
        return round(cast(float, method.keep), 6)

    def note(self, phase: Phase) -> str:
        method = phase.attention
        if self.planned.too_small and not self.left_alone:
            return TOO_SMALL
        if self.finds_nothing_to_reuse(method):
            return NOTHING_TO_REUSE
        if not self.shape or method is None or method.keep == 1.0 or self._pays(method):
            return ""
        if self._cannot(method):
            return "on a GPU attention computes whole rows alone, by Triton: only zero rows are skipped"
        name = "sampling" if isinstance(method, Sample) else "reuse"
        return f"{name} would cost more than it saves at this size and keep: only zero rows are skipped"

    def _count(self, zero: int, computed: int, forward: kernel.Forward | CudaFused) -> None:
        self.count(zero, computed, forward.keys, products=4 if forward.stored else 5)

    def count(self, zero: int, computed: int, keys: int, *, products: int, times: int = 1) -> None:
        """Count a backward: how many rows are zero, and computed, how many keys there are, and products."""
        _, heads, _, features = self.shape
        flops = 2 * times * keys * heads * features  # of one row in one product
        self.counters.backwards += times
        self.counters.rows += times * self._rows
        self.counters.rows_zero += times * zero
        self.counters.rows_computed += times * computed
        self.counters.flops_forward_dense += 2 * flops * self._rows
        self.counters.flops_forward += 2 * flops * self._rows
        self.counters.flops_backward_dense += products * flops * self._rows
        self.counters.flops_backward += products * flops * computed

    def forget(self) -> None:
        self._memories.clear()
        self.planned.memory.forget()

    def state_dict(self) -> dict[str, Any]:
        memory = self.planned if self.planned.used else self._memories
        return {**memory.state_dict(), "rows_drawn": self._draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memories.load_state_dict(state)
        self.planned.load_state_dict(state)
        self._draws = state.get("rows_drawn", 0)


def _rows_in(groups: list[kernel.Group]) -> int:
    """How many rows are computed, those that fill up included."""
    return sum(group.queries.numel() for group in groups)
