"""What the passes tell the runtime: one record per place of the graph that was looked at.

The records travel *inside* the compiled graph, as the JSON argument of the ``begin`` op
(``sparse_compile/ops.py``). They have to: when AOTAutograd or Inductor finds a graph in its on-disk
cache no pass runs at all, and what a pass had only remembered would be lost.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, TypeVar


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
        handed_over: ``"O I"`` or ``"I O"``, the layout of the weight, if the weight's gradient goes to the
            runtime and not to autograd; else empty.
        carried: whether a linear gets, and gives, the rows that anything needs and no others.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    flops_forward: int
    flops_backward: int
    rewritten: bool
    reason: str = ""
    call: int = 0
    handed_over: str = ""
    carried: bool = False


# What a packed tensor is to the backward; where it is several, the first of these counts.
SAVED_KINDS = ("activation input", "norm input", "attention", "linear input", "mask", "other")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SavedRecord:
    """One tensor of the forward that is packed for the backward.

    Attributes:
        name: module path of what makes it, relative to the module whose frame was compiled.
        kind: one of SAVED_KINDS.
        shape: as seen when the graph was traced.
        bytes_dense: its size, at that shape.
        bytes_packed: the size of its mask, kept values and scales.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes_dense: int
    bytes_packed: int


R = TypeVar("R", SiteRecord, SavedRecord)


def to_manifest(records: list[SiteRecord], saved: Sequence[SavedRecord] = ()) -> str:
    """The records as one line of JSON; site numbers in the graph are positions in the list of sites."""
    lists = [[dataclasses.astuple(record) for record in each] for each in (records, saved)]
    return json.dumps(lists, separators=(",", ":"))


def from_manifest(manifest: str) -> tuple[list[SiteRecord], list[SavedRecord]]:
    """The inverse of :func:`to_manifest`."""
    sites, saved = json.loads(manifest)
    return [_record(SiteRecord, values) for values in sites], [
        _record(SavedRecord, values) for values in saved
    ]


def _record(cls: type[R], values: list[Any]) -> R:
    names = [field.name for field in dataclasses.fields(cls)]
    fields = dict(zip(names, values, strict=True))
    return cls(**{**fields, "shape": tuple(fields["shape"])})
