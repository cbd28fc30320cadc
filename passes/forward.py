"""Put an op of ours in the place of a linear's forward where not all rows of its result are needed.

    forward    y = addmm(b, X, t(W))

becomes, with ``needed`` bool [N] from ``passes/needed.py``,

    forward    y = sparse_compile.linear_forward(token, X, W, b, needed, site)
"""

from __future__ import annotations

import torch
from sparse_compile.passes import graph as g
from sparse_compile.passes.compact import compact_rows
from sparse_compile.passes.linear import NO_SITE
from sparse_compile.passes.masks import Masks
from sparse_compile.passes.needed import rows_needed
from torch.fx import Graph, Node

aten = torch.ops.aten


def rewrite_forwards(
    graph: Graph,
    linears: dict[Node, Node],
    *,
    token: Node,
    below: dict[Node, frozenset[str]],
    loss_only: bool = False,
    compact: bool = False,
) -> tuple[dict[Node, Node], dict[Node, Node]]:
    """Rewrite the forward products of linears, as far as rows of them are not needed.

    Args:
        graph: the joint graph, changed in place.
        linears: the forward products whose backward is rewritten, and the op that it has become.
        token: the graph's ``begin`` node.
        below: :func:`passes.graph.parameters_below`.
        loss_only: of what the model returns, its loss alone is needed.
        compact: let what is between the products carry the needed rows only (``passes/compact.py``).

    Returns:
        The ops that were put in, and the op of the backward of each; their site numbers are not set yet. And
        the ops of both kinds that were replaced once more, and by what.
    """
    # On other devices the number of rows would have to be waited for.
    products = [each for each in linears if each.meta["val"].device.type == "cpu" and not each.kwargs]
    if not products:
        return {}, {}
    masks = Masks(graph, after=token, below=below)
    all_needed, needed = rows_needed(graph, products, masks, below, loss_only=loss_only)
    ops = {_rewrite(graph, product, mask, token): linears[product] for product, mask in needed.items()}
    replaced = {}
    if compact:
        all_needed |= {op: all_needed[product] for op, product in zip(ops, needed, strict=True)}
        replaced = compact_rows(graph, all_needed, masks, ops)
    masks.erase_unused()
    return ops, replaced


def _rewrite(graph: Graph, product: Node, needed: Node, token: Node) -> Node:
    x, weight = g.operands(product)
    bias = product.args[0] if product.target is aten.addmm.default else None
    with graph.inserting_before(product):
        root, transposed = g.strip_transposes(weight)
        w = root if transposed else g.call(graph, aten.permute.default, root, [1, 0], like=product)
        op = torch.ops.sparse_compile.linear_forward.default
        y = g.call(graph, op, token, x, w, bias, needed, NO_SITE, like=product)
    product.replace_all_uses_with(y)
    graph.erase_node(product)
    return y
