"""Which keys of an attention the needed queries may see, for ``passes/needed.py``.

A key is seen by a query if the mask does not put the least of all numbers, or minus infinity, on its score.
Of a query whose keys are all masked the softmax is even, or zero: it is taken to see them all.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from sparse_compile.passes import attention_chain
from sparse_compile.passes import graph as g
from sparse_compile.passes.fills import fills_among
from sparse_compile.passes.linear import NoMatch
from sparse_compile.passes.masks import ALL, Mask, Masks, UnknownSize, is_one
from torch.fx import Graph, Node

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """An attention that is a chain of products.

    Attributes:
        scores, out: its two products, [N, T, U] and [N, T, D].
        shape: of its scores as its mask is added to them, [B, H, T, U].
        biases: what is added to its scores on the way to the softmax.
        filled: the conditions under which they are filled with minus infinity, and whether that is where the
            condition holds.
    """

    scores: Node
    out: Node
    shape: tuple[Any, ...]
    biases: tuple[Node, ...]
    filled: tuple[tuple[Node, bool], ...]


def find(graph: Graph) -> Iterator[Chain]:
    """The chains of a graph whose every step is known, whose scores are one product, and of which nothing
    else in the forward reads what lies between: that would need rows of K that the result does not."""
    pairs = list(attention_chain.find_chains(graph))
    outs = Counter(out for _, out in pairs)
    for scores, out in pairs:
        if outs[out] > 1:
            continue
        try:
            _, _, steps = attention_chain.steps_between(scores, out)
        except NoMatch:
            continue
        if _is_closed(scores, out):
            yield _chain(scores, out, [step for step, _ in steps])


def _is_closed(scores: Node, out: Node) -> bool:
    between, stack = {scores}, [out]
    below = attention_chain.below(scores)
    while stack:
        new = [x for x in stack.pop().all_input_nodes if x in below and x not in between]
        between.update(new)
        stack.extend(new)
    return all(
        reader in between or reader is out or _is_for_backward(reader)
        for node in between
        for reader in node.users
    )


def _is_for_backward(node: Node) -> bool:
    """Whether no result of the forward depends on a reader: the backward alone does, or nothing any more."""
    if g.is_backward(node) or not node.users:
        return node.op != "output"
    # As it is saved; and the mask of a dropout.
    saved = node.target in (aten.detach.default, aten.alias.default, operator.getitem)
    return saved and all(map(_is_for_backward, node.users))


def _chain(scores: Node, out: Node, steps: list[Node]) -> Chain:
    biases = []
    filled = ((fill.condition, fill.holds) for fill in fills_among(steps, scores))
    for step in steps:
        if step.target is aten.add.Tensor:
            biases += [x for x in step.all_input_nodes if x not in (*steps, scores)]
    shapes = [g.shape_of(step) for step in steps if len(g.shape_of(step)) == 4]
    n, t, u = g.shape_of(scores)
    return Chain(scores, out, tuple(shapes[0]) if shapes else (n, 1, t, u), tuple(biases), tuple(filled))  # type: ignore[arg-type]


def keys_of_chain(masks: Masks, chain: Chain, rows: Mask) -> Mask:
    """Of the rows [N, T, 1] that are needed of a chain's result, what is needed of its V, [N, U, 1]."""
    seen: Mask = ALL
    for bias in chain.biases:
        seen = masks.both(seen, _unmasked(masks, bias))
    for condition, holds in chain.filled:
        seen = masks.both(seen, _where(masks, condition, not holds))
    n, t, u = g.shape_of(chain.scores)
    b, h, *_ = chain.shape
    try:
        heads = masks.reshaped(rows, (n, t, 1), (b, h, t, 1))
        return masks.reshaped(_keys(masks, heads, seen), (b, h, u, 1), (n, u, 1))
    except UnknownSize:
        return ALL


def keys_of_fused(masks: Masks, rows: Mask, query: Node, key: Node, bias: Any, *, causal: bool) -> Mask:
    """Of the rows [B, H, T, 1] that are needed of a fused attention's result, what is needed of K and V."""
    seen = ALL if bias is None else _unmasked(masks, bias)
    if causal:
        t, u = (masks.positions(g.shape_of(x)[2], dim, like=query) for x, dim in ((query, 2), (key, 3)))
        seen = masks.both(seen, masks.call(aten.ge.Tensor, t, u))
    keys = _keys(masks, rows, seen)
    # Keys and values may be shared by several heads of queries.
    return keys if g.same_size(g.shape_of(query)[1], g.shape_of(key)[1]) else masks.any_over(keys, [1])


def _keys(masks: Masks, rows: Mask, seen: Mask) -> Mask:
    """What rows [B, H, T, 1] of queries see, [B, H or 1, U, 1]; ``seen`` is [B, H, T, U], any of them 1."""
    if seen is not ALL:
        blind = masks.call(aten.logical_not.default, masks.any_over(seen, [3]))
        seen = ALL if is_one(g.shape_of(seen)[3]) else masks.union(seen, blind)
    if seen is ALL or is_one(g.shape_of(seen)[1]):
        rows = masks.any_over(rows, [1])
    return masks.permute(masks.any_over(masks.both(rows, seen), [2]), (0, 1, 3, 2))


def _unmasked(masks: Masks, bias: Node) -> Mask:
    """Where a mask lets a query see a key; everywhere if that is not known before the first product."""
    if not masks.at_hand(bias):
        return _unmasked_in_learned(masks, bias)
    dtype = bias.meta["val"].dtype
    if dtype == torch.bool:
        return _where(masks, bias, True)
    if not dtype.is_floating_point:
        return ALL
    source = _before_expansion(bias)
    return _of_four(masks, masks.call(aten.gt.Scalar, source, torch.finfo(dtype).min / 2))


def _unmasked_in_learned(masks: Masks, bias: Node) -> Mask:
    """The same of a mask that is part of a learned position bias."""
    args = bias.args
    if bias.target in (aten.clone.default, aten.expand.default) and _keeps_rank(bias):
        return _unmasked(masks, args[0])  # type: ignore[arg-type]
    if bias.target is aten.add.Tensor:
        a, b = (_unmasked(masks, x) if isinstance(x, Node) else ALL for x in args)
        return masks.both(a, b)
    if bias.target is aten.where.self and _is_least(args[2], bias):
        return _where(masks, args[0], True)  # type: ignore[arg-type]
    if bias.target is aten.masked_fill.Scalar and _is_least(args[2], bias):
        return _where(masks, args[1], False)  # type: ignore[arg-type]
    return ALL


def _is_least(value: Any, bias: Node) -> bool:
    """Whether a number, or a tensor filled with it, masks a score."""
    if isinstance(value, Node):
        fills = {aten.scalar_tensor.default: 0, aten.full.default: 1}
        value = value.args[fills[value.target]] if value.target in fills else 0.0
    return isinstance(value, float) and value < torch.finfo(bias.meta["val"].dtype).min / 2


def _keeps_rank(node: Node) -> bool:
    return len(g.shape_of(node)) == len(g.shape_of(node.args[0]))  # type: ignore[arg-type]


def _where(masks: Masks, condition: Node, holds: bool) -> Mask:
    if not masks.at_hand(condition):
        return ALL
    source = _before_expansion(condition)
    return _of_four(masks, source if holds else masks.call(aten.logical_not.default, source))


def _before_expansion(node: Node) -> Node:
    while node.target is aten.expand.default and _keeps_rank(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _of_four(masks: Masks, mask: Node) -> Mask:
    rank = len(g.shape_of(mask))
    if rank == 3:  # a chain of products without heads
        return masks.unsqueeze(mask, 1)
    return ALL if rank > 4 else masks.unsqueeze(mask, *range(4 - rank))
