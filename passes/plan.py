"""Put planned ops in the place of ours, which can be part of CUDA graphs; see ``sparse_compile/plan.py``.

    forward    token = sparse_compile.begin(anchor, manifest)
               … = sparse_compile.needed_slots(token, …), linear_forward_rows(token, …)
    backward   … = sparse_compile.linear_backward(token, …), cuda_attention_backward(token, …), …

becomes, with the number of a plan, an input of the graph,

    forward    token, control = sparse_compile.begin.planned(plan, anchor, manifest)
               … = sparse_compile.needed_slots.planned(control, plan, …), …
    backward   control = sparse_compile.prepare_backward(plan, token, anchor, sites)
               … = sparse_compile.linear_backward.planned(control, plan, …), …

``begin`` and ``prepare_backward`` are called at every step, between CUDA graphs; all others are recorded, and
read nothing that is on the CPU: neither the token, nor whether a forward skips rows.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from sparse_compile.passes import graph as g
from torch.fx import Graph, Node

from sparse_compile import planned_ops as _planned_ops  # noqa: F401  (registers the ops that it puts in)

ours = torch.ops.sparse_compile

# An op that can be recorded -> what it becomes.
PLANNED = {
    ours.linear_backward.default: ours.linear_backward.planned,
    ours.needed_slots.default: ours.needed_slots.planned,
    ours.linear_forward_rows.default: ours.linear_forward_rows.planned,
    ours.sample_weights.default: ours.sample_weights.planned,
    ours.cuda_attention_backward.default: ours.cuda_attention_backward.planned,
}


def plan_ops(graph: Graph, ops: Iterable[Node], *, token: Node, plan: Node, sites: int) -> None:
    """Replace those of ``ops`` that can be recorded.

    Args:
        graph: the joint graph, changed in place; the site numbers of its ops are set.
        token: its ``begin`` node, whose manifest is set.
        plan: its input that is the number of a plan.
        sites: how many sites its manifest has.
    """
    on_gpu = [node for node in graph.find_nodes(op="placeholder") if g.is_tensor(node)]
    anchor = next((node for node in on_gpu if node.meta["val"].device.type == "cuda"), token.args[0])
    chosen = [op for op in ops if op.target in PLANNED]
    if not chosen:
        return
    token, control = _plan_begin(graph, token, plan, anchor)
    backwards = [node for node in graph.nodes if node in chosen and g.is_backward(node)]
    in_backward = control
    if backwards:
        with graph.inserting_before(backwards[0]):
            in_backward = g.call(
                graph, ours.prepare_backward.default, plan, token, anchor, sites, like=backwards[0]
            )
        # Nothing that it reads is of the backward, where it has to run.
        in_backward.meta["partitioner_tag"] = "must_be_in_backward"
    replaced = {}
    for op in [node for node in graph.nodes if node in chosen]:
        mine = in_backward if g.is_backward(op) else control
        with graph.inserting_before(op):
            new = g.call(graph, PLANNED[op.target], mine, plan, *_arguments(op), like=op)
        op.replace_all_uses_with(new)
        replaced[op] = new
    for op in reversed(list(replaced)):
        graph.erase_node(op)
    for new in replaced.values():
        for result in [each for each in new.users if not each.users and each.target is operator.getitem]:
            graph.erase_node(result)  # whether a forward skips rows, which is known of a plan


def _plan_begin(graph: Graph, token: Node, plan: Node, anchor: Any) -> tuple[Node, Node]:
    """The nodes of the token and of what orders the forward's ops behind it."""
    with graph.inserting_before(token):
        begin = g.call(graph, ours.begin.planned, plan, anchor, token.args[1], like=token)
        found = [g.call(graph, operator.getitem, begin, i, like=token) for i in range(2)]
    token.replace_all_uses_with(found[0])
    graph.erase_node(token)
    return found[0], found[1]


def _arguments(op: Node) -> list[Any]:
    """Those of a planned op, but for the first two."""
    _, *arguments = op.args
    if op.target is ours.linear_backward.default:
        *operands, _, dx_whole = [*arguments, False, False, False][:8]
        needed: Any = op.kwargs.get("needed")
        if needed is None:
            return [*operands, dx_whole, None, -1]
        *slots, skip = needed
        return [*operands, dx_whole, list(slots), _maker_of(skip)]
    if op.target is ours.linear_forward_rows.default:
        *operands, skip, site, whole = arguments
        return [*operands, site, _maker_of(skip), whole]
    return arguments


def _maker_of(skip: Node) -> int:
    """The site whose op made the mask that ``skip`` is about."""
    made: Any = skip.args[0]
    at = 3 if made.target is ours.needed_slots.planned else 2
    return int(made.args[at])
