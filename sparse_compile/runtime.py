"""Everything that changes from step to step, in one object per backend.

    compiled callable (backend.py)          ops (ops.py)                     site.py
      with runtime.forward_of(…):  ────►  begin ─► Runtime.open ─► token
                                          linear_backward(token, …) ─► find ─► LinearSite.linear_backward

The token (three integers in a tensor that autograd saves) names the runtime, the graph and the lane. The
*lane* numbers the forwards that are in flight: where a model runs twice before one backward, as in a
siamese network, each run remembers its own gradients.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
import weakref
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sparse_compile import naming, states
from sparse_compile.attention_site import AttentionSite
from sparse_compile.block_site import BlockSite
from sparse_compile.clock import Clock
from sparse_compile.controller import Controller
from sparse_compile.linear_site import LinearSite
from sparse_compile.memory import Use
from sparse_compile.naming import Owner, Owners
from sparse_compile.plan import Plan
from sparse_compile.planner import PlannedCalls, Planner
from sparse_compile.rotation import Rotation
from sparse_compile.running import LANES, Lanes, RunningGraph
from sparse_compile.schedule import Phase, Schedule
from sparse_compile.settings.monitor import Monitor
from sparse_compile.site import Site
from sparse_compile.sites import SavedRecord, SiteRecord, from_manifest
from sparse_compile.telemetry import Telemetry

Token = tuple[int, int, int, int]  # runtime, graph, lane, and number of the forward
NO_TOKEN: Token = (-1, -1, -1, -1)

# A site with fewer backward FLOPs than this share of its model's mean site is never approximated: nothing
# would be gained. Nor is one with a quarter of the rows of others and that share of all FLOPs: much can be
# lost. Every gradient of a classifier goes through its pooler and head, and those have one row a sample:
# with 3 rows of 32 kept there, MiniLM on movie reviews learned nothing (53 % where exact got 83 %). The model
# is what was seen of it, since a head may have a graph of its own, which runs after those of the layers.
_NEGLIGIBLE = 0.01
_FEW_ROWS = 0.25, 0.001

_KINDS: dict[str, type[Site]] = {"linear": LinearSite, "attention": AttentionSite, "block": BlockSite}

_ids = itertools.count()
_forwards = itertools.count()
_runtimes: weakref.WeakValueDictionary[int, Runtime] = weakref.WeakValueDictionary()
_running: contextvars.ContextVar[tuple[Runtime, Owner, PlannedCalls | None] | None] = contextvars.ContextVar(
    "running", default=None
)


class Runtime:
    """Clock, sites and their bases, for all the graphs and models of one backend.

    Args:
        schedule: what is to be done when.
        seed: of every random choice; each depends on it, the rank, the site's name and a count, and on
            nothing else.
        monitor: how often gradients are compared with the dense ones; None is never.
    """

    def __init__(self, schedule: Schedule, seed: int, monitor: Monitor | None = None) -> None:
        self.id = next(_ids)
        self.schedule = schedule
        self.seed = seed
        self.controller = Controller(schedule)
        self.clock = Clock(schedule, end_of_step=self.controller.end_of_step, shards=self._shards)
        self.telemetry = None if monitor is None else Telemetry(monitor.every, self.clock)
        method = schedule.weight_gradients
        self.rotation = None if method is None else Rotation(method, str(seed), lambda: self.clock.step)
        self.graph_breaks: dict[str, None] = {}  # where Dynamo broke graphs that have linears
        self.cuda_graphs = ""  # on a GPU, whether ops are part of them
        self.sites: dict[str, Site] = {}
        self.records: dict[str, list[SiteRecord]] = {}
        self.saved: dict[str, list[SavedRecord]] = {}
        self._graphs: list[RunningGraph] = []
        self._lanes: dict[tuple[str, ...], Lanes] = {}
        self._graph_ids: dict[tuple[Any, ...], int] = {}
        self._copies: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._copy_numbers = itertools.count()
        self._pending: dict[str, Any] = {}
        _runtimes[self.id] = self

    @contextlib.contextmanager
    def forward_of(self, owner: Owner, calls: PlannedCalls | None = None) -> Iterator[None]:
        """While a compiled callable runs: what ``begin`` asks for. ``calls`` are its plans, if it has any."""
        token = _running.set((self, owner, calls))
        try:
            yield
        finally:
            _running.reset(token)

    def owner(self, owners: Owners, inputs: Sequence[object]) -> Owner:
        """Whose parameters a graph is called with."""
        known = owners.known(inputs)
        if known is not None:
            return known
        self.clock.watch(value for value in inputs if isinstance(value, nn.Parameter))
        return owners.find(inputs)

    def models(self) -> list[tuple[nn.Module, str]]:
        """The models seen so far that still exist, each with what its sites' names end in."""
        return [(root, f"@{copy}" if copy else "") for root, copy in self._copies.items()]

    def _shards(self) -> Iterator[nn.Parameter]:
        for root, _ in self.models():
            if naming.is_sharded(root):
                yield from root.parameters()

    def open(self, manifest: str, owner: Owner) -> Token:
        """Begin a forward of the graph with this manifest."""
        key = (manifest, self._copy(owner), owner.moved)
        number = self._graph_ids.get(key)
        if number is None:
            sites, saved = from_manifest(manifest)
            records = self.note(sites, saved, owner)
            lanes = self._lanes_of(tuple(dict.fromkeys(record.name for record in records)))
            sites_made = self._make_sites(records, owner)
            number = self._graph_ids[key] = len(self._graphs)
            planner = Planner(sites_made, [record.call for record in records])
            self._graphs.append(RunningGraph(records, sites_made, lanes, planner))
        graph = self._graphs[number]
        if graph.lanes.graph != number:
            graph.lanes.graph = number
            self._show(graph.records)
        return self.id, number, graph.lanes.open(self.clock.step), next(_forwards)

    def _lanes_of(self, layers: tuple[str, ...]) -> Lanes:
        """Those of the graphs of exactly these layers. Other graphs with some of them get other numbers:
        where a graph break lies between two uses of an encoder, or a model has several tasks."""
        if layers not in self._lanes:
            taken = {lanes.first for each, lanes in self._lanes.items() if not set(layers).isdisjoint(each)}
            free = (first for first in itertools.count(0, LANES) if first not in taken)
            self._lanes[layers] = Lanes(first=next(free))
        return self._lanes[layers]

    def plan(self, calls: PlannedCalls, owner: Owner, inputs: Sequence[Any]) -> Plan:
        """What a forward that is about to begin does."""
        shapes = calls.shapes(inputs)
        number = calls.graphs.get(self.place(owner))
        if number is None:
            return calls.first(shapes)
        graph = self._graphs[number]
        step = self.clock.step
        lane, watched = graph.lanes.next(step), self.telemetry is not None and self.telemetry.due_at(step)
        return graph.planner.plan(
            *(self.clock.phase, lane, shapes, calls.device),
            recorded=calls.recorded,
            observed=(self.controller.measures(step), watched),
        )

    def begin(self, token: Token, plan: Plan, calls: PlannedCalls, owner: Owner) -> None:
        """A forward of a plan begins, which may be the first of its graph."""
        graph = self._graphs[token[1]]
        calls.graphs[self.place(owner)] = token[1]
        if not plan.choices:
            graph.planner.adopt(plan, self.clock.phase, token[2], calls.device)
        graph.planner.begin(plan)

    def prepare(self, token: Token, plan: Plan, device: torch.device) -> Tensor:
        """A backward of a plan begins; the numbers that change from step to step."""
        self._backward_began(self._graphs[token[1]], token[2])
        return self._graphs[token[1]].planner.prepare(plan, device, self.clock.step)

    def note(self, records: list[SiteRecord], saved: list[SavedRecord], owner: Owner) -> list[SiteRecord]:
        """The records of a graph under their full names, kept for the report; of a layer's graphs the newest
        one's, or that which ran last."""
        suffix = f"@{self._copy(owner)}" if self._copy(owner) else ""
        records = [dataclasses.replace(r, name=owner.layer(r.name) + suffix) for r in records]
        saved = [dataclasses.replace(r, name=owner.layer(r.name) + suffix) for r in saved]
        self._show(records)
        for name in dict.fromkeys(record.name for record in saved):
            self.saved[name] = [record for record in saved if record.name == name]
        return records

    def _show(self, records: list[SiteRecord]) -> None:
        for name in dict.fromkeys(record.name for record in records):
            self.records[name] = [record for record in records if record.name == name]

    def place(self, owner: Owner) -> Hashable:
        """Which model a callable runs for, and where in it."""
        return self._copy(owner), owner.moved

    def _copy(self, owner: Owner) -> int:
        """0 for the first model that this backend ran, 1 for its second (a deep copy, say), …"""
        root = owner.root() if owner.root is not None else None
        if root is None:
            return 0
        if root not in self._copies:
            copy = self._copies[root] = next(self._copy_numbers)
            weakref.finalize(root, self._forget, copy).atexit = False
        return self._copies[root]

    def _forget(self, copy: int) -> None:
        """Free what was remembered for a model that is gone; its numbers stay in the report."""
        for (_, of_copy, _), number in self._graph_ids.items():
            if of_copy == copy:
                self._graphs[number].planner.forget()
        for name, site in self.sites.items():
            if name.partition("@")[2] == (str(copy) if copy else ""):
                site.forget()
                if self.rotation is not None:
                    self.rotation.forget(name)

    def _make_sites(self, records: list[SiteRecord], owner: Owner) -> list[Site]:
        root = owner.root() if owner.root is not None else None
        if self._pending and root is not None and self._copy(owner) == 0:
            states.check_names(self._pending, root, self.records)
        paths = [record.name.partition("@")[0] for record in records]
        attentions = {record.name for record in records if record.kind == "attention"}
        sites = []
        for record, path in zip(records, paths, strict=True):
            if record.name not in self.sites:
                block = naming.block_of(path, root, paths)
                held_back = self._in_skipped_block(block) or self._negligible(record)
                kind = "attention" if record.name in attentions else record.kind
                self._add_site(record.name, kind, path, held_back, block)
            if record.handed_over:
                self._take_gradient(record, path, root)
            sites.append(self.sites[record.name])
        return sites

    def _take_gradient(self, record: SiteRecord, path: str, root: nn.Module | None) -> None:
        """Make the weight of a layer known whose gradient is handed over."""
        parameters = (
            {naming.clean(name): p for name, p in root.named_parameters()} if root is not None else {}
        )
        weight = parameters.get(f"{path}.weight", parameters.get(path))
        site = self.sites[record.name]
        if weight is not None and self.rotation is not None and isinstance(site, LinearSite):
            site.rotated = self.rotation.add(record.name, weight, transposed=record.handed_over == "I O")

    def _in_skipped_block(self, block: tuple[int, int] | None) -> str | None:
        if not self.schedule.skip_layers or block is None or not self.schedule.skips_block(*block):
            return None
        return f"block {block[0]} of {block[1]} is in skip_layers: only zero rows are skipped"

    def _negligible(self, record: SiteRecord) -> str | None:
        if record.kind == "block":
            return None
        copy = record.name.partition("@")[2]
        seen = [
            each for name, of_it in self.records.items() if name.partition("@")[2] == copy for each in of_it
        ]
        seen = [each for each in seen if each.rewritten and each.kind != "block"]
        flops = [each.flops_backward for each in seen]
        if seen and record.flops_backward < _NEGLIGIBLE * sum(flops) / len(flops):
            return f"under {_NEGLIGIBLE:.0%} of the FLOPs of a mean site: only zero rows are skipped"
        rows, share = _FEW_ROWS
        most = max((each.shape[0] for each in seen if each.kind == "linear"), default=0)
        few = record.kind == "linear" and record.rewritten and record.shape[0] <= rows * most
        if few and record.flops_backward < share * sum(flops):
            return f"few rows, and under {share:.1%} of the FLOPs: only zero rows are skipped"
        return None

    def _add_site(
        self, name: str, kind: str, path: str, held_back: str | None, block: tuple[int, int] | None
    ) -> None:
        make = _KINDS.get(kind, LinearSite)
        site = self.sites[name] = make(
            name,
            seed=self._seed_of_rank(),
            left_alone=self.schedule.reason_left_out(path),
            held_back=held_back,
            block=block,
            controller=self.controller,
            telemetry=self.telemetry,
        )
        if name in self._pending:
            states.check_sizes(site, self._pending[name], self._shapes(name))
            states.load(site, self._pending.pop(name))

    def _shapes(self, name: str) -> list[tuple[int, ...]]:
        return [record.shape for record in self.records.get(name, ()) if record.rewritten]

    def _seed_of_rank(self) -> int:
        """The seed that this process draws from. Ranks that were seeded alike must not draw alike: the noise
        of equal draws would not average out over them."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.seed
        return self.seed + (torch.distributed.get_rank() << 64)

    def find(self, token: Token, number: int) -> tuple[Site, Use, Phase]:
        """The site with this number in the graph that the token names, and what holds for it now."""
        graph = self._graphs[token[1]]
        self._backward_began(graph, token[2])
        return graph.sites[number], (graph.records[number].call, token[2]), self.clock.phase

    def _backward_began(self, graph: RunningGraph, lane: int) -> None:
        if lane in graph.lanes.taken:  # the first op of this backward
            graph.lanes.taken.pop(lane)
            self.clock.backward_began()

    def site(self, token: Token, number: int) -> tuple[Site, Use]:
        """The site with this number in the graph that the token names, for an op of the forward."""
        graph = self._graphs[token[1]]
        return graph.sites[number], (graph.records[number].call, token[2])

    def carried(self, token: Token, numbers: tuple[int, ...], rows: int, total: int) -> None:
        """A backward begins of linears with these numbers, of so many rows of the ``total``."""
        graph = self._graphs[token[1]]
        self._backward_began(graph, token[2])
        graph.count_carried(numbers, rows, total)

    def share_carried(self, calls: PlannedCalls, owner: Owner) -> float | None:
        """The share of its rows that a graph has carried since this was last asked; None: it carried none."""
        number = calls.opened.get(self.place(owner))
        return None if number is None else self._graphs[number].share_carried()

    def state_dict(self) -> dict[str, Any]:
        sites = {name: states.state_of(site) for name, site in self.sites.items()}
        return {
            "seed": self.seed,
            "step": self.clock.step,
            "sites": {**self._pending, **sites},
            "controller": self.controller.state_dict(),
            "rotation": {} if self.rotation is None else self.rotation.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Sites that do not exist yet (they are made when their graph first runs) take theirs then. Nothing
        is taken of a state that is refused."""
        for root, suffix in self.models():
            if not suffix:
                states.check_names(state["sites"], root, self.records)
        for name in self.sites:
            states.check_sizes(self.sites[name], state["sites"].get(name, {}), self._shapes(name))
        self.clock.restart(state["step"])
        self.seed = state["seed"]
        self._pending = dict(state["sites"])
        self.controller.load_state_dict(state["controller"])
        if self.rotation is not None:
            self.rotation.load_state_dict(state["rotation"])
        for name, site in self.sites.items():
            site.seed = self._seed_of_rank()
            states.load(site, self._pending.pop(name, {}))


def begin(manifest: str, plan: Plan | None = None) -> Token:
    """Called by the ``begin`` op: whose forward is this? ``plan`` is what it does, if it is planned."""
    running = _running.get()
    if running is None:
        return NO_TOKEN
    runtime, owner, calls = running
    token = runtime.open(manifest, owner)
    if calls is not None:
        calls.opened[runtime.place(owner)] = token[1]
    if plan is not None and calls is not None:
        runtime.begin(token, plan, calls, owner)
    return token


def prepare(token: Sequence[int], plan: Plan | None, device: torch.device) -> Tensor | None:
    """Called at the head of a planned backward; None if its backend is gone."""
    runtime = _runtimes.get(token[0])
    return None if runtime is None or plan is None else runtime.prepare(_token(token), plan, device)


def site(token: Sequence[int], number: int) -> tuple[Site, Use] | None:
    """Called by the ops of the forward; None if there is no backend."""
    runtime = _runtimes.get(token[0])
    return None if runtime is None else runtime.site(_token(token), number)


def find(token: Sequence[int], number: int) -> tuple[Site, Use, Phase] | None:
    """Called by every backward op; None if its backend is gone, and all that is left is exact skipping."""
    runtime = _runtimes.get(token[0])
    return None if runtime is None else runtime.find(_token(token), number)


def carried(token: Sequence[int], numbers: Sequence[int], rows: int, total: int) -> None:
    """Called where a backward of few rows begins, if its products are the graph's own."""
    runtime = _runtimes.get(token[0])
    if runtime is not None:
        runtime.carried(_token(token), tuple(numbers), rows, total)


def _token(numbers: Sequence[int]) -> Token:
    runtime, graph, lane, forward = numbers
    return runtime, graph, lane, forward
