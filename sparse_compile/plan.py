"""What the sites of a graph do in a step, decided before it runs: for CUDA graphs, and for what is launched
again without asking (``replay.py``).

A CUDA graph that was recorded launches the same kernels at the same addresses at each replay, and no code of
ours runs. So what is decided from step to step is taken out of the ops:

    choose    before a forward: what each site does in this step, as far as the host decides it. Equal choices
              are one *plan*, with a number. The compiled graph is called with that number, and PyTorch
              records a CUDA graph for each value of a number that a graph is called with.
    prepare   an op at the head of each forward and backward, outside of what is recorded: it does what is to
              be done at every step (draws random numbers, counts, tells the clock), and returns the numbers
              that change, in a tensor on the GPU, which is an input of what was recorded.
    launch    the ops themselves: they look up the plan, and launch kernels. A replay needs them no more.

A changed plan (another phase, a first base, rows that pay to be skipped) is recorded when it first comes
up, and found again when it comes back; nothing is compiled anew. What sites remember lies at addresses
that stay (:class:`Status`, ``planned_memory.py``).
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from sparse_compile.later import Later
from sparse_compile.memory import Use
from sparse_compile.replay import Programs
from sparse_compile.schedule import Phase, Schedule
from sparse_compile.settings.adaptive import Adaptive
from sparse_compile.settings.monitor import Monitor
from sparse_compile.settings.reuse import Reuse
from sparse_compile.settings.sample import Sample

RECORDED = "ops are part of CUDA graphs"
CALLED = 'ops are called one by one: where the host is the slower part, mode="reduce-overhead" records them'
# Why a site is left dense.
TOO_SMALL = (
    "the host is slower to launch a few rows than a GPU to compute them all: no row is skipped; "
    'mode="reduce-overhead" records what is launched'
)
NUMBERS = 4  # of each site, that change from step to step
# The first number of a plan: one that is not the size of anything, or the two would become one symbol.
_FIRST = 1_000_003

_numbers = itertools.count(_FIRST)
_plans: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


def refusal(schedule: Schedule, monitor: Monitor | None, *, recorded: bool) -> str | None:
    """Why what a schedule does cannot be decided ahead, or None: it can be.

    Each op then decides for itself. ``recorded``: between CUDA graphs, in which nothing can be measured.
    """
    if schedule.weight_gradients is not None:
        return "weight gradients leave the graph"
    if isinstance(schedule.linear, Reuse) and not schedule.linear.keeps_rows:
        return "single entries are reused"
    if recorded and monitor is not None:
        return "gradients are measured"
    if recorded and any(isinstance(method, Adaptive) for method in (schedule.linear, schedule.blocks)):
        return "shares are adapted to what is measured"
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """What one site does in a step.

    Attributes:
        method: what estimates its output gradient; None is exact.
        share: of the samples that go on behind a block; or of the rows that are not zero, if it is adaptive.
        cap: on the weights of what is drawn by an adaptive share.
        measured: the controller of adaptive sampling looks at it.
        watched: a monitor compares it with the exact gradient.
        left_alone: it is done densely.
        recall: there is a base.
        renew: the base is renewed.
        look: the rows that are zero are counted.
        skip: and skipped: 1 more than the share of the others, in eighths; 0 is not.
        count_mask, skip_mask: the same of rows that no output needs, if its forward makes the mask of them.
    """

    method: Reuse | Sample | Adaptive | None = None
    share: float = 1.0
    cap: float | None = None
    measured: bool = False
    watched: bool = False
    left_alone: bool = False
    recall: bool = False
    renew: bool = False
    look: bool = False
    skip: int = 0
    count_mask: bool = False
    skip_mask: int = 0


class Seen(NamedTuple):
    """What the device has reported of a site: whether to skip rows that are zero, and those that no output
    needs (as :class:`Choice` has it), whether what it remembered last was finite; whether it is worth
    launching anything for; and whether its forward makes a mask, as far as is known."""

    skip: int = 0
    skip_mask: int = 0
    finite: bool = True
    worth: bool = True
    makes_mask: bool = True


class Planned(Protocol):
    """The part of a site that decides and prepares."""

    def choose(self, phase: Phase, use: Use, shapes: Hashable, look: bool, seen: Seen) -> Choice:
        """What it would do in a step. Changes nothing.

        Args:
            phase: what the schedule says of it.
            use: which use of the layer it is.
            shapes: those of the graph's inputs.
            look: whether rows that are zero are to be counted.
            seen: what the device has reported of it last.
        """
        ...

    def size(self, use: Use, shapes: Hashable) -> tuple[int, int]:
        """How many rows it has, or 0: none has been seen yet; and the FLOPs of its backward."""
        ...

    def age(self, use: Use, shapes: Hashable, step: int) -> int | None:
        """Of what it remembers for batches of such shapes, in backwards; None if it is nothing."""
        ...

    def reserve(self, device: torch.device) -> None:
        """Make what launches write to, outside of the memory of a CUDA graph."""
        ...

    def prepare(self, plan: Plan, number: int, step: int) -> list[int]:
        """What is to be done at each backward, for the site with this number, in this step. Returns what its
        launches read, NUMBERS at most."""
        ...


class NotPlanned:
    """The part of a site whose op is not recorded."""

    def choose(self, phase: Phase, use: Use, shapes: Hashable, look: bool, seen: Seen) -> Choice:
        return Choice()

    def size(self, use: Use, shapes: Hashable) -> tuple[int, int]:
        return 0, 0

    def age(self, use: Use, shapes: Hashable, step: int) -> int | None:
        return None

    def reserve(self, device: torch.device) -> None:
        pass

    def prepare(self, plan: Plan, number: int, step: int) -> list[int]:
        return []


@dataclasses.dataclass(slots=True, weakref_slot=True)
class Plan:
    """What all sites of a graph do in a step.

    Attributes:
        number: that the graph is called with.
        shapes: those of the graph's inputs.
        sites: of the graph, by their numbers. None until the graph has run once, and they are known.
        uses, choices: of each site.
        status: what its launches report to, on their GPU.
        programs: what its ops launched.
        backwards: how many were run.
        turn: the order of the last one among those of all plans.
        gone: it is not used any more.
        observed: the host looks at some of what it computes.
    """

    number: int
    shapes: Hashable
    sites: Sequence[Any] = ()
    uses: Sequence[Use] = ()
    choices: tuple[Choice, ...] = ()
    status: Status | None = None
    programs: Programs = dataclasses.field(default_factory=Programs)
    backwards: int = 0
    turn: int = 0
    gone: bool = False
    observed: bool = False


class Counts:
    """As what the backwards of one site are counted. A replay runs no code of a site, so each plan counts its
    backwards, and they are multiplied when somebody asks."""

    def __init__(self) -> None:
        self._each: dict[tuple[int, Use], tuple[Plan, int, Callable[[int], None]]] = {}

    def each(self, plan: Plan, use: Use, count: Callable[[int], None]) -> None:
        """Count the backward that has begun, and all to come under the plan, by ``count(times)``."""
        begun = plan.backwards - 1
        if (plan.number, use) in self._each:
            _, counted, before = self._each[plan.number, use]
            if begun > counted:
                before(begun - counted)
        elif any(each.gone for each, *_ in self._each.values()):
            self.settle()
        self._each[plan.number, use] = plan, begun, count

    def settle(self) -> None:
        """Count what has not been counted yet; the last backward last. What is gone is then forgotten."""
        for key, (plan, counted, count) in sorted(self._each.items(), key=lambda item: item[1][0].turn):
            if plan.backwards > counted:
                self._each[key] = plan, plan.backwards, count
                count(plan.backwards - counted)
            if plan.gone:
                del self._each[key]


class Status:
    """What the sites of a graph report from the device, of batches of one size: int64 [sites, 3] at an
    address that stays, of each how many rows of its last output gradient were not zero, how many rows its
    forward needed (−1: nobody looked), and whether what it remembered last was finite.

    The host reads it one step later, when it has long arrived.
    """

    def __init__(self, sites: int, device: torch.device) -> None:
        self._seen = [[-1, -1, 1] for _ in range(sites)]
        self.on_device = torch.tensor(self._seen, dtype=torch.int64, device=device)
        self._on_the_way: Later | None = None

    @property
    def known(self) -> list[list[int]]:
        """What was sent before, and read by :meth:`seen`."""
        return self._seen

    def send(self) -> None:
        """Start what is there now on its way to the host."""
        self._on_the_way = Later(self.on_device if self.on_device.is_cuda else self.on_device.clone())

    def seen(self) -> list[list[int]]:
        """What was sent last."""
        if self._on_the_way is not None:
            self._seen, self._on_the_way = self._on_the_way.values(), None
        return self._seen


def new_plan(shapes: Hashable) -> Plan:
    """A plan that nothing is known of yet."""
    plan = Plan(next(_numbers), shapes)
    _plans[plan.number] = plan
    return plan


def made(number: int) -> Plan | None:
    """The plan with this number, of which nothing may be known yet; None if its backend is gone."""
    return _plans.get(number)


def find(number: int) -> Plan | None:
    """The plan with this number; None if its backend is gone, or its graph belongs to none."""
    plan = made(number)
    return plan if plan is not None and plan.choices else None


def plain(value: Any) -> Any:
    """Nested tuples as nested lists, for a state dict."""
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def hashable(value: Any) -> Hashable:
    """And back again."""
    return tuple(hashable(each) for each in value) if isinstance(value, list | tuple) else value
