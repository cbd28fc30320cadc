"""List the linears that reached the joint graph as something other than a plain matrix product.

Nothing may be left out silently. Three ways in which a linear is not seen by ``passes/linear.py``:

- another op multiplies by the weight: the grouped products of a mixture of experts
  (``grouped_mm(x, W [E, I, O], offsets)``), a quantised or a vector product;
- a decomposition took it apart: with one input or one output feature a product is elementwise work;
- it is called within a branch or a loop (``torch.cond``, ``while_loop``, ``scan``), whose graphs stay apart.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import torch
from sparse_compile.passes import graph as g
from sparse_compile.passes.regions import bodies, names_within
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node

from sparse_compile.sites import SiteRecord

_MULTIPLIES = re.compile(r"(^|_)(mm|bmm|mv|matmul|linear|addmv)(_|$)")
_SEEN = ("mm", "addmm", "bmm", "baddbmm")


@dataclasses.dataclass(frozen=True)
class CalledLinear:
    """A linear in a Dynamo graph: the name of its site, and the op whose body it is in, such as ``cond``."""

    name: str
    within: str = ""


def record_leftovers(
    graph: Graph,
    *,
    below: dict[Node, frozenset[str]],
    called: Iterable[CalledLinear],
    records: list[SiteRecord],
) -> None:
    """Append a record for every linear that has none.

    Args:
        called: the linears that Dynamo saw: :func:`linears_called`.
    """
    for node in graph.nodes:
        if node.op == "call_function" and not g.is_backward(node) and _multiplies(node):
            weight = next((source for source in node.all_input_nodes if source in below), None)
            x = next((source for source in node.all_input_nodes if _is_activation(source, below)), None)
            if weight is not None and x is not None:
                records.append(_other_op(node, x, weight, below))
    known = {record.name for record in records}
    apart = {str(node.target) for node in graph.nodes if isinstance(node.target, HigherOrderOperator)}
    for linear in dict.fromkeys(called):
        if linear.name not in known:
            known.add(linear.name)
            records.append(
                SiteRecord(
                    name=linear.name,
                    kind="linear",
                    shape=(),
                    flops_forward=0,
                    flops_backward=0,
                    rewritten=False,
                    reason=f"it is called within the op {linear.within}, whose graph is not rewritten"
                    if linear.within in apart
                    else "it is no matrix product in the joint graph, but elementwise work",
                )
            )


def linears_called(gm: GraphModule, parameters: dict[int, str]) -> Iterator[CalledLinear]:
    """The linears in a Dynamo graph.

    Args:
        parameters: position among the graph's inputs -> name of the parameter there.
    """
    inputs = enumerate(gm.graph.find_nodes(op="placeholder"))
    yield from _linears_called(gm, {node: parameters[i] for i, node in inputs if i in parameters}, "")


def _linears_called(gm: GraphModule, names: dict[Node, str], within: str) -> Iterator[CalledLinear]:
    below = g.parameters_below(gm.graph, names)
    for node in gm.graph.nodes:
        if node.target is torch._C._nn.linear:
            weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
            yield CalledLinear(g.site_name(node, below.get(weight, frozenset())), within)
        for body in bodies(node, gm):
            yield from _linears_called(body, names_within(body, node, names), str(node.target))


def _is_activation(node: Node, below: dict[Node, frozenset[str]]) -> bool:
    return node not in below and g.is_tensor(node) and len(g.shape_of(node)) > 0


def _multiplies(node: Node) -> bool:
    if not g.is_tensor(node):
        return False
    name = node.target.__name__.partition(".")[0] if hasattr(node.target, "__name__") else str(node.target)
    return name not in _SEEN and _MULTIPLIES.search(name) is not None


def _other_op(node: Node, x: Node, weight: Node, below: dict[Node, frozenset[str]]) -> SiteRecord:
    inputs, result = g.sizes(g.shape_of(x))[-1], g.sizes(g.shape_of(node))
    outputs = result[-1] if len(result) > 1 else 1
    rows = math.prod(result) // max(outputs, 1)
    flops = 2 * rows * inputs * outputs
    return SiteRecord(
        name=g.site_name(node, below[weight]),
        kind="linear",
        shape=(rows, inputs, outputs),
        flops_forward=flops,
        flops_backward=2 * flops,  # dX and dW; whether the graph has both is not looked up
        rewritten=False,
        reason=f"its product is the op {node.target}, which is not rewritten",
    )
