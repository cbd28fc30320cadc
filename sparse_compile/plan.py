"""What the sites of a graph do in a step, decided before it runs: for CUDA graphs.

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
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sparse_compile.changes import changes
from sparse_compile.device_forward import skipped
from sparse_compile.kernels.choice import device_alone
from sparse_compile.later import Later
from sparse_compile.looks import Looks
from sparse_compile.memory import Use
from sparse_compile.replay import Programs, worth_launching
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
# Steps between two looks for rows that are zero, at most. They are looked for in all layers at once, or every
# combination of layers would be a plan.
_LONGEST_PAUSE = 15
# Plans for batches of one size, beyond which it is decided no more which rows are skipped.
_MANY = 16
# The first number of a plan: one that is not the size of anything, or the two would become one symbol.
_FIRST = 1_000_003

_numbers = itertools.count(_FIRST)
_turns = itertools.count(1)
_plans: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


def refusal(schedule: Schedule, monitor: Monitor | None) -> str | None:
    """Why what a schedule does cannot be recorded, or None: it can be.

    What cannot be runs between CUDA graphs, each op for itself.
    """
    if schedule.weight_gradients is not None:
        return "weight gradients leave the graph"
    if monitor is not None:
        return "gradients are measured"
    if any(isinstance(method, Adaptive) for method in (schedule.linear, schedule.blocks)):
        return "shares are adapted to what is measured"
    if isinstance(schedule.linear, Reuse) and not schedule.linear.keeps_rows:
        return "single entries are reused"
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """What one site does in a step.

    Attributes:
        method: what estimates its output gradient; None is exact.
        share: of the samples that go on behind a block.
        left_alone: it is done densely.
        recall: there is a base.
        renew: the base is renewed.
        look: the rows that are zero are counted.
        skip: and skipped: 1 more than the share of the others, in eighths; 0 is not.
        count_mask, skip_mask: the same of rows that no output needs, if its forward makes the mask of them.
    """

    method: Reuse | Sample | None = None
    share: float = 1.0
    left_alone: bool = False
    recall: bool = False
    renew: bool = False
    look: bool = False
    skip: int = 0
    count_mask: bool = False
    skip_mask: int = 0


class Seen(NamedTuple):
    """What the device has reported of a site: whether to skip rows that are zero, and those that no output
    needs (as :class:`Choice` has it), whether what it remembered last was finite; and whether it is worth
    launching anything for."""

    skip: int = 0
    skip_mask: int = 0
    finite: bool = True
    worth: bool = True


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

    def age(self, use: Use, shapes: Hashable) -> int | None:
        """Of what it remembers, in backwards; None if it is nothing."""
        ...

    def reserve(self, device: torch.device) -> None:
        """Make what launches write to, outside of the memory of a CUDA graph."""
        ...

    def prepare(self, plan: Plan, number: int) -> list[int]:
        """What is to be done at each backward, for the site with this number. Returns what its launches read
        in this one, NUMBERS at most."""
        ...


class NotPlanned:
    """The part of a site whose op is not recorded."""

    def choose(self, phase: Phase, use: Use, shapes: Hashable, look: bool, seen: Seen) -> Choice:
        return Choice()

    def size(self, use: Use, shapes: Hashable) -> tuple[int, int]:
        return 0, 0

    def age(self, use: Use, shapes: Hashable) -> int | None:
        return None

    def reserve(self, device: torch.device) -> None:
        pass

    def prepare(self, plan: Plan, number: int) -> list[int]:
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
    """

    number: int
    shapes: Hashable
    sites: Sequence[Any] = ()
    uses: Sequence[Use] = ()
    choices: Sequence[Choice] = ()
    status: Status | None = None
    programs: Programs = dataclasses.field(default_factory=Programs)
    backwards: int = 0
    turn: int = 0


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
        self._each[plan.number, use] = plan, begun, count

    def settle(self) -> None:
        """Count what has not been counted yet; the last backward last."""
        for key, (plan, counted, count) in sorted(self._each.items(), key=lambda item: item[1][0].turn):
            if plan.backwards > counted:
                self._each[key] = plan, plan.backwards, count
                count(plan.backwards - counted)


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

    def send(self) -> None:
        """Start what is there now on its way to the host."""
        self._on_the_way = Later(self.on_device if self.on_device.is_cuda else self.on_device.clone())

    def seen(self) -> list[list[int]]:
        """What was sent last."""
        if self._on_the_way is not None:
            self._seen, self._on_the_way = self._on_the_way.values(), None
        return self._seen


class Case:
    """What is known of the steps on batches of one size, in one lane and on one device.

    Attributes:
        status: what was reported by the last one.
        looks: when rows that are zero are counted.
        skipped: which are skipped: skip and skip_mask of each site.
        plans: by what each site does in it.
        sizes: how many rows each site has, and whether they are worth launching anything for; and at which
            change that was found.
        settled: the last plan, and what it was decided by; where that is the same again, so is the plan.
    """

    def __init__(self, sites: int, device: torch.device) -> None:
        self.status = Status(sites, device)
        self.looks = Looks(_LONGEST_PAUSE)
        self.skipped: list[tuple[int, int]] | None = None
        self.plans: dict[tuple[Choice, ...], Plan] = {}
        self.sizes: tuple[int, list[tuple[int, bool]]] | None = None
        self.settled: tuple[Hashable, Plan] | None = None


class Planner:
    """The plans of one graph as one model runs it.

    Args:
        sites: by their numbers.
        calls: which use of its layer each is.
    """

    def __init__(self, sites: Sequence[Any], calls: Sequence[int]) -> None:
        self._sites = sites
        self._calls = calls
        self._cases: dict[Hashable, Case] = {}
        self._before = [Seen()] * len(sites)  # in the last step
        self._device: torch.device | None = None
        self._adopted: list[Plan] = []  # which are recorded under their numbers, whatever else comes up

    def plan(
        self, phase: Phase, lane: int, shapes: Hashable, device: torch.device, *, recorded: bool = True
    ) -> Plan:
        """The plan of a step that is about to begin. ``recorded``: as CUDA graphs."""
        case = self._case(lane, shapes, device)
        look = case.looks.due()
        uses: list[Use] = [(call, lane) for call in self._calls]
        seen, decided_by = self._what_is_known(case, phase, uses, shapes, recorded)
        if case.settled is None or look or device != self._device or case.settled[0] != decided_by:
            choices = self._choose(case, phase, uses, shapes, device, look, seen)
            if choices not in case.plans:
                self._complete(new_plan(shapes), case, choices, uses)
            case.settled = (None if look else decided_by), case.plans[choices]
        return case.settled[1]

    def adopt(self, plan: Plan, phase: Phase, lane: int, device: torch.device) -> None:
        """Decide for a plan that was made before the graph was known."""
        case = self._case(lane, plan.shapes, device)
        uses: list[Use] = [(call, lane) for call in self._calls]
        seen, _ = self._what_is_known(case, phase, uses, plan.shapes, True)
        choices = self._choose(case, phase, uses, plan.shapes, device, case.looks.due(), seen)
        self._complete(plan, case, choices, uses)
        self._adopted.append(plan)

    def _case(self, lane: int, shapes: Hashable, device: torch.device) -> Case:
        case = self._cases.get((device, lane, shapes))
        if case is None:
            case = self._cases[device, lane, shapes] = Case(len(self._sites), device)
        return case

    def _complete(self, plan: Plan, case: Case, choices: tuple[Choice, ...], uses: Sequence[Use]) -> None:
        plan.sites, plan.choices, plan.status, plan.uses = self._sites, choices, case.status, uses
        case.plans[choices] = plan

    def _what_is_known(
        self, case: Case, phase: Phase, uses: Sequence[Use], shapes: Hashable, recorded: bool
    ) -> tuple[list[Seen], Hashable]:
        """What was seen of each site, and all that it is decided by what they do."""
        if case.sizes is None or case.sizes[0] != changes():
            found = [site.planned.size(use, shapes) for site, use in zip(self._sites, uses, strict=True)]
            worth = [recorded or worth_launching(flops) for _, flops in found]
            case.sizes = changes(), [(n, fits) for (n, _), fits in zip(found, worth, strict=True)]
        seen = [
            # Of other batches, where none of these sizes was seen yet.
            Seen(skipped(alive, n), skipped(needed, n), finite == 1, worth) if n else before
            for (alive, needed, finite), (n, worth), before in zip(
                case.status.seen(), case.sizes[1], self._before, strict=True
            )
        ]
        ages = None
        if isinstance(phase.linear, Reuse) or isinstance(phase.attention, Reuse):
            ages = [site.planned.age(use, shapes) for site, use in zip(self._sites, uses, strict=True)]
        return seen, (phase.linear, phase.attention, phase.blocks, seen, ages, changes())

    def _choose(
        self,
        case: Case,
        phase: Phase,
        uses: Sequence[Use],
        shapes: Hashable,
        device: torch.device,
        look: bool,
        seen: Sequence[Seen],
    ) -> tuple[Choice, ...]:
        choices = []
        with device_alone():
            for site, use, of_it in zip(self._sites, uses, seen, strict=True):
                site.planned.reserve(device)
                choices.append(site.planned.choose(phase, use, shapes, look, of_it))
        self._device = device
        left_out = [(choice.skip, choice.skip_mask) for choice in choices]
        if len(case.plans) < _MANY or case.skipped is None:
            if look:
                case.looks.found(left_out != case.skipped)
            case.skipped = left_out
        elif left_out != case.skipped:
            choices = [
                dataclasses.replace(choice, skip=skip if choice.look else 0, skip_mask=mask)
                for choice, (skip, mask) in zip(choices, case.skipped, strict=True)
            ]
        self._before = [
            Seen(choice.skip, choice.skip_mask, worth=of_it.worth)
            for choice, of_it in zip(choices, seen, strict=True)
        ]
        return tuple(choices)

    def forget(self) -> None:
        """Let go of what was launched, and where it wrote to."""
        self._cases.clear()
        self._adopted.clear()

    @staticmethod
    def begin(plan: Plan) -> None:
        """A forward of the plan begins."""
        if plan.status is not None:
            plan.status.send()

    def prepare(self, plan: Plan, device: torch.device) -> Tensor:
        """A backward of the plan begins: the numbers that change, int64 [sites, NUMBERS]."""
        plan.backwards += 1
        plan.turn = next(_turns)
        numbers = [site.planned.prepare(plan, number) for number, site in enumerate(self._sites)]
        if not any(numbers):
            return torch.zeros(len(numbers), NUMBERS, dtype=torch.int64, device=device)
        padded = [some + [0] * (NUMBERS - len(some)) for some in numbers]
        on_host = torch.tensor(padded, dtype=torch.int64, pin_memory=device.type == "cuda")
        return on_host.to(device, non_blocking=True, copy=True)


class PlannedCalls:
    """The plans of one compiled callable.

    Args:
        parameters: positions of its parameters among its inputs: their sizes do not change.
        device: the GPU of its inputs.
        recorded: whether it is recorded as CUDA graphs.

    Attributes:
        graphs: which graph it runs, for each model and place there that it was called for.
    """

    def __init__(self, parameters: Collection[int], device: torch.device, *, recorded: bool = True) -> None:
        self._parameters = frozenset(parameters)
        self._batch: list[int] | None = None
        self.device = device
        self.recorded = recorded
        self._first: dict[Hashable, Plan] = {}
        self.graphs: dict[tuple[int, str], int] = {}

    def shapes(self, inputs: Sequence[Any]) -> Hashable:
        """What tells batches of different sizes apart."""
        if self._batch is None:
            self._batch = [i for i in range(len(inputs)) if i not in self._parameters]
        batch = [inputs[i] for i in self._batch]
        return tuple(each.shape if isinstance(each, Tensor) else each for each in batch)

    def first(self, shapes: Hashable) -> Plan:
        """The plan of a graph that has not run yet; or that never asks for one, as without gradients. (One
        callable may run layers that are alike, each with a graph, and sites, of its own.)"""
        plan = self._first.get(shapes)
        if plan is None or plan.choices:
            plan = self._first[shapes] = new_plan(shapes)
        return plan


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
