"""When a training step ends: at an optimizer's step, not at a backward.

Gradient accumulation runs several backwards per step, a GradScaler that sees an overflow runs one and
takes no step, activation checkpointing and graph breaks run several graphs in one. What they all share is
that ``optimizer.step()`` is called once the gradients are used; PyTorch lets us listen to that.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from sparse_compile.settings.adaptive import Adaptive

if TYPE_CHECKING:
    from sparse_compile.schedule import Schedule

_PATIENCE = 100  # backwards without any optimizer step, after which something is wrong

_NO_OPTIMIZER = (
    "no step of a torch.optim optimizer: the schedule stays at step 0. With an optimizer of another kind, "
    "set `backend.step` after each step."
)

_clocks: weakref.WeakSet[Clock] = weakref.WeakSet()


class Clock:
    """Counts the optimizer steps of the models of one backend, and holds the phase of the schedule.

    Args:
        end_of_step: called with the step that ends, before the next one begins.
        shards: gives the parameters of the models whose parameters FSDP2 has sharded, as they are now.

    Attributes:
        step: optimizer steps taken.
        phase: what the schedule says holds now.
        has_optimizer: whether an optimizer that holds a watched parameter has stepped.
    """

    def __init__(
        self,
        schedule: Schedule,
        end_of_step: Callable[[int], None] | None = None,
        shards: Callable[[], Iterable[object]] = tuple,
    ) -> None:
        self._schedule = schedule
        self._end_of_step = end_of_step
        self._shards = shards
        self._parameters: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._backwards = 0  # since the last step
        self._ends_with: int | None = None  # the backward in which optimizers step
        self.has_optimizer = False
        self.step = 0
        _clocks.add(self)

    @property
    def step(self) -> int:
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self.phase = self._schedule.at(step)
        self._step = self.phase.step

    def watch(self, parameters: Iterable[object]) -> None:
        """Add the parameters whose optimizer's steps count."""
        for parameter in parameters:
            self._parameters[parameter] = None

    def owns(self, optimizer: Optimizer) -> bool:
        """Whether it holds a watched parameter, or the shard of one: FSDP2 shows a forward whole parameters,
        and puts the shards, which its optimizer holds, back into the model afterwards."""
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not any(parameter in self._parameters for parameter in held):
            self.watch(self._shards())
        return any(parameter in self._parameters for parameter in held)

    def backward_began(self) -> None:
        self._backwards += 1
        if self._backwards == _PATIENCE and self.step == 0 and self._waits():
            warnings.warn(f"{_PATIENCE} backwards and {_NO_OPTIMIZER}", stacklevel=2)

    @property
    def note(self) -> str:
        """For the report: why the schedule is still at its beginning, if it is."""
        waits = self.step == 0 and self._backwards > 1 and self._waits()
        return f"{self._backwards} backwards and {_NO_OPTIMIZER}" if waits else ""

    def _waits(self) -> bool:
        """Whether anything of the schedule depends on the step."""
        schedule = self._schedule
        adaptive = isinstance(schedule.blocks, Adaptive) or isinstance(schedule.linear, Adaptive)
        return schedule.total_steps is not None or schedule.weight_gradients is not None or adaptive

    def set_step(self, step: int) -> None:
        """Told by the user, for an optimizer that is not PyTorch's: a later step ends the present one, if a
        backward belongs to it."""
        before, self.step = self.step, step
        if self.step > before:
            self._end(before)

    def restart(self, step: int) -> None:
        """Go on from here; backwards before do not belong to it."""
        self.step = step
        self._backwards = 0

    def optimizer_stepped(self) -> None:
        """End the step; or, if optimizers step within a backward, each at its parameter's gradient, when that
        ends. (Of reentrant checkpointing each nested backward is one.)"""
        backward = torch._C._current_graph_task_id()
        if backward < 0:
            self.tick()
        elif backward != self._ends_with:
            self._ends_with = backward
            torch.autograd.Variable._execution_engine.queue_callback(self.tick)

    def tick(self) -> None:
        """End the step, if a backward belongs to it. (Two optimizers for one model make one step.)"""
        if self._backwards:
            self._end(self.step)
            self.step += 1

    def _end(self, step: int) -> None:
        if self._backwards and self._end_of_step is not None:
            self._end_of_step(step)
        self._backwards = 0


@torch.compiler.disable
def _optimizer_stepped(optimizer: Optimizer, args: object, kwargs: object) -> None:
    # A fused optimizer is called by a GradScaler in spite of an overflow, and skips the update by itself.
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and bool(found_inf):
        return
    clocks = list(_clocks)
    owners = [clock for clock in clocks if clock.owns(optimizer)]
    for clock in owners:
        clock.has_optimizer = True
    # The optimizer of FSDP's first version holds shards that no model shows: a stranger's step counts for
    # every clock that never met an optimizer of its own.
    for clock in owners or [clock for clock in clocks if not clock.has_optimizer]:
        clock.optimizer_stepped()


register_optimizer_step_post_hook(_optimizer_stepped)
