"""Put an op of ours in the place of a linear's forward where not all rows of its result are needed.

    forward    y = addmm(b, X, t(W))

becomes, with ``needed`` bool [N] from ``passes/needed.py``,

    forward    y = sparse_compile.linear_forward(token, X, W, b, needed, site)

and on a GPU, where the number of such rows would have to be waited for,

    forward    slots   = sparse_compile.needed_slots(token, needed, site)         once for each mask
               rows, i = sparse_compile.linear_forward_rows(token, X, W, b, *slots, site)
               y       = rows[i]                                                  fused with what reads Y,
                                                                                  or y itself: `whole`
    backward   … = sparse_compile.linear_backward(token, …, needed=slots)

or, with ``gpu_carries``, by few rows that are carried (``passes/compact.py``), whose number is waited for
once; see ``passes/own_products.py``.
"""

from __future__ import annotations

import dataclasses
import math
import operator

import torch
from sparse_compile.passes import graph as g
from sparse_compile.passes.compact import compact_rows
from sparse_compile.passes.linear import NO_SITE
from sparse_compile.passes.masks import Masks
from sparse_compile.passes.needed import rows_needed
from sparse_compile.passes.own_products import own_forward, own_products
from sparse_compile.passes.readers import read_by_loops
from sparse_compile.passes.shared_masks import shared
from torch.fx import Graph, Node

aten = torch.ops.aten

_CPU, _GPU = ("cpu",), ("cuda",)
# FLOPs of a product, below which a GPU takes longer to be asked than to multiply: an H100 does 2e9 in 3 µs.
_WORTH_ASKING = 2e9


@dataclasses.dataclass(frozen=True, slots=True)
class Forwards:
    """What was done to the forward products of a graph; sites of new ops are not set yet.

    Attributes:
        ops: those that were put in, and the op of the backward of each.
        replaced: those of both kinds that were replaced once more, and by what.
        counted: those that count rows for linears whose products are the graph's own, and the ops of these
            linears' backwards, which are in the graph no longer.
    """

    ops: dict[Node, Node]
    replaced: dict[Node, Node]
    counted: dict[Node, list[Node]]


def rewrite_forwards(
    graph: Graph,
    linears: dict[Node, Node],
    *,
    token: Node,
    below: dict[Node, frozenset[str]],
    loss_only: bool = False,
    compact: bool = False,
    gpu_carries: bool = False,
) -> Forwards:
    """Rewrite the forward products of linears, as far as rows of them are not needed.

    Args:
        graph: the joint graph, changed in place.
        linears: the forward products whose backward is rewritten, and the op that it has become.
        token: the graph's ``begin`` node.
        below: :func:`passes.graph.parameters_below`.
        loss_only: of what the model returns, its loss alone is needed.
        compact: let what is between the products carry the needed rows only (``passes/compact.py``).
        gpu_carries: on a GPU, too.
    """
    carries = _GPU if gpu_carries else ()
    worth = (each for each in linears if _is_worth_it(each) or _device(each) in carries)
    products = [each for each in worth if not each.kwargs]
    if not products:
        return Forwards({}, {}, {})
    masks = Masks(graph, after=token, below=below)
    all_needed, needed = rows_needed(graph, products, masks, below, loss_only=loss_only)
    on_gpu = any(_device(product) in _GPU for product in needed)
    if on_gpu and not (compact and gpu_carries):
        ops = _rewrite_on_gpu(graph, needed, linears, token)
        masks.erase_unused()
        return Forwards(ops, {}, {})
    wanted = {_rewrite(graph, product, mask, token): (product, mask) for product, mask in needed.items()}
    ops = {op: linears[product] for op, (product, _) in wanted.items()}
    replaced: dict[Node, Node] = {}
    if compact:
        all_needed |= {op: all_needed[product] for op, (product, _) in wanted.items()}
        replaced = compact_rows(graph, all_needed, masks, ops)
    counted: dict[Node, list[Node]] = {}
    if on_gpu:
        was = {new: old for old, new in replaced.items()}
        carried = {op: backward for op, backward in ops.items() if op in replaced}
        made = own_products(graph, {replaced[op]: replaced[b] for op, b in carried.items()}, masks, token)
        counted = {op: [was[backward] for backward in backwards] for op, backwards in made.items()}
        gone = set().union(*counted.values())
        kept = {op: backward for op, backward in carried.items() if backward not in gone}
        replaced = {old: replaced[old] for pair in kept.items() for old in pair}
        left = {own_forward(graph, op): op for op in ops if op not in carried}
        linears = {product: ops[op] for product, op in left.items()}
        masked = {product: wanted[op][1] for product, op in left.items() if _is_worth_it(product)}
        ops = kept | _rewrite_on_gpu(graph, masked, linears, token)
    masks.erase_unused()
    return Forwards(ops, replaced, counted)


def _is_worth_it(product: Node) -> bool:
    if _device(product) in _GPU:
        sizes = (*g.shape_of(product), g.shape_of(g.operands(product)[0])[1])
        # Where a size is not known, it may be any.
        return not all(isinstance(size, int) for size in sizes) or 2 * math.prod(sizes) >= _WORTH_ASKING
    return _device(product) in _CPU


def _device(node: Node) -> str:
    return str(node.meta["val"].device.type)


def _operands(graph: Graph, product: Node) -> tuple[Node, Node, Node | None]:
    """X [N, I], W [O, I] and b [O] of a linear, at the graph's insertion point."""
    x, weight = g.operands(product)
    root, transposed = g.strip_transposes(weight)
    w = root if transposed else g.call(graph, aten.permute.default, root, [1, 0], like=product)
    return x, w, product.args[0] if product.target is aten.addmm.default else None  # type: ignore[return-value]


def _rewrite(graph: Graph, product: Node, needed: Node, token: Node) -> Node:
    op = torch.ops.sparse_compile.linear_forward.default
    with graph.inserting_before(product):
        y = g.call(graph, op, token, *_operands(graph, product), needed, NO_SITE, like=product)
    product.replace_all_uses_with(y)
    graph.erase_node(product)
    return y


def _rewrite_on_gpu(
    graph: Graph, needed: dict[Node, Node], linears: dict[Node, Node], token: Node
) -> dict[Node, Node]:
    """The ops that were put in for linears with a mask in ``needed``, and the op of the backward of each."""
    ops = {}
    slots: dict[Node, list[Node]] = {}
    stands_for = shared(needed.values())
    for product, own_mask in needed.items():
        mask = stands_for[own_mask]
        if mask not in slots:
            with graph.inserting_after(mask):
                made = g.call(
                    graph, torch.ops.sparse_compile.needed_slots.default, token, mask, NO_SITE, like=mask
                )
            ops[made] = linears[product]
            slots[mask] = _results(graph, made, 5)
        kept, count, slot, copies, skip = slots[mask]
        forward = torch.ops.sparse_compile.linear_forward_rows.default
        with graph.inserting_before(product):
            operands = (*_operands(graph, product), kept, count, slot, copies, skip)
            # Where Y has to be written out all the same, the op does so, and only if it must.
            whole = not read_by_loops(product)
            op = g.call(graph, forward, token, *operands, NO_SITE, whole, like=product)
        y, *index = _results(graph, op, 1 if whole else 2)
        with graph.inserting_before(product):
            if not whole:
                y = g.call(graph, aten._unsafe_index.Tensor, y, index, like=product)
        product.replace_all_uses_with(y)
        graph.erase_node(product)
        ops[op] = linears[product]
        backward = linears[product]
        backward.kwargs = {**backward.kwargs, "needed": [kept, count, slot, skip]}
    return ops


def _results(graph: Graph, op: Node, count: int) -> list[Node]:
    """What an op returns, one by one, behind it."""
    found: list[Node] = []
    for i in range(count):
        with graph.inserting_after(found[-1] if found else op):
            found.append(g.call(graph, operator.getitem, op, i, like=op))
    return found
