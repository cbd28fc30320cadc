"""The ``torch.compile`` backend."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import ShortenTraceback
from torch.fx import Graph, GraphModule

from sparse_compile import compilers, naming, passes, selection
from sparse_compile import ops as _ops  # noqa: F401  (registers the ops that the passes insert)
from sparse_compile import pack_ops as _pack_ops  # noqa: F401
from sparse_compile import planned_ops as _planned_ops  # noqa: F401
from sparse_compile.checks import wrong
from sparse_compile.controller import STATE
from sparse_compile.debug import GraphDump, dump
from sparse_compile.kernels import on_device
from sparse_compile.passes import graph as graph_tools
from sparse_compile.plan import CALLED, RECORDED, refusal
from sparse_compile.planner import PlannedCalls
from sparse_compile.report import Report, make_report
from sparse_compile.rotation import Rotation
from sparse_compile.runtime import Runtime
from sparse_compile.schedule import Schedule
from sparse_compile.settings.monitor import Monitor
from sparse_compile.settings.reuse import Reuse
from sparse_compile.variants import Captured, Variant, Variants

COMPILERS = ("inductor", "aot_eager")


class ScheduleError(ShortenTraceback, ValueError):
    """A schedule that does not fit the model, found while it is compiled. (Dynamo lets it through as it
    is, where it wraps any other error of a backend.)"""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Request:
    """What is known of a graph before it is compiled.

    Attributes:
        names: position among its inputs -> name of the parameter there.
        linears: those that it calls.
        blocks: paths of the blocks whose ends are marked.
        handed_over: the layers whose weight gradients go to the runtime.
        patches: settings of Inductor.
        device: the GPU of its inputs, if they are on one that there are kernels for.
    """

    names: dict[int, str]
    linears: list[passes.CalledLinear]
    blocks: list[str]
    handed_over: list[str]
    patches: dict[str, Any]
    device: torch.device | None


class SparseBackend:
    """A backend for ``torch.compile``; made by :func:`sparse_backend`.

    One object may compile any number of graphs and models; clock, sites and report are one for all.

    Attributes:
        schedule: as given.
        graphs: with ``debug``, the joint graphs before and after the rewrite, in order of compilation.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        debug: bool | str | os.PathLike[str],
        compiler: str,
        monitor: Monitor | None,
    ) -> None:
        self.schedule = schedule
        self.graphs: list[GraphDump] = []
        self._debug = debug
        self._compiler = compiler
        self._monitor = monitor
        self._runtime = Runtime(schedule, seed=torch.initial_seed(), monitor=monitor)
        self._checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._said_nothing_found = False

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one graph, as Dynamo asks.

        Raises:
            ScheduleError: (a ValueError) a pattern or block of the schedule that the model does not have.
        """
        parameters = naming.find_parameters(gm, example_inputs)
        self._check_schedule(naming.find_root([example_inputs[each.position] for each in parameters]))
        names = {parameter.position: parameter.name for parameter in parameters}
        owners = naming.Owners(parameters)
        owner = self._runtime.owner(owners, example_inputs)
        passes.inline_regions(gm, names)
        devices = {each.device for each in example_inputs if isinstance(each, Tensor)}
        request = _Request(
            names=names,
            linears=list(passes.linears_called(gm, names)),
            blocks=self._mark_blocks(gm, owner),
            handed_over=self._handed_over(owner, names.values()),
            patches=compilers.patches(mode, options),
            device=next(filter(on_device.available, devices), None),
        )
        if torch.is_grad_enabled() and request.linears and (place := naming.graph_break(gm)):
            self._runtime.graph_breaks[place] = None
        captured = Captured.of(gm) if self._carries(request) else None
        compiled = self._compile(gm, example_inputs, request, owner, carries=captured is not None)
        variants = None if captured is None else Variants(compiled)

        def variant(owner: naming.Owner) -> Variant:
            """The way that a forward runs."""
            if variants is None or captured is None:
                return compiled

            def all_rows() -> Variant | None:
                return captured.again(functools.partial(self._compile, request=request, owner=None))

            def share(planned: PlannedCalls) -> float | None:
                return self._runtime.share_carried(planned, owner)

            return variants.at(self.step, self._runtime.place(owner), share, all_rows)

        def run(*inputs: Any) -> Any:
            owner = self._runtime.owner(owners, inputs)
            if owner.root is not None:
                self._check_schedule(owner.root())  # again: only now known if a plain function was compiled
            way = variant(owner)
            planned = way.planned
            number = [] if planned is None else [self._runtime.plan(planned, owner, inputs).number]
            with self._runtime.forward_of(owner, planned):
                outputs = way.run(*inputs, *number)
            if not self._runtime.sites and not self._said_nothing_found:
                self._look_again_after_backward(outputs)
            return outputs

        return run

    def _compile(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        request: _Request,
        owner: naming.Owner | None,
        *,
        carries: bool = False,
    ) -> Variant:
        """Compile one graph.

        Args:
            gm: the graph.
            inputs: what it was captured with.
            request: what else is known of it.
            owner: whose sites are in the report before it has run; None is nobody's.
            carries: whether it carries the needed rows alone on a GPU, too.
        """
        planned = self._planned_calls(request)
        skip_unneeded = not passes.has_own_gradients(gm) and self.schedule.skips_unneeded

        def rewrite(graph: Graph) -> None:
            before = dump(graph) if self._debug else ""
            sites, saved = passes.rewrite(
                graph,
                request.names,
                request.linears,
                request.blocks,
                self.schedule.saved_activations,
                request.handed_over,
                dx_whole=self.schedule.linears_are_exact,
                skip_unneeded=skip_unneeded,
                # What reuse remembers has a row for every token.
                compact=not isinstance(self.schedule.linear, Reuse),
                gpu_carries=carries,
                plan_at=None if planned is None else len(inputs),
            )
            if owner is not None:
                self._runtime.note(sites, saved, owner)
            if self._debug:
                self.graphs.append(GraphDump(len(self.graphs), before, dump(graph)))
                self.graphs[-1].publish(folder=None if self._debug is True else self._debug)

        numbered = contextlib.nullcontext() if planned is None else compilers.one_more_input(gm)
        given = [*inputs] if planned is None else [*inputs, planned.first(()).number]
        with compilers.savable_token(), numbered:
            if self._compiler == "inductor":
                key = None if self._debug else self._cache_key(gm, request, carries)
                compiled = compilers.with_inductor(gm, given, rewrite, key, request.patches)
            else:
                compiled = compilers.with_aot_eager(gm, given, rewrite)
        return Variant(compiled, planned)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseBackend:
        """Itself: a deep copy of a compiled model is one more model of the same backend."""
        return self

    @property
    def step(self) -> int:
        """Optimizer steps taken by the models of this backend. Counted by itself, for optimizers of
        `torch.optim`; with another one, set it after each step."""
        return self._runtime.clock.step

    @step.setter
    def step(self, step: int) -> None:
        self._runtime.clock.set_step(step)

    @property
    def rotation(self) -> Rotation | None:
        """The weights with sparse gradients, for `sparse_compile.optim`; None if the schedule has none."""
        return self._runtime.rotation

    def report(self) -> Report:
        """What was matched, rewritten and left alone so far, and why; see :class:`Report`."""
        return make_report(self.schedule, self._runtime)

    def state_dict(self) -> dict[str, Any]:
        """Clock, remembered gradients and seed: what a resumed run needs to continue this one.

        It holds tensors and plain values only, so ``torch.save`` and ``torch.load(weights_only=True)``
        take it.
        """
        return {"schedule": self.schedule.to_dict(), **self._runtime.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict()`` was taken; before or after the model was compiled.

        Raises:
            ValueError: the state is of another schedule or model, or is no state of a backend at all. (Of
                another model, if none has run yet, only when it does.)
        """
        if not isinstance(state, Mapping):
            raise wrong("state", state, "a SparseBackend.state_dict()")
        missing = {"schedule", "seed", "step", "sites", "controller"} - set(state)
        missing |= {f"controller.{key}" for key in STATE if key not in state.get("controller", STATE)}
        if missing:
            raise ValueError(
                f"state is no SparseBackend.state_dict(): it lacks {', '.join(sorted(missing))}."
            )
        if state["schedule"] != self.schedule.to_dict():
            raise ValueError(
                f"state is of another schedule, {Schedule.from_dict(state['schedule'])}; allowed is the "
                f"backend's own, {self.schedule}."
            )
        self._runtime.load_state_dict(dict(state))

    def __reduce__(self) -> tuple[Any, ...]:
        """For ``torch.save(torch.compile(model))``: the settings, and where the schedule had come to. Graphs
        are compiled anew, as those of PyTorch's own backends."""
        debug, compiler, monitor = self._debug, self._compiler, self._monitor
        make = functools.partial(sparse_backend, debug=debug, compiler=compiler, monitor=monitor)
        return make, (self.schedule,), self.state_dict()

    __setstate__ = load_state_dict

    def _carries(self, request: _Request) -> bool:
        """Whether a graph for a GPU carries the needed rows alone: where nothing else would leave rows out of
        what is carried, and no CUDA graph has to know how many there are."""
        if request.device is None or not self.schedule.is_exact:
            return False
        return bool(self.schedule.skips_unneeded) and not compilers.records(request.patches)

    def _planned_calls(self, request: _Request) -> PlannedCalls | None:
        """The plans of a graph, if what its ops do can be decided ahead; see ``plan.py``."""
        if request.device is None:
            return None
        recorded = compilers.records(request.patches)
        why = refusal(self.schedule, self._monitor, recorded=recorded)
        self._runtime.cuda_graphs = RECORDED if recorded else CALLED
        if recorded and why:
            self._runtime.cuda_graphs = f"ops run between CUDA graphs, since {why}"
        return None if why else PlannedCalls(set(request.names), request.device, recorded=recorded)

    def _check_schedule(self, root: nn.Module | None) -> None:
        if root is None or root in self._checked:
            return
        self._checked.add(root)
        try:
            paths = naming.module_paths(root)
            self.schedule.check_patterns(paths)
            self.schedule.check_where(paths, (naming.class_name(type(module)) for module in root.modules()))
            if self.schedule.weight_gradients is not None:
                selection.chosen_layers(root, self.schedule.weight_gradients)
            counts = naming.block_counts(root)
            if counts:
                self.schedule.check_blocks(max(counts))
        except ValueError as error:
            raise ScheduleError(str(error)) from None

    def _mark_blocks(self, gm: GraphModule, owner: naming.Owner) -> list[str]:
        """Mark the ends of the model's blocks, if the schedule does anything there."""
        if self.schedule.blocks is None:
            return []
        root, path = None if owner.root is None else owner.root(), owner.path
        frame = None
        if root is not None and path and naming.graph_break(gm) == "":
            named = {naming.clean(name): module for name, module in root.named_modules()}
            if path in named:
                frame = passes.Block(path, naming.class_name(type(named[path])))
        return passes.mark_blocks(gm, self.schedule.blocks.where, frame)

    def _handed_over(self, owner: naming.Owner, parameters: Iterable[str]) -> list[str]:
        """The layers in this graph, by their names there, whose weight gradients go to the runtime."""
        root = None if owner.root is None else owner.root()
        method = self.schedule.weight_gradients
        if root is None or method is None:
            return []
        chosen = selection.chosen_layers(root, method)
        layers = sorted({naming.layer_of(name) for name in parameters})
        names = {layer: owner.layer(layer) for layer in layers}
        return [layer for layer, name in names.items() if name in chosen and not self._left_out(name, root)]

    def _left_out(self, name: str, root: nn.Module) -> bool:
        """Whether `exclude`, `include` or `skip_layers` take a layer out."""
        block = naming.block_of(name, root)
        skipped = block is not None and bool(self.schedule.skip_layers) and self.schedule.skips_block(*block)
        return skipped or self.schedule.reason_left_out(name) is not None

    def _cache_key(self, gm: GraphModule, request: _Request, carries: bool) -> str:
        """All that the compiled graph depends on beyond the graph: our source, the schedule, and the names,
        which are in the graph's manifest but in no key of Inductor's."""
        paths = [graph_tools.module_path(node) for node in gm.graph.nodes]
        marked = [request.blocks, request.handed_over]
        names = sorted(request.names.items())
        parts = [passes.source_hash(), self.schedule.to_dict(), names, paths, marked, carries]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _look_again_after_backward(self, outputs: Any) -> None:
        """Warn at the end of the first backward if no graph of this backend had anything to rewrite."""

        def look() -> None:
            if self._runtime.sites or self._said_nothing_found:
                return
            self._said_nothing_found = True
            warnings.warn(
                "sparse_backend has nothing to rewrite in this model: no linear layer with a gradient was "
                "found, and it trains as under plain torch.compile. backend.report() lists what was seen.",
                stacklevel=2,
            )

        def at_start(_: Any) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(look)

        for node in {t.grad_fn for t in outputs if isinstance(t, Tensor) and t.grad_fn is not None}:
            node.register_prehook(at_start)


def sparse_backend(
    schedule: Schedule,
    *,
    debug: bool | str | os.PathLike[str] = False,
    compiler: str = "inductor",
    monitor: Monitor | None = None,
) -> SparseBackend:
    """A backend for ``torch.compile`` that does not compute the part of the gradient that does not matter.

    ::

        backend = sparse_backend(Schedule(linear=Reuse(0.9)))
        model = torch.compile(model, backend=backend)

    Args:
        schedule: what is sparsified, how much, and when.
        debug: True keeps the joint graphs before and after the rewrite in ``backend.graphs``, and emits
            them as artifacts where ``TORCH_TRACE`` is set (tlparse shows them); a path also writes them
            into that folder. Compile caches are not used then.
        compiler: ``"inductor"``, or ``"aot_eager"`` to run the rewritten graphs without Inductor.
        monitor: how often the approximate gradients are compared with the dense ones, for
            ``backend.report().measurements``; None is never. The gradients are the same either way.

    Raises:
        ValueError: ``schedule`` is not a Schedule, ``compiler`` is not one of the two, or ``monitor`` is
            neither a Monitor nor None.
    """
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"schedule is {schedule!r}; allowed is a sparse_compile.Schedule, e.g. Schedule.exact()."
        )
    if compiler not in COMPILERS:
        raise ValueError(f"compiler is {compiler!r}; allowed is {' or '.join(map(repr, COMPILERS))}.")
    if monitor is not None and not isinstance(monitor, Monitor):
        raise ValueError(
            f"monitor is {monitor!r}; allowed is None or a sparse_compile.Monitor, e.g. Monitor(every=250)."
        )
    return SparseBackend(schedule, debug=debug, compiler=compiler, monitor=monitor)


# What torch.compile(model, backend="sparse_compile") uses, through the torch_dynamo_backends entry point.
default_backend = sparse_backend(Schedule.exact())
