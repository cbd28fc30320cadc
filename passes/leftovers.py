"""List the linears that reached the joint graph as something other than a plain matrix product.

Nothing may be left out silently. Two ways in which a linear is not seen by ``passes/linear.py``:

- another op multiplies by the weight: the grouped products of a mixture of experts
  (``grouped_mm(x, W [E, I, O], offsets)``), a quantised or a vector product;
- a decomposition took it apart: with one input or one output feature a product is elementwise work.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from sparse_compile.passes import graph as g
from torch.fx import Graph, GraphModule, Node

from sparse_compile.sites import SiteRecord

_MULTIPLIES = re.compile(r"(^|_)(mm|bmm|mv|matmul|linear|addmv)(_|$)")
_SEEN = ("mm", "addmm", "bmm", "baddbmm")


def record_leftovers(
    graph: Graph, *, below: dict[Node, frozenset[str]], called: Iterable[str], records: list[SiteRecord]
) -> None:
    """Append a record for every linear that has none.

    Args:
        called: the names of the linears that Dynamo saw: :func:`linears_called`.
    """
    for node in graph.nodes:
        if node.op == "call_function" and not g.is_backward(node) and _multiplies(node):
            weight = next((source for source in node.all_input_nodes if source in below), None)
            if weight is not None and any(source not in below for source in node.all_input_nodes):
                records.append(_other_op(node, weight, below))
    known = {record.name for record in records}
    for name in dict.fromkeys(called):
        if name not in known:
            records.append(
                SiteRecord(
                    name=name,
                    kind="linear",
                    shape=(),
                    flops_forward=0,
                    flops_backward=0,
                    rewritten=False,
                    reason="it is no matrix product in the joint graph, but elementwise work",
                )
            )


def linears_called(gm: GraphModule, parameters: dict[int, str]) -> Iterator[str]:
    """The names of the linears in a Dynamo graph.

    Args:
        parameters: position among the graph's inputs -> name of the parameter there.
    """
    names = {node: parameters.get(i) for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    for node in gm.graph.find_nodes(op="call_function", target=torch._C._nn.linear):
        weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
        name = names.get(weight)
        yield g.site_name(node, frozenset([name] if name else []))


def _multiplies(node: Node) -> bool:
    name = node.target.__name__.partition(".")[0] if hasattr(node.target, "__name__") else str(node.target)
    return name not in _SEEN and _MULTIPLIES.search(name) is not None


def _other_op(node: Node, weight: Node, below: dict[Node, frozenset[str]]) -> SiteRecord:
    value = node.meta.get("val")
    return SiteRecord(
        name=g.site_name(node, below[weight]),
        kind="linear",
        shape=g.sizes(value.shape) if isinstance(value, torch.Tensor) else (),
        flops_forward=0,
        flops_backward=0,
        rewritten=False,
        reason=f"its product is the op {node.target}, which is not rewritten",
    )
