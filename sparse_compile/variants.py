"""The two ways to run one graph on a GPU: carrying the needed rows alone, or all of them.

Where a batch is padded, rows that are left out everywhere are the larger gain, for which their number has to
be waited for; where it is not, attention would have what it reads and gives written out for nothing. How many
are needed is seen when they are carried. So the first step carries them; while the share that is needed is
large, only a step now and then does, to look. Both ways are exact. The other way is compiled when it is first
taken.

What is decided holds for a whole step, since activation checkpointing runs a forward twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch._guards import CompileContext, TracingContext, compile_context, tracing
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sparse_compile.looks import Looks
from sparse_compile.planner import PlannedCalls

# Where this share of the rows or more is needed, all are computed: to write Q, K, V and O out and gather
# their gradients would take an H100 some 5 % of a block of a BERT-large, by bytes and FLOPs.
WORTH_CARRYING = 7 / 8
_LONGEST_PAUSE = 31  # steps between two that carry
_NEWEST = 0.25  # weight of the last step in the mean share: one full batch changes nothing


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """A compiled graph, and its plans, if it has any."""

    run: Callable[..., Any]
    planned: PlannedCalls | None


@dataclasses.dataclass(frozen=True, slots=True)
class Captured:
    """A graph as Dynamo gives it to a backend, which can be compiled once more when Dynamo is done.

    Attributes:
        gm: the graph.
        inputs: fake tensors, and symbolic sizes, in the place of what it was captured with.
    """

    gm: GraphModule
    inputs: Sequence[Any]
    _tracing: TracingContext | None
    _compiling: CompileContext | None

    @classmethod
    def of(cls, gm: GraphModule) -> Captured:
        """Of a graph that is being compiled."""
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        copy = GraphModule(gm, graph)
        copy.meta = dict(gm.meta)
        inputs = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
        return cls(copy, inputs, TracingContext.try_get(), CompileContext.try_get())

    def again(self, compile: Callable[[GraphModule, Sequence[Any]], Variant]) -> Variant | None:
        """What ``compile`` makes of it; None if that cannot be done again, or would only hold for some of the
        sizes that Dynamo calls it with."""
        shapes = getattr(getattr(self._tracing, "fake_mode", None), "shape_env", None)
        before = _guards(shapes)
        with contextlib.ExitStack() as stack:
            stack.enter_context(tracing(self._tracing))
            if self._compiling is not None:
                stack.enter_context(compile_context(self._compiling))
            try:
                variant = compile(self.gm, self.inputs)
            except Exception as error:  # of whatever kind: the graph that there is will do
                warnings.warn(
                    "A graph that carries the needed rows could not be compiled again for batches without "
                    f"padding, with which it will be a little slower ({type(error).__name__}).",
                    stacklevel=2,
                )
                return None
        return variant if _guards(shapes) == before else None


def _guards(shapes: ShapeEnv | None) -> int:
    return 0 if shapes is None else len(shapes.guards)


@dataclasses.dataclass(slots=True)
class _Course:
    """What has been decided for one of the places in a model that a graph runs for."""

    now: Variant
    step: int | None = None
    share: float | None = None  # of the rows, that was needed when they were carried
    looks: Looks = dataclasses.field(default_factory=lambda: Looks(_LONGEST_PAUSE))

    def heard(self, share: float | None) -> None:
        """What share of the rows the last steps have carried, if they have."""
        if share is not None:
            known = share if self.share is None else self.share
            self.share = known + _NEWEST * (share - known)
            self.looks.found(self.share < WORTH_CARRYING)


class Variants:
    """Decides for each step which way a graph runs.

    Args:
        carrying: the graph that carries the needed rows.
    """

    def __init__(self, carrying: Variant) -> None:
        self._carrying = carrying
        self._all: list[Variant | None] = []  # when it is known
        self._courses: dict[Hashable, _Course] = {}

    def at(
        self,
        step: int,
        place: Hashable,
        share: Callable[[PlannedCalls], float | None],
        compile_all: Callable[[], Variant | None],
    ) -> Variant:
        """The way that a forward runs.

        Args:
            step: of the forward.
            place: for which model, and where in it.
            share: of the rows that have been carried there since this was last asked, the share of all; None
                if none have.
            compile_all: compiles the graph that computes all rows; None if it cannot be.
        """
        course = self._courses.setdefault(place, _Course(self._carrying))
        if step == course.step:
            return course.now
        course.step = step
        if course.now is self._carrying and self._carrying.planned is not None:
            course.heard(share(self._carrying.planned))
        course.now = self._carrying
        if not course.looks.due():
            if not self._all:
                self._all.append(compile_all())
            course.now = self._all[0] or self._carrying
        return course.now
