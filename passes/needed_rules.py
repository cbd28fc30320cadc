"""What each op of a forward needs of its operands, for what is needed of its result: ``passes/needed.py``."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sparse_compile.passes import graph as g
from sparse_compile.passes import visible
from sparse_compile.passes.masks import ALL, Mask, Masks, is_one
from torch.fx import Node

aten = torch.ops.aten
prims = torch.ops.prims

Needs = Iterator[tuple[Any, Mask]]
Rule = Callable[["Known", Node, Mask], Needs]
RuleOfSeveral = Callable[["Known", Node, int, Mask], Needs]
_RULES: dict[Any, Rule] = {}
_OF_SEVERAL: dict[Any, RuleOfSeveral] = {}  # of ops with several results: what one of these needs

_CASTS = (aten._to_copy.default, prims.convert_element_type.default)
_VIEWS = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default),
    *(aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.expand.default, aten.clone.default, aten.detach.default, aten.alias.default),
)
_FMA = tuple(op.default for op in [getattr(prims, "fma", None)] if op is not None)
_REDUCTIONS = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.any.dim)
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """What a rule may ask.

    Attributes:
        masks: makes masks.
        attentions: the attentions that are chains of products, by both of these.
    """

    masks: Masks
    attentions: dict[Node, visible.Chain]


def of_operands(known: Known, node: Node, mask: Mask) -> list[tuple[Any, Mask]]:
    """The operands of a node of which ``mask`` is needed, and what is needed of them.

    Raises:
        UnknownSize: that cannot be told under dynamic shapes.
    """
    rule = _RULES.get(node.target, _pointwise if _is_pointwise(node) else _whole)
    return list(rule(known, node, mask))


def keeps_rows_apart(node: Node) -> bool:
    """Whether a row of the node's result depends on the same row of its operands alone, or is a view."""
    if node.target in (*_REDUCTIONS, aten.var_mean.correction):
        x: Any = node.args[0]
        return len(g.shape_of(x)) - 1 in _dims(g.arguments(node)["dim"], x)
    known = node.target in _RULES or node.target in _OF_SEVERAL or _is_pointwise(node)
    return known and node.target not in _PRODUCTS


def _is_pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


def _whole(known: Known, node: Node, mask: Mask) -> Needs:
    for operand in node.all_input_nodes:
        yield operand, ALL


@_rule(aten.clone.default, aten.detach.default, aten.alias.default, aten._to_copy.default)
@_rule(prims.convert_element_type.default, aten.expand.default, *_FMA)
def _pointwise(known: Known, node: Node, mask: Mask) -> Needs:
    for operand in node.all_input_nodes:
        if g.is_tensor(operand) and not known.masks.fixed(operand):
            yield operand, known.masks.reduced_to(mask, g.shape_of(operand))


@_rule(aten.sym_size.int)
def _size(known: Known, node: Node, mask: Mask) -> Needs:
    """A size needs no entry."""
    yield from ()


@_rule(aten.mul.Tensor)
def _multiply(known: Known, node: Node, mask: Mask) -> Needs:
    """What is multiplied by 0 is not needed. (Only asked of factors that are masks: of others few are 0.)"""
    a, b = node.args
    for x, factor in ((a, b), (b, a)):
        if isinstance(x, Node) and not known.masks.fixed(x):
            its = mask
            if (flags := _flags(known, factor)) is not None:
                shown = known.masks.call(aten.ne.Scalar, flags, 0)
                its = known.masks.both(mask, _aligned(known, shown, node))
            yield x, known.masks.reduced_to(its, g.shape_of(x))


@_rule(aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _choose(known: Known, node: Node, mask: Mask) -> Needs:
    if node.target is aten.where.self:
        condition, *choices = node.args
    else:
        x, condition, value = node.args
        choices = [value, x]
    flags = _flags(known, condition)
    for choice, test in zip(choices, (aten.ne.Scalar, aten.eq.Scalar), strict=True):
        if isinstance(choice, Node) and not known.masks.fixed(choice):
            its = mask
            if flags is not None:
                its = known.masks.both(mask, _aligned(known, known.masks.call(test, flags, 0), node))
            yield choice, known.masks.reduced_to(its, g.shape_of(choice))
    if isinstance(condition, Node) and flags is None:
        yield condition, known.masks.reduced_to(mask, g.shape_of(condition))


def _flags(known: Known, factor: Any) -> Node | None:
    """What a factor is a copy of, if that is at hand and made of flags (bools or integers)."""
    if not isinstance(factor, Node) or not g.is_tensor(factor) or not known.masks.at_hand(factor):
        return None
    source = factor
    while source.target in _CASTS or source.target is aten.expand.default:
        operand: Node = source.args[0]  # type: ignore[assignment]
        if len(g.shape_of(operand)) != len(g.shape_of(source)):
            break
        source = operand
    probe = source
    while probe.target in _VIEWS or probe.target in _CASTS or probe.target is aten.expand.default:
        probe = probe.args[0]  # type: ignore[assignment]
    return None if probe.meta["val"].dtype.is_floating_point else source


def _aligned(known: Known, mask: Node, node: Node) -> Mask:
    """A mask with as many dimensions as ``node`` has."""
    return known.masks.unsqueeze(mask, *range(len(g.shape_of(node)) - len(g.shape_of(mask))))


@_rule(operator.getitem)
def _getitem(known: Known, node: Node, mask: Mask) -> Needs:
    """One result of several: it says at once what it needs of the operands of their op."""
    source: Any = node.args[0]
    index: Any = node.args[1]
    if source.target in _OF_SEVERAL:
        yield from _OF_SEVERAL[source.target](known, source, index, mask)
    else:
        yield source, ALL


def _of_several(*targets: Any) -> Callable[[RuleOfSeveral], RuleOfSeveral]:
    def register(rule: RuleOfSeveral) -> RuleOfSeveral:
        _OF_SEVERAL.update(dict.fromkeys(targets, rule))
        return rule

    return register


@_rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(known: Known, node: Node, mask: Mask) -> Needs:
    (x, *_) = node.args
    yield x, known.masks.reshaped(mask, g.shape_of(node), g.shape_of(x))  # type: ignore[arg-type]


@_rule(aten.permute.default, aten.transpose.int, aten.t.default)
def _permute(known: Known, node: Node, mask: Mask) -> Needs:
    x, *dims = node.args
    rank = len(g.shape_of(node))
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [dim % rank for dim in dims[0]]  # type: ignore[union-attr, operator]
    elif rank > 1:
        i, j = (dim % rank for dim in dims or (0, 1))  # type: ignore[operator]
        order[i], order[j] = order[j], order[i]
    yield x, known.masks.permute(mask, [order.index(dim) for dim in range(rank)])


@_rule(aten.unsqueeze.default)
def _unsqueeze(known: Known, node: Node, mask: Mask) -> Needs:
    x, dim = node.args
    yield x, known.masks.squeeze(mask, dim % len(g.shape_of(node)))  # type: ignore[operator]


@_rule(aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(known: Known, node: Node, mask: Mask) -> Needs:
    x: Any = node.args[0]
    yield (
        x,
        known.masks.unsqueeze(mask, *(dim for dim in _dims(node.args[1], x) if is_one(g.shape_of(x)[dim]))),
    )


@_rule(aten.select.int)
def _select(known: Known, node: Node, mask: Mask) -> Needs:
    x: Any = node.args[0]
    dim, index = (node.args[1] % len(g.shape_of(x)), node.args[2])  # type: ignore[operator]
    yield x, _within(known, known.masks.unsqueeze(mask, dim), x, dim, index, index)


@_rule(aten.slice.Tensor)
def _slice(known: Known, node: Node, mask: Mask) -> Needs:
    given = g.arguments(node)
    x, dim = given["self"], given["dim"] % len(g.shape_of(node))
    size = g.shape_of(x)[dim]
    if g.same_size(size, g.shape_of(node)[dim]):
        yield x, mask
        return
    start, end = given["start"] or 0, given["end"]
    if isinstance(start, int) and isinstance(size, int) and start < 0:
        start = max(0, start + size)  # it may begin before the first
    last = end - 1 if isinstance(end, int) and isinstance(size, int) and end <= size else -1
    yield x, _within(known, known.masks.any_over(mask, [dim]), x, dim, start, last)


def _within(known: Known, mask: Mask, x: Node, dim: int, first: Any, last: Any) -> Mask:
    """A mask whose ``dim`` has size 1, for the positions ``first`` … ``last`` of it alone."""
    size, ends = g.shape_of(x)[dim], (first, last)
    if not all(isinstance(end, int) and (end >= 0 or isinstance(size, int)) for end in ends):
        return mask
    first, last = (end % size if end < 0 else end for end in ends)
    position = known.masks.positions(size, dim, like=x)
    mask = known.masks.both(mask, known.masks.call(aten.ge.Scalar, position, first))
    return known.masks.both(mask, known.masks.call(aten.le.Scalar, position, last))


@_rule(aten.cat.default)
def _cat(known: Known, node: Node, mask: Mask) -> Needs:
    operands: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    for x in operands:
        alike = len(g.shape_of(x)) == len(g.shape_of(node))  # and not an empty one of one dimension
        yield x, known.masks.any_over(mask, [dim]) if alike else ALL


@_rule(*_REDUCTIONS)
def _reduce(known: Known, node: Node, mask: Mask) -> Needs:
    x: Any = node.args[0]
    yield x, _before_reduction(known, node, mask)


@_of_several(aten.var_mean.correction)
def _of_reduction(known: Known, node: Node, index: int, mask: Mask) -> Needs:
    yield node.args[0], _before_reduction(known, node, mask)


def _before_reduction(known: Known, node: Node, mask: Mask) -> Mask:
    x: Any = node.args[0]
    kept = mask is ALL or len(g.shape_of(mask)) == len(g.shape_of(x))
    return mask if kept else known.masks.unsqueeze(mask, *_dims(g.arguments(node)["dim"], x))


def _dims(dims: Any, x: Node) -> list[int]:
    """The dimensions of x that an op names; none is all."""
    rank = len(g.shape_of(x))
    named = [dims] if isinstance(dims, int) else dims or range(rank)
    return [dim % rank for dim in named]


@_rule(aten._softmax.default, aten._safe_softmax.default, aten._log_softmax.default)
def _softmax(known: Known, node: Node, mask: Mask) -> Needs:
    yield node.args[0], known.masks.any_over(mask, _dims(node.args[1], node))


@_rule(aten.gather.default)
def _gather(known: Known, node: Node, mask: Mask) -> Needs:
    x, dim, index = node.args[:3]
    same = [g.same_size(a, b) for a, b in zip(g.shape_of(x), g.shape_of(index), strict=True)]  # type: ignore
    (along,) = _dims(dim, node)
    fits = all(equal for other, equal in enumerate(same) if other != along)
    yield x, known.masks.any_over(mask, [along]) if fits else ALL
    yield index, mask


@_rule(aten.index.Tensor)
def _index(known: Known, node: Node, mask: Mask) -> Needs:
    """X[i, j, …] with indices of one dimension, as the last token of each sample is taken."""
    x, indices = node.args[:2]
    shape = g.shape_of(x)  # type: ignore[arg-type]
    at_hand = all(isinstance(i, Node) and known.masks.at_hand(i) for i in indices)  # type: ignore[union-attr]
    if not at_hand or any(len(g.shape_of(i)) != 1 or _is_bool(i) for i in indices):  # type: ignore[union-attr]
        yield from _whole(known, node, mask)
        return
    call, device = known.masks.call, node.meta["val"].device
    sizes = known.masks.sizes(shape[: len(indices)])  # type: ignore[arg-type]
    none = call(aten.full.default, sizes, False, dtype=torch.bool, device=device)
    read = call(aten.index_put.default, none, indices, call(aten.full.default, [], True, device=device))
    yield x, known.masks.unsqueeze(read, *range(len(indices), len(shape)))  # type: ignore[arg-type]


def _is_bool(node: Node) -> bool:
    return bool(node.meta["val"].dtype == torch.bool)


@_rule(aten.mm.default, aten.addmm.default)
def _product(known: Known, node: Node, mask: Mask) -> Needs:
    a, b = g.operands(node)
    yield a, known.masks.any_over(mask, [1])
    yield b, known.masks.any_over(mask, [0])
    for added in node.args[:-2]:
        yield added, known.masks.reduced_to(mask, g.shape_of(added))  # type: ignore[arg-type]


@_rule(aten.bmm.default)
def _products(known: Known, node: Node, mask: Mask) -> Needs:
    a, b = g.operands(node)
    rows, columns = known.masks.any_over(mask, [2]), known.masks.any_over(mask, [1])
    if (chain := known.attentions.get(node)) is None:
        yield from ((a, rows), (b, columns))
    elif node is chain.out:
        # What is needed of both K and V follows from it; what is between the products keeps rows apart.
        keys = visible.keys_of_chain(known.masks, chain, rows)
        k = g.operands(chain.scores)[1]
        yield from ((a, rows), (b, keys), (k, known.masks.permute(keys, (0, 2, 1))))
    else:
        yield a, rows


@_of_several(*g.ATTENTIONS)
def _of_fused_attention(known: Known, node: Node, index: int, mask: Mask) -> Needs:
    given = g.arguments(node)
    query, key = given["query"], given["key"]
    bias = given.get("attn_mask", given.get("attn_bias"))
    rows = known.masks.any_over(mask, [3])
    keys = visible.keys_of_fused(known.masks, rows, query, key, bias, causal=given["is_causal"])
    yield from ((query, rows), (key, keys), (given["value"], keys), (bias, ALL))


@_of_several(aten.nll_loss_forward.default)
def _of_nll_loss(known: Known, node: Node, index: int, mask: Mask) -> Needs:
    given = g.arguments(node)
    target, its = given["target"], ALL
    if known.masks.at_hand(target):
        counts = known.masks.call(aten.ne.Scalar, target, given["ignore_index"])
        its = known.masks.unsqueeze(counts, *([1] if len(g.shape_of(target)) else []))
    yield given["self"], its


@_of_several(aten.native_layer_norm.default, aten._fused_rms_norm.default)
def _of_norm(known: Known, node: Node, index: int, mask: Mask) -> Needs:
    x: Any = node.args[0]
    normed: Any = node.args[1]
    rank = len(g.shape_of(x))
    yield x, known.masks.any_over(mask, range(rank - len(normed), rank))


@_of_several(aten.native_dropout.default)
def _of_dropout(known: Known, node: Node, index: int, mask: Mask) -> Needs:
    yield node.args[0], mask


@_of_several(aten.split.Tensor, aten.split_with_sizes.default)
def _of_split(known: Known, node: Node, index: int, mask: Mask) -> Needs:
    x: Any = node.args[0]
    yield x, known.masks.any_over(mask, _dims(g.arguments(node)["dim"], x))


@_of_several(aten.unbind.int)
def _of_unbind(known: Known, node: Node, index: int, mask: Mask) -> Needs:
    x: Any = node.args[0]
    yield x, known.masks.unsqueeze(mask, *_dims(g.arguments(node)["dim"], x))
