"""What is a function of one activation is not saved: here it is computed again, in the backward."""

from __future__ import annotations

import torch
from sparse_compile.passes import graph as g
from sparse_compile.passes.readers import dropout_of, layer_norm_of
from torch import Tensor
from torch.fx import Graph, Node

from sparse_compile.methods import prune

aten = torch.ops.aten

RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def operands(value: Node) -> list[Node]:
    """The tensors of which ``value`` is an elementwise function; of a dropout, its input and its mask; of a
    layer norm, its input."""
    dropout, norm = dropout_of(value), layer_norm_of(value)
    if norm is not None:
        return [norm.args[0]]  # type: ignore[list-item]
    if dropout is None:
        return [node for node in value.all_input_nodes if g.is_tensor(node)]
    return [dropout.args[0], *(user for user in dropout.users if user.args[1] == 1)]  # type: ignore[list-item]


def recompute(graph: Graph, value: Node, found: dict[Node, Node]) -> Node:
    """``value`` of the forward again, from what stands for its operands."""
    dropout, norm = dropout_of(value), layer_norm_of(value)
    if norm is not None:
        (x,) = found.values()
        return _normed(graph, value, norm, x)
    if dropout is None:
        return copy_node(graph, value, found)
    x, mask = found.values()
    kept = g.call(graph, aten.mul.Tensor, x, mask, like=x)
    return g.call(graph, aten.mul.Tensor, kept, 1 / (1 - dropout.args[1]), like=x)  # type: ignore[operator]


def _normed(graph: Graph, value: Node, norm: Node, x: Node) -> Node:
    """The result of a layer norm again, from its restored input."""
    results = {user.args[1]: user for user in norm.users}
    mean, rstd = (results[i] for i in (1, 2))
    _, _, weight, bias, _ = norm.args
    given = [each for each in (weight, bias) if each is not None]

    def formula(x: Tensor, mean: Tensor, rstd: Tensor, *affine: Tensor) -> Tensor:
        rest = iter(affine)
        scale, shift = (None if each is None else next(rest) for each in (weight, bias))
        return prune.normed(x, mean, rstd, scale, shift, value.meta["val"].dtype)

    return g.inline(graph, formula, x, mean, rstd, *given, like=x, tag="must_be_in_backward")  # type: ignore[no-any-return, arg-type]


def copy_node(graph: Graph, node: Node, replaced: dict[Node, Node]) -> Node:
    """A copy of a forward node for the backward, at the insertion point, with other operands."""
    copy = graph.node_copy(node, lambda operand: replaced.get(operand, operand))
    if copy.target in RESHAPES:
        copy.target = aten.reshape.default  # what was a view before may not be one of the unpacked tensor
    like = next(iter(replaced.values()))
    copy.meta = {**like.meta, "val": g.value_of(copy)}
    return copy
