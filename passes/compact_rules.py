"""How each op is computed on few rows (``passes/compact.py``). A rule does nothing, or raises, where it
cannot be."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sparse_compile.passes import graph as g
from torch.fx import Node

from sparse_compile import ops as _ops  # noqa: F401  (registers the ops that rules are for)

if TYPE_CHECKING:
    from sparse_compile.passes.compact import _Region

aten = torch.ops.aten
prims = torch.ops.prims

Rule = Callable[["_Region", Node], None]
RULES: dict[Any, Rule] = {}

# Of ops with several results how many have rows; the others are gradients of parameters.
_OF_ROWS = {
    torch.ops.sparse_compile.linear_backward.default: 2,
    aten.native_layer_norm_backward.default: 1,
}
# Of gradients: zero where the gradient is.
_LINEAR = (
    *(aten.mul.Scalar, aten.div.Scalar, aten.div.Tensor, aten.neg.default, aten.where.self),
    *(aten.clone.default, aten.detach.default),
    *(aten.alias.default, aten._to_copy.default, prims.convert_element_type.default),
)
_NARROWING = (aten.mul.Tensor, aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor)


def is_ours(node: Node) -> bool:
    return str(node.target).startswith("sparse_compile.linear_")


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


def _fma() -> list[Any]:
    found = getattr(prims, "fma", None)
    return [] if found is None else [found.default]


@_rule(aten.clone.default, aten.detach.default, aten.alias.default, aten._to_copy.default)
@_rule(prims.convert_element_type.default, *_fma())
def pointwise(region: _Region, node: Node) -> None:
    """Entry by entry, with what is broadcast over rows."""
    lead = region.lead(g.shape_of(node)) if g.is_tensor(node) else 0
    operands = [x for x in node.all_input_nodes if g.is_tensor(x)]
    if not lead or not any(x in region for x in operands) or not _stays_zero(region, node, operands):
        return
    kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}
    args = torch.fx.map_arg(node.args, lambda x: region.operand(x, node))
    new = region.emit(
        node.target, *args, like=node, **torch.fx.map_arg(kwargs, lambda x: region.operand(x, node))
    )
    region.set(node, new, own_rows=node.target in _NARROWING)


def _stays_zero(region: _Region, node: Node, operands: list[Node]) -> bool:
    """Whether a gradient is zero in the rows that are left out. (What is no gradient need not be.)"""
    if not region.is_gradient(node):
        return True
    gradients = [x for x in operands if region.is_gradient(x)]
    zero = [region.is_zero_elsewhere(x) for x in gradients]
    if node.target is aten.mul.Tensor:
        return any(zero)
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        return all(x in gradients for x in node.args[:2]) and all(zero)
    linear = node.target in _LINEAR or str(node.target).partition(".")[2].partition(".")[0].endswith(
        "_backward"
    )
    return linear and all(zero)


@_rule(*g.VIEWS)
def _view(region: _Region, node: Node) -> None:
    x: Any = node.args[0]
    if x not in region:
        return
    old, new = g.shape_of(x), g.shape_of(node)
    before, after = region.lead(old), region.lead(new)
    if before and after and g.same_size(math.prod(old[before:]), math.prod(new[after:])):
        compact = region.of(x)
        if not g.same_sizes(old[before:], new[after:]):
            shape = [region.count, *region.sizes(new[after:])]
            compact = region.emit(aten.view.default, compact, shape, like=node)
        region.set(node, compact)


@_rule(aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.any.dim)
@_rule(aten.var_mean.correction)
def _reduce(region: _Region, node: Node) -> None:
    x: Any = node.args[0]
    if x not in region:
        return
    lead, rank = region.lead(g.shape_of(x)), len(g.shape_of(x))
    named = g.arguments(node)["dim"]
    dims = [named] if isinstance(named, int) else list(named or range(rank))
    dims = [dim % rank for dim in dims]
    if all(dim >= lead for dim in dims):
        shifted: Any = [dim - lead + 1 for dim in dims]
        shifted = shifted[0] if isinstance(named, int) else shifted
        args = (region.of(x), shifted, *node.args[2:])
        region.set(node, region.emit(node.target, *args, like=node, **node.kwargs))
    elif (
        node.target is aten.sum.dim_IntList and region.is_zero_elsewhere(x) and set(range(lead)) <= set(dims)
    ):
        kept = [0, *(dim - lead + 1 for dim in dims if dim >= lead)]
        total = region.emit(node.target, region.of(x), kept, *node.args[2:], like=node, **node.kwargs)
        if not g.same_shape(total, node):
            total = region.emit(aten.view.default, total, region.sizes(g.shape_of(node)), like=node)
        region.replace(node, total)


@_rule(aten._softmax.default, aten._log_softmax.default)
def _softmax(region: _Region, node: Node) -> None:
    x, dim, *rest = node.args
    if x not in region or region.is_gradient(node):
        return
    lead, rank = region.lead(g.shape_of(node)), len(g.shape_of(node))
    dim = dim % rank  # type: ignore[operator]
    if dim >= lead:
        region.set(node, region.emit(node.target, region.of(x), dim - lead + 1, *rest, like=node))  # type: ignore


@_rule(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor, aten.select.int)
@_rule(aten.split.Tensor, aten.split_with_sizes.default)
def _along(region: _Region, node: Node) -> None:
    """What is done along one dimension behind the rows."""
    x: Any = node.args[0]
    if x not in region or (region.is_gradient(node) and not region.is_zero_elsewhere(x)):
        return
    given = g.arguments(node)
    lead, rank = region.lead(g.shape_of(x)), len(g.shape_of(x))
    rank += node.target is aten.unsqueeze.default
    named = given.get("dim")
    dims = [dim % rank for dim in ([named] if isinstance(named, int) else named)]
    if all(dim >= lead for dim in dims):
        shifted: Any = [dim - lead + 1 for dim in dims]
        given["dim"] = shifted[0] if isinstance(named, int) else shifted
        region.set(node, region.emit(node.target, region.of(x), *list(given.values())[1:], like=node))


@_rule(aten.cat.default)
def _cat(region: _Region, node: Node) -> None:
    operands: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    lead, rank = region.lead(g.shape_of(node)), len(g.shape_of(node))
    if lead and dim % rank >= lead and all(x in region for x in operands):
        parts = [region.of(x) for x in operands]
        region.set(node, region.emit(node.target, parts, dim % rank - lead + 1, like=node))


@_rule(aten.expand.default)
def _expand(region: _Region, node: Node) -> None:
    x: Any = node.args[0]
    if x not in region:
        return
    shape, its = g.shape_of(node), g.shape_of(x)
    lead = region.lead(its)
    if len(its) == len(shape) and region.lead(shape) == lead:
        few = [region.count, *region.sizes(shape[lead:])]
        region.set(node, region.emit(node.target, region.of(x), few, like=node))


@_rule(operator.getitem)
def _getitem(region: _Region, node: Node) -> None:
    x: Any = node.args[0]
    if x in region and g.is_tensor(node):
        new = region.emit(operator.getitem, region.of(x), node.args[1], like=node)
        has_rows = x.target not in _OF_ROWS or node.args[1] < _OF_ROWS[x.target]  # type: ignore[operator]
        if has_rows and region.lead(g.shape_of(node)):
            region.set(node, new)
        else:
            region.replace(node, new)


@_rule(aten.sym_size.int)
def _size(region: _Region, node: Node) -> None:
    """A size is known without the tensor."""
    x, dim = node.args
    if x in region:
        (size,) = region.sizes([g.shape_of(x)[dim]])  # type: ignore[arg-type, index]
        region.replace(node, size)  # type: ignore[arg-type]


@_rule(aten.rand.default)
def _random(region: _Region, node: Node) -> None:
    """The numbers that these rows have among all: dropout is the same with and without this pass."""
    if region.lead(g.shape_of(node)):
        region.enter(node)


@_rule(aten.embedding.default)
def _embedding(region: _Region, node: Node) -> None:
    weight, ids, *rest = node.args
    if region.lead(g.shape_of(ids)) and len(g.shape_of(ids)) == region.lead(g.shape_of(ids)):  # type: ignore
        few = region.gather(ids, like=node)  # type: ignore[arg-type]
        region.set(node, region.emit(node.target, weight, few, *rest, like=node), own_rows=True)


@_rule(aten.embedding_dense_backward.default)
def _embedding_gradient(region: _Region, node: Node) -> None:
    dy, ids, *rest = node.args
    by_frequency = g.arguments(node)["scale_grad_by_freq"]  # of the ids in all rows
    if region.is_zero_elsewhere(dy) and not by_frequency:
        few = region.gather(ids, like=node)  # type: ignore[arg-type]
        region.replace(node, region.emit(node.target, region.of(dy), few, *rest, like=node))  # type: ignore[arg-type]


@_rule(aten._unsafe_masked_index_put_accumulate.default)
def _put_masked(region: _Region, node: Node) -> None:
    """The gradient of an embedding as Inductor takes it apart: rows that are zero add nothing."""
    table, mask, indices, values = node.args
    if not region.is_zero_elsewhere(values) or any(i is None for i in indices):  # type: ignore[union-attr]
        return
    few = [region.gather(i, like=node) for i in indices]  # type: ignore[union-attr]
    mask, values = region.operand(mask, values), region.of(values)  # type: ignore[arg-type]
    region.replace(node, region.emit(node.target, table, mask, few, values, like=node))


@_rule(aten.native_layer_norm.default)
def _norm(region: _Region, node: Node) -> None:
    x, normed, *rest = node.args
    if region.is_gradient(node):
        return
    if x in region and len(g.shape_of(x)) - len(normed) >= region.lead(g.shape_of(x)):  # type: ignore
        region.set(node, region.emit(node.target, region.of(x), normed, *rest, like=node))  # type: ignore[arg-type]


@_rule(aten.native_layer_norm_backward.default)
def _norm_gradient(region: _Region, node: Node) -> None:
    dy, x, normed, mean, rstd, *rest = node.args
    if region.is_zero_elsewhere(dy) and all(each in region for each in (x, mean, rstd)):
        few = [region.of(each) for each in (dy, x, mean, rstd)]  # type: ignore[arg-type]
        new = region.emit(node.target, *few[:2], normed, *few[2:], *rest, like=node)
        region.set(node, new)


@_rule(torch.ops.sparse_compile.linear_forward.default)
def _linear(region: _Region, node: Node) -> None:
    token, x, w, bias, needed, site = node.args
    if region.lead(g.shape_of(node)) != 1:
        return
    few = region.of(x) if x in region else region.gather(x, like=node)  # type: ignore[arg-type]
    needed = region.gather(needed, like=node)  # type: ignore[arg-type]
    region.set(node, region.emit(node.target, token, few, w, bias, needed, site, like=node), own_rows=True)


@_rule(aten.mm.default, aten.addmm.default)
def _product(region: _Region, node: Node) -> None:
    """A linear that is not rewritten: nothing of it is trained."""
    *added, x, w = node.args
    if x not in region or w in region or g.is_backward(node) or region.lead(g.shape_of(node)) != 1:
        return
    if all(len(g.shape_of(each)) == 1 for each in added):  # type: ignore[arg-type]
        region.set(node, region.emit(node.target, *added, region.of(x), w, like=node))  # type: ignore[arg-type]


@_rule(torch.ops.sparse_compile.linear_backward.default)
def _linear_gradient(region: _Region, node: Node) -> None:
    token, dy, x, w, *rest = node.args
    if not region.has_site(node):
        return
    if dy not in region:
        region.enter(dy)  # type: ignore[arg-type]
    if x is not None:
        x = region.of(x) if x in region else region.gather(x, like=node)  # type: ignore[arg-type]
    dy = region.of(dy)  # type: ignore[arg-type]
    (total,) = region.sizes([region.n])
    new = region.emit(node.target, token, dy, x, w, *rest, region.rows, total, like=node)
    region.set(node, new)


@_rule(aten._unsafe_index.Tensor)
def _rows_of_dx(region: _Region, node: Node) -> None:
    """dX from its distinct rows (``passes/linear.py``)."""
    x, indices = node.args
    if x in region and len(indices) == 1 and indices[0] in region and region.is_gradient(node):  # type: ignore
        region.set(node, region.emit(node.target, region.of(x), [region.of(indices[0])], like=node))  # type: ignore
