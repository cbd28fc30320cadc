"""Which dimension of a tensor is that of the samples.

A model is taken to be given samples in the first dimension of its inputs, and an attention has them in its
first. In between a model may turn them: `nn.MultiheadAttention` works on [T, B, C] even where it is given
[B, T, C], and some models (CLIP) do so in all of their layers. What is remembered of tokens, or measured of
samples, has to know.
"""

from __future__ import annotations

import operator

import torch
from sparse_compile.passes import graph as g
from torch.fx import Node

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def are_second(node: Node) -> bool:
    """Whether a tensor of the forward is [T, B, …]: its second dimension is that of the samples."""
    found: tuple[Node, int] | None = (node, 1)
    while found is not None:
        node, dim = found
        found = _above(node, dim)
    return dim == 0


def _above(node: Node, dim: int) -> tuple[Node, int] | None:
    """A tensor that this one is made of, and which of its dimensions has become ``dim``; None if there is
    none, or that is not known."""
    if node.op != "call_function" or not g.is_tensor(node):
        return None
    rank = len(g.shape_of(node))
    source = node.args[0] if node.args else None
    if node.target is aten.permute.default:
        return source, node.args[1][dim] % rank  # type: ignore[return-value, index, operator]
    if node.target is aten.transpose.int:
        one, other = (d % rank for d in node.args[1:3])  # type: ignore[operator]
        return source, {one: other, other: one}.get(dim, dim)  # type: ignore[return-value]
    if node.target in _VIEWS:
        return _above_view(node, dim)
    made_of = node.args[0] if node.target is operator.getitem else node  # the results of a norm, say
    if g.is_product(node) or made_of.target in g.ATTENTIONS:  # type: ignore[union-attr]
        return None
    found = next((each for each in made_of.all_input_nodes if _has(each, node, dim)), None)  # type: ignore
    return None if found is None else (found, dim)


def _has(source: object, node: Node, dim: int) -> bool:
    """Whether ``source`` has as many dimensions, and the same size in this one."""
    if not isinstance(source, Node) or not g.is_tensor(source):
        return False
    ours, theirs = g.shape_of(node), g.shape_of(source)
    return len(ours) == len(theirs) and g.same_size(ours[dim], theirs[dim])


def _above_view(node: Node, dim: int) -> tuple[Node, int] | None:
    source: Node = node.args[0]  # type: ignore[assignment]
    shape, flat = g.shape_of(node), g.shape_of(source)
    if g.same_sizes(shape[: dim + 1], flat[: dim + 1]):
        return source, dim
    if len(flat) == 2 and dim < len(shape) - 1 and g.is_product(source):
        # The output of a linear: its rows are those of its input.
        rows: Node = g.operands(source)[0]
        if rows.target in _VIEWS and g.same_sizes(shape[:-1], g.shape_of(rows.args[0])[:-1]):  # type: ignore
            return rows.args[0], dim  # type: ignore[return-value]
    return None
