"""On a GPU, let the products of the rows that are carried be the graph's own.

Why: once ``passes/compact.py`` carries n rows from op to op, a linear has no row to leave out any more, and
an op of ours would do nothing but the two products, of another n in every step, which the host would have to
look at each time. As nodes of the graph they cost the host what they cost it in plain ``torch.compile``, and
Inductor fuses what is around them.

    forward    y = sparse_compile.linear_forward(token, X, W, b, needed, site)        X [n, I]
    backward   rows, index, dW = sparse_compile.linear_backward(token, dY, X, W, …, rows, total)
               dX = rows[index]

becomes

    forward    y = addmm(b, X, t(W))
    backward   dX = mm(dY, W);  dW = mm(t(dY), X)

A linear that needs fewer rows than are carried (a head that reads first tokens, labels of some) gathers
those, and its result and dX are written out again. How many rows there are is waited for at the head of the
forward, once for each such mask. What counts them, and tells the runtime that a backward began, is one op
where gradients are gathered first:

    backward   rows' = sparse_compile.backward_rows(token, rows, total, sites)
"""

from __future__ import annotations

from typing import Any

import torch
from sparse_compile.passes import graph as g
from sparse_compile.passes.masks import Masks
from sparse_compile.passes.shared_masks import shared
from torch.fx import Graph, Node

aten = torch.ops.aten
ours = torch.ops.sparse_compile


def own_forward(graph: Graph, op: Node) -> Node:
    """The product in the place of a ``linear_forward``."""
    _, x, w, bias, *_ = op.args
    with graph.inserting_before(op):
        product = _forward(graph, x, w, bias, like=op)
    _replace(graph, op, product)
    return product


def own_products(
    graph: Graph, linears: dict[Node, Node], masks: Masks, token: Node
) -> dict[Node, list[Node]]:
    """Replace the ops of linears whose rows are carried.

    Args:
        graph: the joint graph, changed in place.
        linears: each ``linear_forward``, and the ``linear_backward`` of the same linear.
        masks: makes what is read of masks.
        token: the graph's ``begin`` node.

    Returns:
        The ops that count, whose sites are not set yet, and which of the ``linear_backward`` each counts;
        these are no longer in the graph.
    """
    counted: dict[Node, list[Node]] = {}
    regions: dict[Node, dict[Node, Node]] = {}
    for forward, backward in linears.items():
        regions.setdefault(_rows(forward), {})[forward] = backward
    for rows, of_these in regions.items():
        entries = _entries(graph, rows)
        if not entries:
            continue
        total = next(iter(of_these.values())).args[10]
        everything: Any = rows.args[0]
        stands_for = shared([everything, *map(_mask, of_these)])
        entered = _enter(graph, token, rows, total, entries)
        by_mask: dict[Node, dict[Node, Node]] = {}
        for forward, backward in of_these.items():
            by_mask.setdefault(stands_for[_mask(forward)], {})[forward] = backward
        for mask, alike in by_mask.items():
            counting = entered
            few = slots = None
            if mask is not stands_for[everything]:
                few, slots = _few_of(masks, mask, rows)
                with graph.inserting_before(first := min(alike.values())):
                    counting = _count(graph, token, few, total, like=first)
            counted[counting] = [*alike.values()]
            for forward, backward in alike.items():
                if few is None or slots is None:
                    own_forward(graph, forward)
                    _backward(graph, backward)
                else:
                    _narrow(graph, forward, backward, few, slots, counting)
    return counted


def _mask(forward: Node) -> Node:
    """Which rows of all [N] a linear needs; its op has those of the rows that are carried."""
    return forward.args[4].args[0]  # type: ignore[union-attr, return-value]


def _rows(forward: Node) -> Node:
    return forward.args[4].args[1][0]  # type: ignore[union-attr, index, return-value]


def _replace(graph: Graph, op: Node, y: Node) -> None:
    """Let what reads a ``linear_forward`` read ``y``, and erase it, and the rows of its mask."""
    needed: Any = op.args[4]
    op.replace_all_uses_with(y)
    graph.erase_node(op)
    if needed.target is aten._unsafe_index.Tensor and not needed.users:
        graph.erase_node(needed)


def _forward(graph: Graph, x: Any, w: Any, bias: Any, *, like: Node) -> Node:
    root, transposed = g.strip_transposes(w)
    weight = root if transposed else g.call(graph, aten.permute.default, root, [1, 0], like=like)
    if bias is None:
        return g.call(graph, aten.mm.default, x, weight, like=like)
    return g.call(graph, aten.addmm.default, bias, x, weight, like=like)


def _gradients(graph: Graph, op: Node, dy: Any, x: Any) -> tuple[Node | None, Node | None]:
    """dX and dW of a ``linear_backward`` as products, at the graph's insertion point."""
    w, transposed = op.args[3], op.args[6]
    dx = None if w is None else g.call(graph, aten.mm.default, dy, w, like=op)
    if x is None:
        return dx, None
    left, right = (x, dy) if transposed else (dy, x)
    left = g.call(graph, aten.permute.default, left, [1, 0], like=op)
    return dx, g.call(graph, aten.mm.default, left, right, like=op)


def _backward(graph: Graph, op: Node) -> None:
    _, dy, x, *_ = op.args
    with graph.inserting_before(op):
        dx, dw = _gradients(graph, op, dy, x)
    _put(graph, op, dx, dw)


def _put(graph: Graph, op: Node, dx: Node | None, dw: Node | None) -> None:
    """Let what reads the results of a ``linear_backward`` read these, and erase it."""
    results = {each.args[1]: each for each in op.users}
    if 2 in results and dw is not None:
        results[2].replace_all_uses_with(dw)
    if dx is not None and 1 in results:
        for gathered in list(results[1].users):
            gathered.replace_all_uses_with(dx)
            graph.erase_node(gathered)
    if dx is not None and 0 in results:
        results[0].replace_all_uses_with(dx)  # where dX comes whole
    for result in results.values():
        graph.erase_node(result)
    graph.erase_node(op)


def _narrow(graph: Graph, forward: Node, backward: Node, few: Node, slots: Node, entered: Node) -> None:
    """Compute a linear over ``few`` of the rows that are carried, which are ``entered`` in the backward."""
    _, x, w, bias, *_ = forward.args
    with graph.inserting_before(forward):
        some = _index(graph, x, few, like=forward)
        y = _forward(graph, some, w, bias, like=forward)
        at = g.call(graph, aten.clamp_min.default, slots, 0, like=forward)
        y = _index(graph, y, at, like=forward)
    _replace(graph, forward, y)
    _, dy, x, *_ = backward.args
    with graph.inserting_before(backward):
        dx, dw = _gradients(
            graph,
            backward,
            _index(graph, dy, entered, like=backward),
            None if x is None else _index(graph, x, few, like=backward),
        )
        if dx is not None:
            dx = _index(
                graph, dx, g.call(graph, aten.clamp_min.default, slots, 0, like=backward), like=backward
            )
            here = g.call(graph, aten.ge.Scalar, slots, 0, like=backward)
            here = g.call(graph, aten.unsqueeze.default, here, 1, like=backward)
            value = dx.meta["val"]
            zero = g.call(graph, aten.full.default, [], 0, like=dx, dtype=value.dtype, device=value.device)
            dx = g.call(graph, aten.where.self, here, dx, zero, like=backward)
    _put(graph, backward, dx, dw)


def _index(graph: Graph, x: Any, rows: Node, *, like: Node) -> Node:
    return g.call(graph, aten._unsafe_index.Tensor, x, [rows], like=like)


def _few_of(masks: Masks, mask: Node, rows: Node) -> tuple[Node, Node]:
    """Which of the ``rows`` that are carried are in a mask of all, and where each of them is among these."""
    here = masks.call(aten._unsafe_index.Tensor, mask, [rows])
    few = masks.call(ours.needed_rows.default, here)
    g.unbacked_rows(few, g.shape_of(mask)[0] // 8)
    carried = masks.call(aten.sym_size.int, rows, 0)
    return few, masks.call(ours.row_slots.default, few, carried)


def _entries(graph: Graph, rows: Node) -> list[Node]:
    """The nodes that gather ``rows`` of gradients, in order."""
    gradients = g.computed_from_tangents(graph)
    indices = {rows, *rows.users}
    gathers = graph.find_nodes(op="call_function", target=aten._unsafe_index.Tensor)
    return sorted(node for node in gathers if node.args[0] in gradients and indices.issuperset(node.args[1]))


def _count(graph: Graph, token: Node, rows: Node, total: Any, *, like: Node) -> Node:
    """The op that counts ``rows`` in a backward, at the graph's insertion point."""
    entered = g.call(graph, ours.backward_rows.default, token, rows, total, [], like=like)
    # Nothing that it reads is of the backward, where it has to run.
    entered.meta.update(val=rows.meta["val"], partitioner_tag="must_be_in_backward")
    return entered


def _enter(graph: Graph, token: Node, rows: Node, total: Any, entries: list[Node]) -> Node:
    """The op that counts, and lets the gathering of gradients read its rows."""
    first = entries[0]
    with graph.inserting_before(first):
        entered = _count(graph, token, rows, total, like=first)
        pair: list[Node] = []
        for entry in entries:
            index: Any = entry.args[1]
            if index == [rows]:
                entry.update_arg(1, [entered])
                continue
            if not pair:
                tokens = index[0].args[1]  # of each sample
                sample = g.call(
                    graph, aten.div.Tensor_mode, entered, tokens, like=first, rounding_mode="trunc"
                )
                before = g.call(graph, aten.mul.Tensor, sample, tokens, like=first)
                pair = [sample, g.call(graph, aten.sub.Tensor, entered, before, like=first)]
            entry.update_arg(1, pair)
    return entered
