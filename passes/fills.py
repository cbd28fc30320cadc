"""The steps of an attention that fill scores with a number, as ``masked_fill(mask, -1e9)`` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from sparse_compile.passes import graph as g
from torch.fx import Graph, Node

aten = torch.ops.aten

# Numbers up to this, where scores are filled with them, have no probability beside a key that is not filled.
LEAST_SCORE = -1e4


@dataclasses.dataclass(frozen=True, slots=True)
class Fill:
    """A step that fills scores with a number: where a condition ``holds``, or does not."""

    step: Node
    condition: Node
    holds: bool
    number: float

    @classmethod
    def of(cls, step: Node, source: Node) -> Fill | None:
        """None if this is no such step; ``source`` is what it fills."""
        if step.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            condition, holds, filling = step.args[1], True, step.args[2]
        elif step.target is aten.where.self:
            condition, holds = step.args[0], step.args[2] is source
            filling = step.args[1] if holds else step.args[2]
        else:
            return None
        numbers = [filling] if not isinstance(filling, Node) else [x for x in filling.args if _is_number(x)]
        if len(numbers) != 1 or not isinstance(condition, Node):
            return None
        return cls(step, condition, holds, float(numbers[0]))  # type: ignore[arg-type]


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def fills_among(steps: Sequence[Node], scores: Node) -> tuple[Fill, ...]:
    """Those of the steps from the scores to the softmax that fill, the last step first."""
    sources = [*steps, scores][1:]
    found = (Fill.of(step, source) for step, source in zip(steps, sources, strict=True))
    return tuple(fill for fill in found if fill is not None)


def filled_rows(graph: Graph, fills: Sequence[Fill], q: Node, *, before: Node) -> Node:
    """Which rows of the queries q [N, T, D] see no key that is not filled: bool [N, T, 1]."""
    step = fills[0].step

    def call(target: Any, *args: Any) -> Node:
        return g.call(graph, target, *args, like=step)

    with graph.inserting_before(before):
        seen: Node | None = None
        for fill in fills:
            left = call(aten.logical_not.default, fill.condition) if fill.holds else fill.condition
            seen = left if seen is None else call(aten.logical_and.default, seen, left)
        blind = call(aten.logical_not.default, call(aten.any.dim, seen, -1, True))
        leading = [g.size(graph, step, dim) for dim in range(len(g.shape_of(step)) - 1)]
        rows = call(aten.expand.default, blind, [*leading, 1])
        return call(aten.reshape.default, rows, [g.size(graph, q, 0), g.size(graph, q, 1), 1])
