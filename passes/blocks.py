"""Drop whole samples from the gradient between the blocks of a model.

Why: a sample that is dropped where its gradient leaves a block stays dropped in every earlier block. All its
rows are exactly zero there, and exact skipping leaves them out of every linear and attention below.

A joint graph does not say which of its backward nodes is the gradient of which activation. So the place is
marked before it is traced, in Dynamo's graph, where every node knows its module:

    h = <last node of block i>          becomes    h = boundary(<last node of block i>, i)

``boundary`` is the identity, and its derivative is an op of its own. In the joint graph the forward one is
taken out again, and the backward one,  dH' = boundary_gradient(dH, i),  becomes

    squares = Σ dH² over each sample                                        [B]
    weights = sparse_compile.sample_weights(token, squares, site)           [B], 0 for a dropped sample
    dH' = dH · weights
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import torch
from sparse_compile.passes import graph as g
from sparse_compile.passes.linear import NO_SITE
from sparse_compile.passes.regions import all_nodes, bodies
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from sparse_compile import naming
from sparse_compile.schedule import pattern_matches
from sparse_compile.sites import SiteRecord

aten = torch.ops.aten

_BOUNDARY = "sparse_compile.boundary"


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A repeated layer of the model: its module path, relative to the compiled frame's own module."""

    path: str
    class_name: str


def mark_blocks(gm: GraphModule, where: str | None = None, frame: Block | None = None) -> list[str]:
    """Put a ``boundary`` after every block of a Dynamo graph, in place.

    Args:
        where: a class name, or a pattern of module paths (:func:`pattern_matches`), of the blocks. None finds
            them: modules whose path ends in a number and that have modules in them.
        frame: the module whose forward the graph is the end of, with its path in the model. It may be a
            block, since FSDP2 cuts a graph at every layer, and many compile a model layer by layer.

    Returns:
        Their paths, in the order of the forward; ``boundary``'s second argument is a position in this list.
    """
    if frame is not None and _is_block(frame, where):
        return _mark_results(gm)
    # What a block computes in its own forward (a residual sum, say) is in no module below it; so which
    # modules hold others is asked of the whole graph.
    holders = {path for node in all_nodes(gm) for path, _ in _modules_of(node)[:-1]}
    blocks = {n: block for n in gm.graph.nodes if (block := _block_of(n, gm, where, holders)) is not None}
    ends: dict[Node, Block] = {}
    for node, block in blocks.items():
        if _is_hidden_state(node) and any(blocks.get(user) != block for user in node.users):
            ends[node] = block
    paths: list[str] = []
    for block in dict.fromkeys(ends.values()):
        candidates = [node for node in ends if ends[node] == block]
        inputs = _inputs(block, blocks)
        # The hidden state has the shape of the one that came in; what else leaves a block (a position bias,
        # an attention map) has not.
        for node in candidates if len(candidates) == 1 else [n for n in candidates if _shape(n) in inputs]:
            _mark(gm.graph, node, len(paths), inside={n for n, b in blocks.items() if b == block})
            paths.append(block.path)
    gm.recompile()
    return paths


def _is_block(frame: Block, where: str | None) -> bool:
    """Whether the module of a whole frame is a block; without a ``where``, the outermost numbered one."""
    if where is not None:
        return where == frame.class_name or pattern_matches(where, frame.path)
    *outside, name = frame.path.split(".")
    return name.isdigit() and not any(part.isdigit() for part in outside)


def _mark_results(gm: GraphModule) -> list[str]:
    """Mark the hidden states among the results of a graph that is a block; see :func:`mark_blocks`."""
    inputs = {_shape(node) for node in gm.graph.find_nodes(op="placeholder")}
    (output,) = gm.graph.find_nodes(op="output")
    ends = [node for node in output.all_input_nodes if _is_hidden_state(node) and _shape(node) in inputs]
    for number, node in enumerate(ends):
        _mark(gm.graph, node, number, inside=set(gm.graph.nodes) - {output})
    gm.recompile()
    return [""] * len(ends)


def _mark(graph: Graph, node: Node, number: int, inside: set[Node]) -> None:
    with graph.inserting_after(node):
        boundary = graph.call_function(torch.ops.sparse_compile.boundary.default, (node, number))
    boundary.meta = dict(node.meta)
    node.replace_all_uses_with(boundary, lambda user: user is not boundary and user not in inside)


def _modules_of(node: Node) -> list[tuple[str, str]]:
    """(path, class name) of the modules that a node of a Dynamo graph was run in, the outermost first."""
    return [
        (g.clean_path(path), naming.class_name(kind))
        for path, kind in (node.meta.get("nn_module_stack") or {}).values()
    ]


def _made_by(node: Node, gm: GraphModule) -> Node:
    """The node itself; of what a checkpoint returns, the node in it: a whole block may be in one."""
    op, number = node.args[:2] if node.target is operator.getitem else (node, 0)
    for body in bodies(op, gm) if isinstance(op, Node) else ():
        results = body.graph.output_node().args[0]
        result = results[number] if isinstance(results, Sequence) else results  # type: ignore[index]
        if isinstance(result, Node):
            return _made_by(result, body)
    return node


def _block_of(node: Node, gm: GraphModule, where: str | None, holders: set[str]) -> Block | None:
    """The outermost block that a node of a Dynamo graph is in; ``holders`` are paths of modules with others
    in them."""
    for path, name in _modules_of(_made_by(node, gm)):
        if where is None:
            # A numbered leaf is one layer of a Sequential, not a block.
            if path.rpartition(".")[2].isdigit() and path in holders:
                return Block(path, name)
        elif name == where or pattern_matches(where, path):
            return Block(path, name)
    return None


def _inputs(block: Block, blocks: dict[Node, Block]) -> set[tuple[str, ...]]:
    """The shapes of what a block reads from outside."""
    return {
        _shape(source)
        for node, other in blocks.items()
        if other == block
        for source in node.all_input_nodes
        if blocks.get(source) != block
    }


def _shape(node: Node) -> tuple[str, ...]:
    """As text: sizes that are symbols cannot be hashed, and comparing them would make guards of them."""
    value = node.meta.get("example_value")
    return tuple(map(str, value.shape)) if isinstance(value, Tensor) else ()


def _is_hidden_state(node: Node) -> bool:
    value = node.meta.get("example_value")
    return (
        node.op.startswith("call")
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() >= 2
    )


def rewrite_blocks(graph: Graph, token: Node | None, paths: Sequence[str]) -> dict[Node, SiteRecord]:
    """Take the marks out of a joint graph, and put sampling where their gradients are.

    Args:
        token: the graph's ``begin`` node; None for a graph that has no gradient.
        paths: what :func:`mark_blocks` returned.

    Returns:
        The ops that were inserted, and the record of each.
    """
    ops: dict[Node, SiteRecord] = {}
    for node in [n for n in graph.nodes if str(n.target).startswith(_BOUNDARY)]:
        if node.target is torch.ops.sparse_compile.boundary_gradient.default and token is not None:
            op, result = _sample(graph, node, token)
            ops[op] = SiteRecord(
                name=paths[int(node.args[1])],  # type: ignore[call-overload]
                kind="block",
                shape=g.sizes(g.shape_of(node)),
                flops_forward=0,
                flops_backward=0,
                rewritten=True,
            )
        else:
            result = _without_mark(graph, node)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    return ops


def _without_mark(graph: Graph, mark: Node) -> Node:
    """What was marked; a copy where the trace went on with another layout than it has (a slice, say), since
    views that follow count on it."""
    marked: Node = mark.args[0]  # type: ignore[assignment]
    before, after = (list(map(str, n.meta["val"].stride())) for n in (marked, mark))
    if before == after:
        return marked
    with graph.inserting_before(mark):
        return g.call(graph, aten.clone.default, marked, like=mark)


def _sample(graph: Graph, node: Node, token: Node) -> tuple[Node, Node]:
    gradient: Node = node.args[0]  # type: ignore[assignment]
    value = gradient.meta["val"]
    with graph.inserting_before(node):
        wide = gradient
        if value.dtype in (torch.float16, torch.bfloat16):
            wide = g.call(graph, torch.ops.prims.convert_element_type.default, wide, torch.float32, like=node)
        square = g.call(graph, aten.mul.Tensor, wide, wide, like=node)
        squares = g.call(graph, aten.sum.dim_IntList, square, list(range(1, value.dim())), like=node)
        op = g.call(
            graph, torch.ops.sparse_compile.sample_weights.default, token, squares, NO_SITE, like=node
        )
        weights = op
        for dim in range(1, value.dim()):
            weights = g.call(graph, aten.unsqueeze.default, weights, dim, like=node)
        # In float32: the weights of neighbouring blocks are alike, and what is rounded off would add up.
        result = g.call(graph, aten.mul.Tensor, wide, weights, like=node)
        if wide is not gradient:
            result = g.call(
                graph, torch.ops.prims.convert_element_type.default, result, value.dtype, like=node
            )
    return op, result
