"""Draw the random numbers of a few rows alone, where Inductor has replaced ``rand`` by its own generator.

Why: under dropout, random numbers are a large part of what is elementwise on a CPU. ``passes/compact.py``
takes the rows that are needed of those for all rows, so that dropout is what it is without that pass.
Inductor's generator makes each number from a seed and its position, so the others need not be drawn:

    inductor_random([B, T, …], seed, "rand")[sample, token]  becomes  sparse_compile.random_rows(seed, …)

This runs when Inductor is done with a joint graph. ``sparse_compile/lowerings.py`` says what the op compiles
to.
"""

from __future__ import annotations

from typing import Any

import torch
from sparse_compile.passes import graph as g
from torch._inductor import inductor_prims
from torch.fx import Graph, Node

aten = torch.ops.aten
prims = torch.ops.prims


def draw_few(graph: Graph) -> None:
    """Replace, in a joint graph, rows of random numbers by random numbers of rows; in place."""
    for node in graph.find_nodes(op="call_function", target=aten._unsafe_index.Tensor):
        casts, source = [], node.args[0]
        while source.target is prims.convert_element_type.default:
            casts.append(source)
            source = source.args[0]
        if not _is_uniform(source) or None in node.args[1]:
            continue
        size, seed = source.args[:2]
        with graph.inserting_before(node):
            few = g.call(
                graph, torch.ops.sparse_compile.random_rows.default, seed, list(node.args[1]), size, like=node
            )
            for cast in reversed(casts):
                few = g.call(graph, cast.target, few, *cast.args[1:], like=node)
        node.replace_all_uses_with(few)
        for unused in (node, *casts, source):
            if not unused.users:
                graph.erase_node(unused)


def _is_uniform(node: Any) -> bool:
    """Whether a node draws from [0, 1), all of it from the start of its seed."""
    if not isinstance(node, Node) or node.target is not inductor_prims.random:
        return False
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode")
    return mode == "rand" and not node.kwargs.get("offset")
