"""Write the bodies of nested regions out where they are called.

A layer that is wrapped in ``torch.compiler.nested_compile_region`` is compiled once for all its calls. In the
graph of Dynamo each call is one op, which no pass sees into, and all have one body:

    h1 = invoke_subgraph(body, "name", h0, *parameters of layers.0)[0]
    h2 = invoke_subgraph(body, "name", h1, *parameters of layers.1)[0]

What a layer's rows need, and what its samples are, follows from what is around it. So the bodies are written
out, and the graph is what it would have been without regions. (It takes as long to compile, too.)
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from sparse_compile.passes import graph as g
from torch.fx import GraphModule, Node, map_arg

from sparse_compile import naming

_CALL = torch.ops.higher_order.invoke_subgraph


@dataclasses.dataclass
class _Region:
    """How a region was called when Dynamo traced its body: the module it was in, and its operands' names, of
    those that are parameters."""

    path: str
    operands: list[str | None]

    @classmethod
    def of(cls, call: Node, names: Mapping[Node, str]) -> _Region:
        return cls(g.module_path(call), [names.get(operand) for operand in call.args[2:]])  # type: ignore[call-overload]

    def renamed(self, other: _Region) -> dict[str, str]:
        """Paths of modules as Dynamo has them in the body, and what they are in another call."""
        pairs = [(self.path, other.path), *zip(self.operands, other.operands, strict=True)]
        ends = [naming.without_common_end(a, b) for a, b in pairs if a and b and a != b]
        return {old: new for old, new in ends if old}


def inline_regions(gm: GraphModule, parameters: Mapping[int, str]) -> None:
    """Write out every nested region of a Dynamo graph, in place; those within checkpoints, too.

    Args:
        gm: the graph.
        parameters: position among the graph's inputs -> name of the parameter there. Dynamo names the modules
            of a body as those of its first call; those of the others are named after their parameters.
    """
    inputs = enumerate(gm.graph.find_nodes(op="placeholder"))
    _inline(gm, {node: parameters[position] for position, node in inputs if position in parameters}, {})


def all_nodes(gm: GraphModule) -> Iterator[Node]:
    """The nodes of a Dynamo graph, and those of checkpoints and the like in it."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            yield from module.graph.nodes


def bodies(node: Node, gm: GraphModule) -> list[GraphModule]:
    """The graphs that an op of a Dynamo graph runs in its forward: a checkpoint, a branch or a loop, say."""
    given = (each for each in node.args if isinstance(each, Node) and each.op == "get_attr")
    found = [body for each in given if isinstance(body := getattr(gm, str(each.target), None), GraphModule)]
    # The second one of an `autograd.Function` is its backward.
    return found[:1] if str(node.target) == "autograd_function_apply" else found


def names_within(body: GraphModule, node: Node, names: Mapping[Node, str]) -> dict[Node, str]:
    """The names of the inputs of a body that are parameters, by those of the nodes that ``node`` gives it."""
    last = max(i for i, each in enumerate(node.args) if isinstance(each, Node) and each.op == "get_attr")
    operands: list[Node] = []
    # `op(body, *operands)`, `cond(predicate, body, body, operands)`
    map_arg(node.args[last + 1 :], operands.append)
    inputs = zip(body.graph.find_nodes(op="placeholder"), operands, strict=False)
    return {inner: names[outer] for inner, outer in inputs if outer in names}


def _inline(gm: GraphModule, names: Mapping[Node, str], known: dict[Any, _Region]) -> None:
    calls: list[tuple[Node, GraphModule, dict[str, str]]] = []
    seen = set()
    for node in gm.graph.nodes:
        for body in bodies(node, gm):
            if body not in seen:
                seen.add(body)
                _inline(body, names_within(body, node, names), known)
            if node.target is _CALL:
                here = _Region.of(node, names)
                calls.append((node, body, known.setdefault(node.args[1], here).renamed(here)))
    for call in calls:
        _write_out(gm, *call)
    if calls:
        gm.delete_all_unused_submodules()
        gm.recompile()


def _write_out(gm: GraphModule, call: Node, body: GraphModule, renamed: Mapping[str, str]) -> None:
    """Put the nodes of a body in the place of its call."""
    copies = dict(zip(body.graph.find_nodes(op="placeholder"), call.args[2:], strict=True))
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            copy = gm.graph.node_copy(node, copies.__getitem__)
            if node.op == "get_attr":  # what a checkpoint in it runs, whose modules have names, too
                copy.target = f"{call.name}_{node.target}"
                value = deepcopy(getattr(body, str(node.target)))
                for inner in all_nodes(value) if isinstance(value, GraphModule) else ():
                    _rename_modules(inner, renamed)
                setattr(gm, copy.target, value)
            _rename_modules(copy, renamed)
            copies[node] = copy
    results = map_arg(body.graph.output_node().args[0], copies.__getitem__)
    for read in list(call.users):
        assert read.target is operator.getitem, read.format_node()
        read.replace_all_uses_with(results[read.args[1]])
        gm.graph.erase_node(read)
    region = call.args[0]
    gm.graph.erase_node(call)
    if not region.users:  # type: ignore[union-attr]
        gm.graph.erase_node(region)  # type: ignore[arg-type]


def _rename_modules(node: Node, renamed: Mapping[str, str]) -> None:
    stack = node.meta.get("nn_module_stack")
    if stack and renamed:
        node.meta["nn_module_stack"] = {
            key: (naming.move(g.clean_path(path), renamed.items()), kind)
            for key, (path, kind) in stack.items()
        }
