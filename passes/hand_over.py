"""Hand the gradients of chosen weights to the runtime, where autograd would have got them.

Why: a gradient that the graph returns exists whole, as large as the weight. Of a chosen weight only few
entries are wanted, in another basis, so the op keeps dW to itself, and the graph returns nothing for it:

    backward   rows, index, dW = linear_backward(token, dY, X, W, site, …)
               return …, permute(dW), …

becomes

    backward   rows, index, _ = linear_backward(token, dY, X, W, site, …, handed_over=True)
               return …, None, …

What the runtime makes of it is not the graph's business: it may also be added to ``weight.grad``, as autograd
would have done. Autograd leaves a ``.grad`` alone for which it gets None.

A weight whose gradient is anything but this one dW (it is used twice, tied, sliced, computed from other
parameters) keeps its dense gradient, with the reason in its record.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection

import torch
from sparse_compile.passes import graph as g
from torch.fx import Graph, Node

from sparse_compile.sites import SiteRecord

aten = torch.ops.aten

_CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
_USED_ELSEWHERE = "its weight gradient stays dense: the weight has another use, or is part of a parameter"
_NOT_ASKED_FOR = "its weight gradient is not computed: the weight is frozen"


def hand_over(
    graph: Graph,
    ops: dict[Node, SiteRecord],
    *,
    chosen: Collection[str],
    parameters: dict[Node, str],
    records: list[SiteRecord],
) -> None:
    """Change the ops of the chosen layers, in place, and their records.

    Args:
        graph: the joint graph.
        ops: the ``linear_backward`` ops, and the record of each.
        chosen: names of layers, as in the records.
        parameters: the graph's inputs that are parameters.
        records: the graph's manifest, so far.
    """
    for op, record in list(ops.items()):
        if record.name not in chosen:
            continue
        slot, transposed = _returned_as(graph, op, parameters)
        if slot is None:
            reason = _NOT_ASKED_FOR if op.args[2] is None else _USED_ELSEWHERE
            new = dataclasses.replace(record, reason=reason)
        else:
            _return_nothing(graph, slot)
            op.args = (*op.args[:6], False, True, op.args[8])
            with op.meta["val"][2].fake_mode:
                op.meta["val"] = g.value_of(op)
            new = dataclasses.replace(record, handed_over="I O" if transposed else "O I")
        records[records.index(record)] = ops[op] = new


def _returned_as(graph: Graph, op: Node, parameters: dict[Node, str]) -> tuple[int | None, bool]:
    """Where among the graph's outputs the op's dW is, all by itself, as the gradient of the parameter that is
    the layer's weight, and whether that parameter is [I, O]; (None, …) if it is not."""
    output = graph.output_node()
    results: list[Node] = [user for user in op.users if user.target is operator.getitem and user.args[1] == 2]
    if len(results) != 1:
        return None, False
    (node,), transposed = results, bool(op.args[6])
    while list(node.users) != [output]:
        if len(node.users) != 1:
            return None, False
        (node,) = node.users
        if g.is_transpose(node):
            transposed = not transposed
        elif node.target not in (*_CASTS, *g.ALIASES):
            return None, False
    (returned,) = output.args
    slots = [i for i, value in enumerate(returned) if value is node]  # type: ignore[arg-type, union-attr]
    described = output.meta.get("desc") or []
    if len(slots) != 1 or len(described) <= slots[0]:
        return None, False
    position = getattr(getattr(described[slots[0]], "grad_of", None), "idx", None)
    of = [parameter for parameter in parameters if g.input_index(parameter) == position]
    fits = [g.sizes(g.shape_of(p)) == g.sizes(g.shape_of(node)) for p in of]
    return (slots[0], transposed) if position is not None and fits == [True] else (None, False)


def _return_nothing(graph: Graph, slot: int) -> None:
    output = graph.output_node()
    returned = list(output.args[0])  # type: ignore[arg-type]
    node, returned[slot] = returned[slot], None
    output.args = (tuple(returned),)
    while isinstance(node, Node) and node.target is not operator.getitem:
        (source,) = node.all_input_nodes
        graph.erase_node(node)
        node = source
    graph.erase_node(node)
