"""Which dimension of a tensor is that of the samples.

A model is taken to be given samples in the first dimension of its inputs, and an attention has them in its
first. In between a model may turn them: `nn.MultiheadAttention` works on [T, B, C] even where it is given
[B, T, C], and some models (CLIP) do so in all of their layers. What is remembered of tokens, or measured of
samples, has to know.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator

import torch
from sparse_compile.passes import graph as g
from torch.fx import Node

aten = torch.ops.aten


def are_second(node: Node, parameters: Container[Node]) -> bool:
    """Whether a tensor of the forward is [T, B, …]: its second dimension is that of the samples.

    Args:
        node: the tensor.
        parameters: what is made of parameters alone, which has no samples.
    """
    to_see, seen = [(node, 1)], set()
    while to_see:
        node, dim = to_see.pop()
        if (node, dim) in seen or node in parameters:
            continue
        seen.add((node, dim))
        if node.op == "placeholder" or _is_batched(node):
            return dim == 0
        to_see += reversed([*_above(node, dim)])
    return False


def _is_batched(node: Node) -> bool:
    """Whether a tensor is the result of an attention, or of one of its products: [B, H, …] or [B · H, …]."""
    made_of = node.args[0] if node.target is operator.getitem else node
    batched = (*g.ATTENTIONS, aten.bmm.default, aten.baddbmm.default)
    return made_of.target in batched  # type: ignore[union-attr]


def _above(node: Node, dim: int) -> Iterator[tuple[Node, int]]:
    """The tensors that this one is made of, and which of their dimensions has become ``dim``, as far as that
    is known; the likeliest first."""
    if node.op != "call_function" or not g.is_tensor(node):
        return
    rank = len(g.shape_of(node))
    source: Node = node.args[0] if node.args else node  # type: ignore[assignment]
    if node.target is aten.permute.default:
        yield source, node.args[1][dim] % rank  # type: ignore[index, operator]
    elif node.target is aten.t.default:
        yield source, rank - 1 - dim
    elif node.target is aten.transpose.int:
        one, other = (d % rank for d in node.args[1:3])  # type: ignore[operator]
        yield source, {one: other, other: one}.get(dim, dim)
    elif node.target in g.VIEWS:
        yield from _above_view(node, dim)
    elif node.target is aten.embedding.default:
        if dim < rank - 1:
            yield node.args[1], dim  # type: ignore[misc]
    elif not g.is_product(node):
        made_of = source if node.target is operator.getitem else node  # the results of a norm, say
        yield from ((each, dim) for each in made_of.all_input_nodes if _has(each, node, dim))


def _has(source: object, node: Node, dim: int) -> bool:
    """Whether ``source`` has as many dimensions, and the same size in this one."""
    if not isinstance(source, Node) or not g.is_tensor(source):
        return False
    ours, theirs = g.shape_of(node), g.shape_of(source)
    return len(ours) == len(theirs) and g.same_size(ours[dim], theirs[dim])


def _above_view(node: Node, dim: int) -> Iterator[tuple[Node, int]]:
    source: Node = node.args[0]  # type: ignore[assignment]
    shape, flat = g.shape_of(node), g.shape_of(source)
    if g.same_sizes(shape[: dim + 1], flat[: dim + 1]):
        yield source, dim
    elif len(flat) == 2 and dim < len(shape) - 1 and g.is_product(source):
        # The output of a linear: its rows are those of its input.
        rows: Node = g.operands(source)[0]
        if rows.target in g.VIEWS and g.same_sizes(shape[:-1], g.shape_of(rows.args[0])[:-1]):  # type: ignore
            yield rows.args[0], dim  # type: ignore[misc]
    elif dim == 0 and source.target is aten.bmm.default:  # [B · H, …] as [B, H, …]
        yield source, 0
