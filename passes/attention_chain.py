"""Find the attentions that are chains of products and put an op of ours in the place of each one's backward.

    forward    S = bmm(Q, Kᵀ)    A = softmax(s · S + mask)    A' = dropout(A)    O = bmm(A', V)
    backward   dV = bmm(A'ᵀ, dO)    dA' = bmm(dO, Vᵀ)    dS = …    dQ = bmm(dS, K)    dKᵀ = bmm(Qᵀ, dS)

becomes

    backward   dQ, dKᵀ, dV = sparse_compile.attention_backward(token, site, dO, A', A, V, Q, Kᵀ, s, heads)

One op for all four products, and for what stands between them, so that rows that are skipped are never
written: dA' and dS are as large as all the rest together. It needs neither the mask nor which entries were
dropped: A' = M ∘ A holds for whatever M was, so that

    dS = (A' ∘ dA' − A ∘ rowsum(A' ∘ dA')) · s.

Where scores are filled with a finite number (``masked_fill(mask, -1e9)``), rows of which all is filled have a
softmax and no dS: for these the op gets zeros as Q, and zeros are in the place of their dQ.

That this *is* the chain's backward is read off the forward, step by step (:func:`_climb`). And it must be all
of it: nothing else may flow into dA' … dS, or out of it, and no op may stand there that autograd does not put
there. A learned position bias, say, reads dS too, and is left alone.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator

import torch
from sparse_compile.passes import graph as g
from sparse_compile.passes.fills import LEAST_SCORE, Fill, filled_rows, fills_among
from sparse_compile.passes.linear import NO_SITE, NoMatch
from torch.fx import Graph, Node

aten = torch.ops.aten
prims = torch.ops.prims

_SOFTMAX = (aten._softmax.default, aten._safe_softmax.default)

# Steps that keep every entry, in the same order: those that change the shape, and those that must not.
_VIEWS = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.squeeze.dims),
}
_SAME = {
    *(aten.expand.default, aten.clone.default, aten.alias.default, aten.detach.default),
    *(aten._to_copy.default, prims.convert_element_type.default),
}
_MULTIPLY = (aten.mul.Tensor, aten.mul.Scalar)
_DIVIDE = (aten.div.Tensor, aten.div.Scalar)

# What may stand between dA' and dS: the backward of all these, with and without Inductor's decompositions.
_BACKWARD = {
    *_VIEWS,
    *_SAME,
    *_MULTIPLY,
    *_DIVIDE,
    *(aten._softmax_backward_data.default, aten.native_dropout_backward.default, aten.sum.dim_IntList),
    *(
        aten.neg.default,
        aten.sub.Tensor,
        aten.where.self,
        aten.masked_fill.Scalar,
        aten.transpose.int,
        aten.permute.default,
    ),
    *(op.default for op in [getattr(prims, "fma", None)] if op is not None),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """The nodes of one attention.

    Attributes:
        scores, out: its two forward products.
        dropped: A' [N, T, U], N = samples x heads.
        probabilities: A, of the same sizes, or None where A' is A itself.
        do: dO [N, T, D].
        gradients: the products to be replaced, dQ [N, T, D], dKᵀ [N, D, U] and dV [N, U, D]; None for
            one that the graph has not.
        scale: s.
        heads: of one sample.
        first: the backward product that comes first in the graph.
        fills: the steps that fill scores, if one of them does so with a finite number.
    """

    scores: Node
    out: Node
    dropped: Node
    probabilities: Node | None
    do: Node
    gradients: tuple[Node | None, Node | None, Node | None]
    scale: float
    heads: int
    first: Node
    fills: tuple[Fill, ...] = ()


def find_chains(graph: Graph) -> Iterator[tuple[Node, Node]]:
    """The pairs of batched forward products with a softmax between them."""
    for scores in list(g.products(graph, backward=False)):
        if len(g.shape_of(scores)) != 3:
            continue
        softmaxes = {node for node in below(scores) if _softmax_input(node) is not None}
        outs = [out for node in softmaxes for out in _products_below(node)]
        if outs:
            yield scores, outs[0]


def match_chain(scores: Node, out: Node) -> Chain:
    """Match the forward between two products, and its backward.

    Raises:
        NoMatch: with the reason, if a step is not one that we know.
    """
    if scores.target is not aten.bmm.default or out.target is not aten.bmm.default:
        raise NoMatch("one of its products adds something in the same op (baddbmm)")
    if scores.meta["val"].device.type != "cpu":
        raise NoMatch(
            f"a chain of products on {scores.meta['val'].device.type} is not rewritten in this version"
        )
    after, probabilities, before = steps_between(scores, out)
    dropped = g.operands(out)[0]
    # Whether A' differs from A by more than a view.
    changed = any(step.target not in (*_VIEWS, *_SAME, aten.permute.default) for step in after)
    changed |= probabilities.meta["val"].dtype != dropped.meta["val"].dtype
    scale = math.prod(factor for _, factor in before)
    shapes = [g.shape_of(step) for step, _ in before if len(g.shape_of(step)) == 4]
    heads = next((shape[1] for shape in reversed(shapes) if isinstance(shape[1], int)), 1)
    fills = fills_among([step for step, _ in before], scores)
    if all(fill.number == -math.inf for fill in fills):
        fills = ()
    elif any(step.target is aten.add.Tensor for step, _ in before):
        raise NoMatch("its scores are filled with a finite number, and something is added to them")
    do, gradients, first = _match_backward(scores, out)
    kept = probabilities if changed else None
    return Chain(scores, out, dropped, kept, do, gradients, scale, heads, first, fills)


def steps_between(scores: Node, out: Node) -> tuple[list[Node], Node, list[tuple[Node, float]]]:
    """The forward from the scores to what V is multiplied by, last step first: the steps after the softmax,
    its result, and the steps from the scores to it, each with the factor that it multiplies by.

    Raises:
        NoMatch: with the reason, if a step is not one that we know.
    """
    between = below(scores)
    node = g.operands(out)[0]
    after, before = [], []
    while (x := _softmax_input(node)) is None:
        after.append(node)
        node, _ = _climb(node, between, scores, probabilities=True)
    probabilities, node = node, x
    if not g.same_size(g.shape_of(node)[-1], g.shape_of(scores)[-1]):
        raise NoMatch("its softmax is not over its keys")
    scale = 1.0
    while node is not scores:
        source, factor = _climb(node, between, scores, probabilities=False, scale=scale)
        before.append((node, factor))
        node, scale = source, scale * factor
    return after, probabilities, before


def _climb(
    node: Node, between: set[Node], scores: Node, *, probabilities: bool, scale: float = 1.0
) -> tuple[Node, float]:
    """One step of the forward back towards the scores: the operand that comes from them, and by what the step
    multiplies it. ``probabilities`` says that this is after the softmax, where any factor will do; ``scale``
    is by what the steps up to the softmax multiply."""
    sources = [source for source in node.all_input_nodes if source in between or source is scores]
    target = node.target
    if len(sources) != 1:
        raise NoMatch("its scores or probabilities are used twice on the way to its output")
    (source,) = sources
    if target in _VIEWS or (target is aten.permute.default and _moves_nothing(node)):
        return source, 1.0
    if g.is_tensor(node) and g.is_tensor(source) and not _same_shape(node, source):
        raise NoMatch(f"the op {target} repeats its scores or probabilities")
    if target in _SAME:
        return source, 1.0
    if probabilities and target in (*_MULTIPLY, *_DIVIDE, aten.native_dropout.default, operator.getitem):
        return source, 1.0
    if not probabilities and target in (*_MULTIPLY, *_DIVIDE) and isinstance(node.args[1], int | float):
        return source, node.args[1] if target in _MULTIPLY else 1 / node.args[1]
    if not probabilities and target is aten.add.Tensor:
        return source, 1.0
    fill = None if probabilities else Fill.of(node, source)
    if fill is not None and fill.number * scale <= LEAST_SCORE:
        return source, 1.0
    raise NoMatch(f"the op {target} stands between its products")


def _same_shape(a: Node, b: Node) -> bool:
    (m, n) = (g.shape_of(a), g.shape_of(b))
    return len(m) == len(n) and all(map(g.same_size, m, n))


def _moves_nothing(permute: Node) -> bool:
    """Whether a permutation leaves all dimensions in order, but for those of size 1."""
    shape = g.shape_of(permute.args[0])  # type: ignore[arg-type]
    dims = [dim % len(shape) for dim in permute.args[1]]  # type: ignore[operator, union-attr]
    dims = [dim for dim in dims if not g.same_size(shape[dim], 1)]
    return dims == sorted(dims)


def _softmax_input(node: Node) -> Node | None:
    """What a softmax over the last dimension is taken of; None if the node is none.

    Inductor's decompositions turn it into ``exp(x - amax(x)) / sum(exp(…))``, and one that gives zeros for
    rows of -inf alone into ``where(no number in the row, 0, that)``.
    """
    if node.target in _SOFTMAX:
        x, dim = node.args[:2]
        return x if dim in (-1, len(g.shape_of(x)) - 1) else None  # type: ignore[return-value, arg-type]
    if node.target is aten.where.self and isinstance(node.args[2], Node):
        node = node.args[2]
    if node.target is not aten.div.Tensor or not isinstance(node.args[1], Node):
        return None
    exponential, total = node.args
    if exponential.target is not aten.exp.default or total.target is not aten.sum.dim_IntList:  # type: ignore
        return None
    difference = exponential.args[0]  # type: ignore[union-attr]
    if total.args[0] is not exponential or difference.target is not aten.sub.Tensor:  # type: ignore[union-attr]
        return None
    x, largest = difference.args  # type: ignore[union-attr]
    dims = (total.args[1], largest.args[1]) if largest.target is aten.amax.default else ()  # type: ignore
    last = ([-1], [len(g.shape_of(x)) - 1])  # type: ignore[arg-type]
    return x if dims and largest.args[0] is x and all(dim in last for dim in dims) else None  # type: ignore


def below(start: Node) -> set[Node]:
    """The forward nodes computed from a node, up to the next matrix products."""
    found: set[Node] = set()
    stack = [start]
    while stack:
        for user in stack.pop().users:
            if user.op == "call_function" and user not in found and not _ends_search(user):
                found.add(user)
                stack.append(user)
    return found


def _ends_search(node: Node) -> bool:
    return g.is_product(node) or g.is_backward(node)


def _products_below(start: Node) -> list[Node]:
    """The batched products whose first matrix comes from a node, in graph order."""
    sources = {start, *below(start)}
    return [
        product
        for product in g.products(start.graph, backward=False)
        if len(g.shape_of(product)) == 3 and g.operands(product)[0] in sources
    ]


def _match_backward(
    scores: Node, out: Node
) -> tuple[Node, tuple[Node | None, Node | None, Node | None], Node]:
    """(dO, (dQ, dKᵀ, dV), the first of the products)."""
    of_out, of_scores = _backward_products(out), _backward_products(scores)
    dropped, v = of_out
    dq, dk = of_scores
    if v is None and dropped is None:
        raise NoMatch("no gradient flows through it")
    if dropped is None or (dq is None and dk is None):
        raise NoMatch("its queries and keys want no gradient")
    do = g.operands(dropped)[0]
    if v is not None and g.strip_transposes(g.operands(v)[1]) != g.strip_transposes(do):
        raise NoMatch("its backward products do not share one output gradient")
    ds = {g.strip_transposes(g.operands(product)[i]) for i, product in enumerate((dq, dk)) if product}
    if len(ds) != 1:
        raise NoMatch("its backward products do not share one gradient of the scores")
    _require_closed(dropped, [product for product in (dq, dk) if product is not None])
    order = {node: i for i, node in enumerate(scores.graph.nodes)}
    first = min((node for node in (dropped, v) if node is not None), key=order.__getitem__)
    return do, (dq, dk, v), first


def _backward_products(forward: Node) -> tuple[Node | None, Node | None]:
    """The products bmm(dY, Bᵀ) and bmm(Aᵀ, dY) that are the gradients of bmm(A, B)."""
    a, b = (g.strip_transposes(operand) for operand in g.operands(forward))
    da = db = None
    for product in g.products(forward.graph, backward=True):
        if product.target is not aten.bmm.default or product.meta.get("seq_nr") != forward.meta.get("seq_nr"):
            continue
        p, q = (g.strip_transposes(operand) for operand in g.operands(product))
        if q == (b[0], not b[1]):
            da = product
        elif p == (a[0], not a[1]):
            db = product
    return da, db


def _require_closed(start: Node, ends: list[Node]) -> None:
    """All that is computed from dA' is computed from nothing else of the backward, and leads to the ends."""
    gradients = g.computed_from_tangents(start.graph)
    inside: set[Node] = {start}
    for node in start.graph.nodes:
        sources = set(node.all_input_nodes)
        if sources.isdisjoint(inside):
            continue
        if not sources & gradients <= inside:
            raise NoMatch("a gradient flows into its scores or probabilities from elsewhere, too")
        if node not in ends:
            if node.target not in _BACKWARD:
                raise NoMatch("the gradient of its scores or probabilities is used for something else, too")
            inside.add(node)


def rewrite_chain(graph: Graph, chain: Chain, *, token: Node) -> Node:
    """Replace the backward products of a chain by one ``attention_backward`` op, and return it."""
    q, kt = g.operands(chain.scores)
    v = g.operands(chain.out)[1]
    filled = filled_rows(graph, chain.fills, q, before=chain.out) if chain.fills else None

    def without_filled(rows: Node, like: Node) -> Node:
        if filled is None:
            return rows
        value = rows.meta["val"]
        zero = g.call(
            graph, aten.scalar_tensor.default, 0.0, like=like, dtype=value.dtype, device=value.device
        )
        return g.call(graph, aten.where.self, filled, zero, rows, like=like)

    with graph.inserting_before(chain.first):
        tensors = (chain.do, chain.dropped, chain.probabilities, v, without_filled(q, chain.first), kt)
        gradients = g.call(
            graph,
            torch.ops.sparse_compile.attention_backward.default,
            *(token, NO_SITE, *tensors, chain.scale, chain.heads),
            like=chain.first,
        )
    for position, product in enumerate(chain.gradients):
        if product is not None:
            with graph.inserting_before(product):
                gradient = g.call(graph, operator.getitem, gradients, position, like=product)
                if position == 0:
                    gradient = without_filled(gradient, product)
            product.replace_all_uses_with(gradient)
            _erase_unused(product)
    return gradients


def _erase_unused(node: Node) -> None:
    """Erase a node of the backward if nothing uses it, and what it alone used."""
    unused = [node]
    while unused:
        node = unused.pop()
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        unused += [s for s in sources if s.op == "call_function" and g.is_backward(s) and not s.users]
