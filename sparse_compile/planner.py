"""Which plan a step has: the choices of all sites of a graph, made before a forward; see ``plan.py``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.changes import changes
from sparse_compile.device_forward import skipped
from sparse_compile.kernels.choice import device_alone
from sparse_compile.looks import Looks
from sparse_compile.memory import Use
from sparse_compile.plan import NUMBERS, Choice, Plan, Seen, Status, new_plan
from sparse_compile.replay import worth_launching
from sparse_compile.schedule import Phase
from sparse_compile.settings.reuse import Reuse

# Steps between two looks for rows that are zero, at most. They are looked for in all layers at once, or every
# combination of layers would be a plan.
_LONGEST_PAUSE = 15
# Plans for batches of one size that are recorded, or ways to skip rows, beyond which it is decided no more
# which rows are skipped.
_MANY = 16
# Plans whose programs are kept. (One of a BERT-large takes some 5 MB of the host.)
_KEPT = 128
_turns = itertools.count(1)


class Case:
    """What is known of the steps on batches of one size, in one lane and on one device.

    Attributes:
        status: what was reported by the last one.
        looks: when rows that are zero are counted.
        skipped: which are skipped: skip and skip_mask of each site.
        patterns: all that this was.
        plans: by what each site does in it.
        sizes: how many rows each site has, and whether they are worth launching anything for; and at which
            change that was found.
        settled: the last plan, and what it was decided by; where that is the same again, so is the plan.
    """

    def __init__(self, sites: int, device: torch.device) -> None:
        self.status = Status(sites, device)
        self.looks = Looks(_LONGEST_PAUSE)
        self.skipped: list[tuple[int, int]] | None = None
        self.patterns: set[tuple[tuple[int, int], ...]] = set()
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
        self._kept: dict[int, tuple[Plan, Case]] = {}  # those that are not recorded, last used last
        self._adopted: list[Plan] = []  # which are recorded under their numbers, whatever else comes up

    def plan(
        self,
        phase: Phase,
        lane: int,
        shapes: Hashable,
        device: torch.device,
        *,
        recorded: bool = True,
        observed: Hashable = False,
    ) -> Plan:
        """The plan of a step that is about to begin.

        Args:
            phase: what the schedule says of it.
            lane: of the forward, among those of the step.
            shapes: of its inputs.
            device: of its inputs.
            recorded: as CUDA graphs.
            observed: what of it is measured.
        """
        case = self._case(lane, shapes, device)
        look = case.looks.due()
        uses: list[Use] = [(call, lane) for call in self._calls]
        seen, decided_by = self._what_is_known(case, phase, uses, shapes, recorded)
        decided_by = observed, decided_by
        if case.settled is None or look or device != self._device or case.settled[0] != decided_by:
            choices = self._choose(case, phase, uses, shapes, device, look, seen, recorded)
            if choices not in case.plans:
                self._complete(new_plan(shapes), case, choices, uses)
            case.settled = (None if look else decided_by), case.plans[choices]
        plan = case.settled[1]
        if not recorded:
            self._keep(plan, case)
        return plan

    def _keep(self, plan: Plan, case: Case) -> None:
        """Let go of what was used longest ago."""
        self._kept.pop(plan.number, None)
        self._kept[plan.number] = plan, case
        if len(self._kept) > _KEPT:
            oldest, of_case = self._kept.pop(next(iter(self._kept)))
            of_case.plans.pop(oldest.choices, None)
            of_case.settled = None
            oldest.programs.found.clear()
            oldest.gone = True
            if not of_case.plans:
                self._cases = {key: kept for key, kept in self._cases.items() if kept is not of_case}

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
        plan.observed = any(choice.measured or choice.watched for choice in choices)
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
            Seen(skipped(alive, n), skipped(needed, n), finite == 1, worth, needed >= 0) if n else before
            for (alive, needed, finite), (n, worth), before in zip(
                case.status.seen(), case.sizes[1], self._before, strict=True
            )
        ]
        ages = None
        if isinstance(phase.linear, Reuse) or isinstance(phase.attention, Reuse):
            of_sites = zip(self._sites, uses, strict=True)
            ages = [site.planned.age(use, shapes, phase.step) for site, use in of_sites]
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
        recorded: bool = True,
    ) -> tuple[Choice, ...]:
        choices = []
        with device_alone():
            for site, use, of_it in zip(self._sites, uses, seen, strict=True):
                site.planned.reserve(device)
                choices.append(site.planned.choose(phase, use, shapes, look, of_it))
        self._device = device
        left_out = [(choice.skip, choice.skip_mask) for choice in choices]
        if len(case.plans if recorded else case.patterns) < _MANY or case.skipped is None:
            if look:
                case.looks.found(left_out != case.skipped)
            case.skipped = left_out
            case.patterns.add(tuple(left_out))
        elif left_out != case.skipped:
            choices = [
                dataclasses.replace(
                    choice,  # what is not counted in this step cannot be skipped
                    skip=skip if choice.look else 0,
                    skip_mask=mask if choice.count_mask else 0,
                )
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
        self._kept.clear()
        self._adopted.clear()

    @staticmethod
    def begin(plan: Plan) -> None:
        """A forward of the plan begins."""
        if plan.status is not None:
            plan.status.send()

    def prepare(self, plan: Plan, device: torch.device, step: int) -> Tensor:
        """A backward of the plan begins, in this step: the numbers that change, int64 [sites, NUMBERS]."""
        plan.backwards += 1
        plan.turn = next(_turns)
        numbers = [site.planned.prepare(plan, number, step) for number, site in enumerate(self._sites)]
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
        graphs: which graph with planned ops it runs, for each model and place there that it was called for.
        opened: which graph, whatever its ops.
    """

    def __init__(self, parameters: Collection[int], device: torch.device, *, recorded: bool = True) -> None:
        self._parameters = frozenset(parameters)
        self._batch: list[int] | None = None
        self.device = device
        self.recorded = recorded
        self._first: dict[Hashable, Plan] = {}
        self.graphs: dict[Hashable, int] = {}
        self.opened: dict[Hashable, int] = {}

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
