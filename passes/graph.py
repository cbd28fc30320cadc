"""Small questions that every pass asks of a joint graph: which side a node is on, what it is a view of,
which parameters it comes from, what it is called."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._decomp import get_decompositions
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings
from torch.utils.checkpoint import CheckpointPolicy

from sparse_compile import naming

aten = torch.ops.aten

_TRANSPOSES = (aten.t.default, aten.permute.default, aten.transpose.int)
ATTENTIONS = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
ALIASES = (aten.alias.default, aten.detach.default, aten.lift_fresh.default)


def is_backward(node: Node) -> bool:
    """Whether AOTAutograd traced the node while it ran the backward."""
    return node.meta.get("partitioner_tag") == "is_backward"


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def shape_of(node: Node) -> torch.Size:
    return node.meta["val"].shape


def sizes(shape: torch.Size | tuple[Any, ...]) -> tuple[int, ...]:
    """The shape in plain integers; a symbolic size becomes the size it had when the graph was traced."""
    return tuple(s if isinstance(s, int) else int(s.node.hint) if s.node.has_hint() else 1 for s in shape)


def numel(node: Node) -> int:
    """The number of entries, in plain integers as :func:`sizes` gives them."""
    return math.prod(sizes(shape_of(node)))


def is_transpose(node: Node) -> bool:
    """Whether a node transposes a matrix, or each matrix of a batch [N, …, …]."""
    if node.target not in _TRANSPOSES or (rank := len(shape_of(node))) not in (2, 3):
        return False
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]][-2:] == [rank - 1, rank - 2]  # type: ignore[operator, union-attr]
    last = {rank - 2, rank - 1}
    return node.target is aten.t.default or {d % rank for d in node.args[1:3]} == last  # type: ignore[operator]


def strip_transposes(node: Node) -> tuple[Node, bool]:
    """The node below any chain of transposes and aliases, and whether an odd number was stripped.

    ``permute(permute(W))`` gives ``(W, False)``: two operands are the same matrix exactly when their
    stripped forms are equal.
    """
    transposed = False
    while node.op == "call_function":
        if is_transpose(node):
            transposed = not transposed
        elif node.target not in ALIASES:
            break
        node = node.args[0]  # type: ignore[assignment]
    return node, transposed


def strip_aliases(node: Node) -> Node:
    """The node below any chain of aliases."""
    while node.target in ALIASES:
        node = node.args[0]  # type: ignore[assignment]
    return node


def parameters_below(graph: Graph, parameters: dict[Node, str]) -> dict[Node, frozenset[str]]:
    """For every node computed from parameters (and constants) alone, the names of those parameters.

    A weight may reach its product as it is, cast (autocast), sliced (packed q/k/v, one expert of many) or
    computed (weight normalisation, a merged adapter); all of them are in the result, activations are not.
    """
    below: dict[Node, frozenset[str]] = {node: frozenset([name]) for node, name in parameters.items()}
    for node in graph.nodes:
        if not node.op.startswith("call") or is_backward(node):
            continue
        inputs = [below.get(source) for source in node.all_input_nodes]
        if inputs and all(names is not None for names in inputs):
            below[node] = frozenset().union(*inputs)  # type: ignore[arg-type]
    return below


def module_path(node: Node) -> str:
    """The path of the innermost module that ran the node, relative to the compiled frame's own module.

    Dynamo writes ``L['self'].bert.pooler.dense``; the root (whatever the frame called it) is cut off.
    """
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    return clean_path(list(stack.values())[-1][0])


def clean_path(path: str) -> str:
    """A module path as Dynamo writes it, without the frame's variable and what wrappers add."""
    _, path = naming.split_variable(path)
    return naming.clean(re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path))


def module_class(node: Node) -> str:
    """The name of the class of the innermost module that ran the node; empty where there is none."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    return naming.class_name(list(stack.values())[-1][1])


def site_name(node: Node, weight_names: frozenset[str]) -> str:
    """The name of the site of a forward product: its module path, and the weight's own name unless that
    is the usual ``weight``.

    A weight that belongs to a module elsewhere (a head tied to the embedding) leaves the name to the
    module that multiplies.
    """
    path = module_path(node)
    if len(weight_names) != 1:
        return path
    owner, _, leaf = next(iter(weight_names)).rpartition(".")
    if path and f".{path}." not in f".{owner}.":
        return path
    name = owner if leaf == "weight" else f"{owner}.{leaf}".lstrip(".")
    return name or path or leaf


def computed_from_tangents(graph: Graph) -> set[Node]:
    """The nodes that hold a gradient: all that the graph computes from those of its outputs."""
    found = {node for node in graph.find_nodes(op="placeholder") if "tangents" in node.name}
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an ATen op by name, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    defaults = {argument.name: argument.default_value for argument in schema}
    positional = dict(zip((argument.name for argument in schema), node.args, strict=False))
    return {**defaults, **positional, **node.kwargs}


def is_product(node: Node) -> bool:
    targets = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
    return node.op == "call_function" and node.target in targets


def products(graph: Graph, *, backward: bool) -> Iterator[Node]:
    """Every matrix product of one side of the graph, in order."""
    for node in graph.nodes:
        if is_product(node) and is_backward(node) == backward:
            yield node


def operands(product: Node) -> tuple[Node, Node]:
    """The two matrices of a product (``addmm`` and ``baddbmm`` carry what is added first)."""
    first, second = product.args[-2:]
    return first, second  # type: ignore[return-value]


def product_flops(product: Node) -> int:
    """2 FLOPs for each multiply-add of a product."""
    total = 2 * sizes(shape_of(operands(product)[0]))[-1]
    for size in sizes(shape_of(product)):
        total *= size
    return total


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal as far as the trace knows, without adding a guard."""
    return a is b or str(a) == str(b)


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal as far as the trace knows, without adding a guard."""
    return len(a) == len(b) and all(map(same_size, a, b))


def same_shape(a: Node, b: Node) -> bool:
    return same_sizes(shape_of(a), shape_of(b))


def call(graph: Graph, target: Any, *args: Any, like: Node, **kwargs: Any) -> Node:
    """Insert ``target(*args, **kwargs)`` at the graph's insertion point.

    The node takes its module path, sequence number and side of the graph from ``like``, and its
    ``meta["val"]`` from running ``target`` on the fake tensors of its arguments.
    """
    node = graph.call_function(target, args, kwargs)
    with like.meta["val"].fake_mode if hasattr(like.meta["val"], "fake_mode") else contextlib.nullcontext():
        node.meta = {**like.meta, "val": value_of(node)}
    return node


def inline(graph: Graph, function: Callable[..., Any], *args: Node, like: Node, tag: str) -> Any:
    """Insert what ``function(*args)`` does to tensors at the graph's insertion point, op by op.

    Where a compiler is to fuse a formula with what is around it, one op of our own would keep it from that.
    The nodes take after ``like``, as those of :func:`call` do.

    Args:
        function: of tensors alone, whose sizes it does not ask for.
        tag: for the partitioner, on which side all of it has to be.

    Returns:
        The nodes of its results, in the structure that it returns.
    """
    traced = make_fx(function, get_decompositions([aten._to_copy]))(*[arg.meta["val"] for arg in args]).graph
    copies = dict(zip(traced.find_nodes(op="placeholder"), args, strict=True))
    for node in traced.nodes:
        if node.op == "call_function":
            copies[node] = graph.node_copy(node, lambda operand: copies[operand])
            copies[node].meta = {**like.meta, "val": node.meta["val"], "partitioner_tag": tag}
    return torch.fx.map_arg(traced.output_node().args[0], lambda node: copies[node])


def value_of(node: Node) -> Any:
    """What the target of a node gives for the fake tensors of its arguments."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def unbacked_rows(node: Node, about: Any) -> None:
    """Let a graph know that an op finds out the number of rows of its result when it runs.

    Args:
        node: the op, whose result is int64 [n].
        about: how many there may be: what a compiler takes for n where it has to choose between kernels.
    """
    value = node.meta["val"]
    shapes = value.fake_mode.shape_env
    node.meta["unbacked_bindings"] = compute_unbacked_bindings(shapes, value)
    rows = value.shape[0]
    hints = getattr(shapes, "var_to_hint_override", None)
    if hints is not None and isinstance(rows, torch.SymInt):
        (about,) = sizes((about,))
        hints[rows.node.expr] = max(about, 2)


def size(graph: Graph, node: Node, dim: int) -> int | Node:
    """One size of a tensor; where it is symbolic, a node inserted to compute it."""
    found = shape_of(node)[dim]
    return found if isinstance(found, int) else call(graph, aten.sym_size.int, node, dim, like=node)


def input_index(placeholder: Node) -> int | None:
    """Position of a joint graph's input among the inputs of the compiled callable; None for tangents."""
    return getattr(placeholder.meta.get("desc"), "idx", None)


def insert_begin(graph: Graph, inputs: list[Node]) -> Node:
    """Insert the ``begin`` op at the head of the forward. Its result, the token, is saved for backward."""
    anchor = next(node for node in inputs if is_tensor(node))
    with graph.inserting_after(inputs[-1]):
        token = call(graph, torch.ops.sparse_compile.begin.default, anchor, "", like=anchor)
    # It has to run in the forward and nowhere else: inside a backward it would answer for whatever forward
    # ran last. (The op counts as having a side effect, so that the forward is seen to need it; see ops.py.)
    token.meta["partitioner_tag"] = "must_be_in_forward"
    token.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return token
