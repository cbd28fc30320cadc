"""Fewer masks for a GPU: what is made of one (``sparse_compile::needed_slots``) takes some six launches, and
nearly every linear of a model has a mask of its own, though most say the same.

A mask is a union of *parts*, in whatever shape. So two with equal parts are equal, and one whose parts are
among another's says nothing that this one does not. What attention's keys add makes masks grow from the last
layer to the first; in a padded batch all of them are the real tokens, but no graph shows that. Where a larger
mask takes the place of a smaller one, rows are computed that nothing needs, which is right, too. So all masks
that an attention had a part in become the largest of them that holds them; those above the last attention,
such as that of a first token, stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from sparse_compile.passes import graph as g
from sparse_compile.passes.masks import is_one
from torch.fx import Node

aten = torch.ops.aten

Parts = frozenset[Node]
# What lays the same entries out anew.
_SHAPED = (
    aten.view.default,
    aten.clone.default,
    aten.unsqueeze.default,
    aten.squeeze.dims,
    aten.expand.default,
    aten.permute.default,
)


def shared(masks: Iterable[Node]) -> dict[Node, Node]:
    """For each mask, bool [N], the one that takes its place: itself, or one that needs no fewer rows."""
    known: dict[Node, Parts] = {}
    parts = {mask: _parts(mask, known) for mask in masks}
    every = frozenset().union(*parts.values())
    behind = {part: _comes_from(part, every - {part}) for part in every}
    result = {}
    for mask, own in parts.items():
        alike = [other for other in parts if parts[other] == own]
        # Of the same number of rows: parts are those of masks of one shape, up to their own layout.
        larger = [other for other in parts if parts[other] >= own and any(behind[part] for part in own)]
        result[mask] = max(larger or alike, key=lambda other: len(parts[other]))
    return result


def _parts(mask: Node, known: dict[Node, Parts]) -> Parts:
    """Those of a mask; itself, if it is no union, nor another one in a new shape."""
    if mask not in known:
        inputs = [each for each in mask.all_input_nodes if _entries(each) is not None]
        union = mask.target is aten.bitwise_or.Tensor
        if (union or _keeps_order(mask)) and all(
            g.same_size(_entries(each), _entries(mask)) for each in inputs
        ):
            known[mask] = frozenset().union(*(_parts(each, known) for each in inputs))
        else:
            known[mask] = frozenset((mask,))
    return known[mask]


def _entries(node: Node) -> Any:
    value = node.meta.get("val")
    return math.prod(value.shape) if isinstance(value, torch.Tensor) else None


def _keeps_order(node: Node) -> bool:
    """Whether the entries of its operand follow each other in it as they did there."""
    if node.target is aten.permute.default:
        x, order = node.args
        moved = [dim for dim in order if not is_one(g.shape_of(x)[dim])]  # type: ignore[arg-type, union-attr, index]
        return moved == sorted(moved)  # type: ignore[type-var]
    return node.target in _SHAPED


def _comes_from(node: Node, others: Parts) -> bool:
    """Whether one of these is among what ``node`` is computed from."""
    seen, waiting = set(), list(node.all_input_nodes)
    while waiting:
        each = waiting.pop()
        if each in others:
            return True
        if each not in seen:
            seen.add(each)
            waiting.extend(each.all_input_nodes)
    return False
