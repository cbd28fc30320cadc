"""What the passes tell the runtime: one record per place of the graph that was looked at.

The records travel *inside* the compiled graph, as the JSON argument of the ``begin`` op
(``sparse_compile/ops.py``). They have to: when AOTAutograd or Inductor finds a graph in its on-disk
cache no pass runs at all, and what a pass had only remembered would be lost.
"""

from __future__ import annotations

import dataclasses
import json


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SiteRecord:
    """One matched place in a graph, or one that looked like it and was left alone.

    Attributes:
        name: module path relative to the module whose frame was compiled, e.g.
            ``encoder.layer.3.intermediate.dense``; a weight that is not called ``weight`` adds its name.
        kind: ``"linear"``, ``"attention"`` or ``"matmul"`` (a product that is neither).
        shape: ``(N, I, O)`` of a linear, as seen when the graph was traced; other kinds give the shape of
            their result.
        flops_forward: multiply-adds of the forward, counted as 2 FLOPs each, at that shape.
        flops_backward: the same for the backward products that the graph holds, done densely.
        rewritten: whether the backward was replaced by an op of ours.
        reason: why it was left alone, or what is particular about the rewrite; may be empty.
        call: 0 for the first use of a layer in one forward, 1 for its second, …
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    flops_forward: int
    flops_backward: int
    rewritten: bool
    reason: str = ""
    call: int = 0


def to_manifest(records: list[SiteRecord]) -> str:
    """The records as one line of JSON; site numbers in the graph are positions in this list."""
    return json.dumps([dataclasses.astuple(record) for record in records], separators=(",", ":"))


def from_manifest(manifest: str) -> list[SiteRecord]:
    """The inverse of :func:`to_manifest`."""
    names = [field.name for field in dataclasses.fields(SiteRecord)]
    records = [dict(zip(names, values, strict=True)) for values in json.loads(manifest)]
    return [SiteRecord(**{**record, "shape": tuple(record["shape"])}) for record in records]
