"""Compares approximate gradients with the dense ones while a model trains, as often as a `Monitor` says.

    site:  if telemetry := self.watched():       after its gradients are computed, which stay as they are
               telemetry.observe(…)  ─►  a few numbers, left on the device until the report asks for them

Only what is approximate is measured: a site, or one of its two products, that is exact in a backward has no
error, and costs nothing more. Under gradient accumulation, and of a layer that is used several times, the
first approximate backward of a step is measured; if that overflows, nothing is. The measurements are a log
and no part of the backend's state: a resumed run begins a new one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_compile.clock import Clock
from sparse_compile.measurements import Measurement, Measurements
from sparse_compile.methods import fidelity


@dataclasses.dataclass(frozen=True, slots=True)
class Observed:
    """A gradient as a site computed it and as it is, of one shape, and the share of the energy of the output
    gradient, float64 [], that went into it."""

    estimate: Tensor
    exact: Tensor
    energy_kept: Tensor


class Telemetry:
    """The measurements of one backend.

    Args:
        every: of so many optimizer steps the last is measured.
        clock: the backend's.
    """

    def __init__(self, every: int, clock: Clock) -> None:
        self._every = every
        self._clock = clock
        self._last_step: dict[str, int] = {}  # by site
        self._pending: list[tuple[int, str, str, str, Tensor]] = []
        self._measurements: list[Measurement] = []

    def due(self, site: str) -> bool:
        """Whether the present backward of ``site`` is to be measured, if it is approximate."""
        step = self._clock.step
        return self.due_at(step) and self._last_step.get(site) != step

    def due_at(self, step: int) -> bool:
        """Whether anything is to be measured in this step. The last of so many steps, not the first: reuse
        has no base in the very first, and adaptive sampling is exact in steps that are multiples of its own
        interval."""
        return (step + 1) % self._every == 0

    def observe(self, site: str, method: str, gradients: Mapping[str, Observed]) -> None:
        """Measure the approximate gradients of one backward, by name; none if all are exact."""
        for name, seen in gradients.items():
            numbers = (*fidelity.compare(seen.estimate, seen.exact), seen.energy_kept)
            self._pending.append((self._clock.step, site, name, method, torch.stack(numbers)))
            self._last_step[site] = self._clock.step

    def measurements(self) -> Measurements:
        """All of them so far. Waits for the device."""
        pending, self._pending = self._pending, []
        for step, site, gradient, method, numbers in pending:
            cosine, error, energy = numbers.tolist()
            if all(map(math.isfinite, (cosine, error, energy))):  # else an overflow, or there is no gradient
                self._measurements.append(
                    Measurement(
                        step=step,
                        site=site,
                        gradient=gradient,
                        method=method,
                        cosine=cosine,
                        relative_error=error,
                        energy_kept=energy,
                    )
                )
        return Measurements(self._measurements)
