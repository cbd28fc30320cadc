"""Find the backward of every linear layer and put one op of ours in its place.

Why: a linear's backward is two products, and rows of the output gradient that are zero, or estimated, need
not take part in either. A graph holds them as two unrelated nodes far from the layer's forward.

    forward    y  = mm(X, t(W))                  X [N, I], W [O, I], also addmm with a bias
    backward   dX = mm(dY, W)                    [N, I]; absent for a first layer
               dW = mm(t(dY), X)  or  mm(t(X), dY)     [O, I] or [I, O]; absent for a frozen weight

becomes

    backward   rows, index, dW = sparse_compile.linear_backward(token, dY, X, W, site, …)
               dX = rows[index]

or, on a CPU and with ``dx_whole``, dX = rows: where a schedule approximates no linear there may be nothing to
skip, and kernels that gather fuse less (1 % of a step of a small Llama). A GPU, which does not know whether
it skips, would have to write what it has in rows a second time.

The bias gradient, ``sum(dY, 0)``, stays where it is: it is exact, and fused with what makes dY.

A forward product and the backward products that autograd derived from it carry the same ``seq_nr``;
that finds the candidates, and their operands must then be *the same matrices* (up to transposes), or the
product is left alone with the reason in its record. A linear is a 2-D product whose second operand comes
from parameters alone and whose first does not.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Container

import torch
from sparse_compile.passes import graph as g
from sparse_compile.passes import samples
from sparse_compile.passes.readers import read_by_loops
from torch.fx import Graph, Node

from sparse_compile.sites import SiteRecord

aten = torch.ops.aten

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda")
NO_SITE = -1  # until the graph's manifest is complete


@dataclasses.dataclass(frozen=True, slots=True)
class LinearMatch:
    """The nodes of one linear's backward.

    ``x`` [N, I] and ``weight`` [I, O] are the operands of the forward product, ``dy`` is the output
    gradient, [N, O] or, if ``dy_transposed``, [O, N]. ``dx`` and ``dw`` are the products to be replaced
    (None where the graph has none); ``dx_transposed`` says that ``dx`` is [I, N], ``dw_transposed`` that
    ``dw`` is [I, O]. ``first`` is the one of them that comes first in the graph.
    """

    x: Node
    weight: Node
    dy: Node
    dy_transposed: bool
    dx: Node | None
    dx_transposed: bool
    dw: Node | None
    dw_transposed: bool
    first: Node


class NoMatch(Exception):
    """Why a forward product is not rewritten; its text goes into the report."""


def rewrite_linears(
    graph: Graph,
    *,
    token: Node,
    below: dict[Node, frozenset[str]],
    records: list[SiteRecord],
    dx_whole: bool = False,
) -> tuple[dict[Node, SiteRecord], dict[Node, Node]]:
    """Rewrite every linear of a joint graph and append a record of each product to ``records``.

    Args:
        graph: the joint graph, changed in place.
        token: its ``begin`` node, which tells our ops at run time whose step they are part of.
        below: :func:`passes.graph.parameters_below`.
        records: the graph's manifest, so far.
        dx_whole: let the ops return dX itself; on a GPU, where what reads it is no loop.

    Returns:
        The ops that were inserted, and the record of each; their site numbers are not set yet. And for each
        forward product whose backward was rewritten that op.
    """
    ops: dict[Node, SiteRecord] = {}
    rewritten: dict[Node, Node] = {}
    backward: dict[int, list[Node]] = {}
    for product in g.products(graph, backward=True):
        backward.setdefault(product.meta.get("seq_nr", -1), []).append(product)
    calls: dict[str, int] = {}
    for forward in list(g.products(graph, backward=False)):
        seq_nr = forward.meta.get("seq_nr", -2)
        candidates = backward.get(seq_nr, [])
        x, weight = g.operands(forward)
        name = g.site_name(forward, below.get(weight) or below.get(x, frozenset()))
        try:
            match = match_linear(forward, candidates, below)
        except NoMatch as why:
            records.append(_record(forward, candidates, below, name, reason=str(why)))
            continue
        call = calls[name] = calls.get(name, -1) + 1
        records.append(_record(forward, candidates, below, name, rewritten=True, call=call))
        # A GPU gathers dX where that is fused with what reads it.
        fused = not _on_cpu(forward) and match.dx is not None and read_by_loops(match.dx)
        op = rewrite_linear(graph, match, token=token, below=below, dx_whole=dx_whole and not fused)
        ops[op], rewritten[forward] = records[-1], op
        # A product without a gradient carries the number of whatever ran before it with one.
        backward[seq_nr] = [product for product in candidates if product not in (match.dx, match.dw)]
    return ops, rewritten


def match_linear(forward: Node, candidates: list[Node], below: dict[Node, frozenset[str]]) -> LinearMatch:
    """Match the backward of one forward product.

    Args:
        forward: the product, y = mm(X, t(W)) or addmm(b, X, t(W)).
        candidates: the backward products that carry the forward's ``seq_nr``, in graph order.
        below: :func:`passes.graph.parameters_below`.

    Raises:
        NoMatch: with the reason, if this is no linear or its backward is not of a form that we know.
    """
    x, weight = g.operands(forward)
    _require_linear(forward, x, weight, below)
    if not candidates:
        raise NoMatch("no gradient flows through it")
    (x_root, x_t), (w_root, w_t) = g.strip_transposes(x), g.strip_transposes(weight)
    dx = dw = None
    dx_transposed = dw_transposed = False
    gradients = set()  # every form of dY that the products read, as (node, whether that node is [O, N])
    for product in candidates:
        (p, p_t), (q, q_t) = (g.strip_transposes(side) for side in g.operands(product))
        if q is w_root and q_t is not w_t:  # dX = dY · W
            dx, dx_transposed = product, False
            gradients.add((p, p_t))
        elif p is w_root and p_t is w_t:  # dXᵀ = Wᵀ · dYᵀ
            dx, dx_transposed = product, True
            gradients.add((q, not q_t))
        elif q is x_root and q_t is x_t:  # dW = dYᵀ · X
            dw, dw_transposed = product, False
            gradients.add((p, not p_t))
        elif p is x_root and p_t is not x_t:  # dWᵀ = Xᵀ · dY
            dw, dw_transposed = product, True
            gradients.add((q, q_t))
        else:
            raise NoMatch("a backward product reads neither its weight nor its input")
    if len(gradients) != 1 or len(candidates) != (dx is not None) + (dw is not None):
        raise NoMatch("its backward products do not share one output gradient")
    dy, dy_transposed = gradients.pop()
    return LinearMatch(
        x, weight, dy, dy_transposed, dx, dx_transposed, dw, dw_transposed, first=candidates[0]
    )


def _require_linear(forward: Node, x: Node, weight: Node, below: dict[Node, frozenset[str]]) -> None:
    if weight not in below and x in below:
        raise NoMatch("the weight is the left operand")
    if weight not in below:
        raise NoMatch("both operands are activations")
    if x in below:
        raise NoMatch("both operands are parameters")
    if len(g.shape_of(x)) != 2:
        raise NoMatch("a batched product")
    value = forward.meta["val"]
    if value.dtype not in DTYPES:
        raise NoMatch(f"dtype {value.dtype} is not supported")
    if value.device.type not in DEVICES:
        raise NoMatch(f"device {value.device.type} is not supported")


def _record(
    forward: Node,
    candidates: list[Node],
    below: dict[Node, frozenset[str]],
    name: str,
    *,
    rewritten: bool = False,
    call: int = 0,
    reason: str = "",
) -> SiteRecord:
    x, weight = g.operands(forward)
    is_linear = (x in below) != (weight in below)
    shape = g.sizes(g.shape_of(forward))
    return SiteRecord(
        name=name,
        kind="linear" if is_linear else "matmul",
        shape=(shape[-2], g.sizes(g.shape_of(x))[-1], shape[-1]) if is_linear else shape,
        flops_forward=g.product_flops(forward),
        flops_backward=sum(map(g.product_flops, candidates)),
        rewritten=rewritten,
        reason=reason,
        call=call,
    )


def rewrite_linear(
    graph: Graph, match: LinearMatch, *, token: Node, below: Container[Node], dx_whole: bool
) -> Node:
    """Replace the backward products of ``match`` by one ``linear_backward`` op, and return it."""
    permute = aten.permute.default
    with graph.inserting_before(match.first):
        dy = match.dy
        if match.dy_transposed:
            dy = g.call(graph, permute, dy, [1, 0], like=match.first)
        weight = None
        if match.dx is not None:
            root, transposed = g.strip_transposes(match.weight)
            weight = root if transposed else g.call(graph, permute, root, [1, 0], like=match.first)
        x = match.x if match.dw is not None else None
        tokens = _tokens(graph, match, below)
        gradients = g.call(
            graph,
            torch.ops.sparse_compile.linear_backward.default,
            *(token, dy, x, weight, NO_SITE, tokens, match.dw_transposed, False, dx_whole),
            like=match.first,
        )
    if match.dx is not None:
        with graph.inserting_before(match.dx):
            dx = g.call(graph, operator.getitem, gradients, 0, like=match.dx)
            if not dx_whole:
                index = g.call(graph, operator.getitem, gradients, 1, like=match.dx)
                # Without a check of its bounds: the index is ours.
                dx = g.call(graph, aten._unsafe_index.Tensor, dx, [index], like=match.dx)
            if match.dx_transposed:
                dx = g.call(graph, permute, dx, [1, 0], like=match.dx)
        _replace(graph, match.dx, dx)
    if match.dw is not None:
        with graph.inserting_before(match.dw):
            dw = g.call(graph, operator.getitem, gradients, 2, like=match.dw)
        _replace(graph, match.dw, dw)
    return gradients


def _on_cpu(node: Node) -> bool:
    return bool(node.meta["val"].device.type == "cpu")


def _replace(graph: Graph, product: Node, gradient: Node) -> None:
    product.replace_all_uses_with(gradient)
    graph.erase_node(product)


def _tokens(graph: Graph, match: LinearMatch, below: Container[Node]) -> int | Node:
    """T, the number of rows that belong to one sample: all but the first and last sizes of the layer's
    input [B, …, T, I] before it was flattened to [N, I]; 1 where the input is 2-D, one row a sample. Or −B,
    where the input is [T, B, I], so that rows of the B samples alternate (``passes/samples.py``).

    Under dynamic shapes the graph has to compute it, and the result is a node.
    """
    if match.x.target not in g.VIEWS:
        return 1
    source: Node = match.x.args[0]  # type: ignore[assignment]
    shape, inputs = g.shape_of(source), g.shape_of(match.x)[-1]

    def size(dim: int) -> int | Node:
        symbolic = not isinstance(shape[dim], int)
        return g.call(graph, aten.sym_size.int, source, dim, like=match.first) if symbolic else shape[dim]

    features = math.prod(shape[2:])
    fits = all(isinstance(each, int) and each for each in (features, inputs)) and inputs % features == 0
    if len(shape) >= 3 and fits and samples.are_second(source, below):
        heads = inputs // features  # [T, B · H, D] becomes [T · B, H · D]
        batch = _product(graph, [-1, size(1)], match)
        if isinstance(batch, int):
            return batch // heads
        return g.call(graph, operator.floordiv, batch, heads, like=match.first) if heads > 1 else batch
    if len(shape) < 3 or not g.same_size(shape[-1], inputs):
        return 1
    return _product(graph, [size(dim) for dim in range(1, len(shape) - 1)], match)


def _product(graph: Graph, sizes: list[int | Node], match: LinearMatch) -> int | Node:
    """The product of sizes, as a number if all are."""
    product: int | Node = 1
    for size in sizes:
        if isinstance(product, int) and (product == 1 or isinstance(size, int)):
            product = size if product == 1 else product * size  # type: ignore[operator]
        else:
            product = g.call(graph, operator.mul, product, size, like=match.first)
    return product
