"""Boolean tensors at the head of a graph, which say of the entries of a tensor that is computed further down
which of them are needed.

A mask has as many dimensions as its tensor, each of the same size or of size 1 where all along it are needed
alike. ``ALL`` is the mask of a tensor of which all is needed. What a mask is computed from (the attention
mask of a batch, its labels) is moved up to where the masks are: it comes from inputs alone.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from sparse_compile.passes import graph as g
from torch.fx import Graph, Node

aten = torch.ops.aten

Mask = Node | Literal[True]
ALL: Literal[True] = True


class UnknownSize(Exception):
    """A size that is no product of the graph's own symbols, so that no mask can be given it."""


class Masks:
    """Makes masks, each once.

    Args:
        graph: the joint graph.
        after: the node behind which they go; all inputs come before it.
        below: what comes from parameters: never part of a mask.
    """

    def __init__(self, graph: Graph, *, after: Node, below: dict[Node, frozenset[str]]) -> None:
        self._graph = graph
        self._end = after
        self._below = below
        self._made: dict[tuple[Any, ...], Node] = {}
        self._above = {node for node in graph.nodes if node.op == "placeholder"} | {after}
        self._at_hand: set[Node] = set()
        for node in graph.nodes:
            if self._from_inputs(node) and self._at_hand.issuperset(node.all_input_nodes):
                self._at_hand.add(node)
        tensors = [node.meta["val"] for node in graph.find_nodes(op="placeholder") if g.is_tensor(node)]
        self._fake_mode = getattr(tensors[0], "fake_mode", None) or contextlib.nullcontext()
        self._symbols = {
            str(node.meta["val"]): node
            for node in graph.find_nodes(op="placeholder")
            if isinstance(node.meta.get("val"), torch.SymInt)
        }

    def at_hand(self, node: Any) -> bool:
        """Whether a node comes from inputs alone, and by no chance, so that masks can be made of it."""
        return not isinstance(node, Node) or node in self._at_hand

    def fixed(self, node: Node) -> bool:
        """Whether a node comes from inputs alone, or from parameters alone: it has no rows to leave out."""
        return node in self._below or self.at_hand(node)

    def _from_inputs(self, node: Node) -> bool:
        if node in self._below or g.is_backward(node):
            return False
        if node.op == "placeholder":
            return "tangents" not in node.name
        tags = getattr(node.target, "tags", ())
        pure = torch.Tag.nondeterministic_seeded not in tags and not node.is_impure()
        return node.op == "call_function" and pure

    def union(self, a: Mask, b: Mask) -> Mask:
        return ALL if a is ALL or b is ALL else a if a is b else self.call(aten.bitwise_or.Tensor, a, b)

    def both(self, a: Mask, b: Mask) -> Mask:
        return b if a is ALL else a if b is ALL or a is b else self.call(aten.bitwise_and.Tensor, a, b)

    def any_over(self, mask: Mask, dims: Iterable[int]) -> Mask:
        """With every dimension of ``dims`` made 1: needed if anything along it is."""
        for dim in dims:
            if mask is not ALL and not is_one(g.shape_of(mask)[dim]):
                mask = self.call(aten.any.dim, mask, dim % len(g.shape_of(mask)), True)
        return mask

    def unsqueeze(self, mask: Mask, *dims: int) -> Mask:
        """With dimensions of size 1 put in, so that they are ``dims`` of the result."""
        for dim in sorted(dims):
            mask = mask if mask is ALL else self.call(aten.unsqueeze.default, mask, dim)
        return mask

    def squeeze(self, mask: Mask, *dims: int) -> Mask:
        mask = self.any_over(mask, dims)
        return mask if mask is ALL or not dims else self.call(aten.squeeze.dims, mask, list(dims))

    def permute(self, mask: Mask, dims: Sequence[int]) -> Mask:
        return mask if mask is ALL else self.call(aten.permute.default, mask, list(dims))

    def reduced_to(self, mask: Mask, shape: Sequence[Any]) -> Mask:
        """Of the mask of what a tensor of this shape is broadcast to, that of the tensor."""
        if mask is ALL:
            return ALL
        if leading := len(g.shape_of(mask)) - len(shape):
            mask = self.squeeze(mask, *range(leading))
        return self.any_over(mask, [dim for dim, size in enumerate(shape) if is_one(size)])

    def reshaped(self, mask: Mask, old: Sequence[Any], new: Sequence[Any]) -> Mask:
        """Of the mask of a tensor of shape ``old``, that of the tensor as ``new``.

        Raises:
            UnknownSize: it cannot be told which dimensions become which.
        """
        if mask is ALL:
            return ALL
        found = list(g.shape_of(mask))
        expanded, result = list(found), [1] * len(new)
        for olds, news in _groups(old, new):
            if all(is_one(found[dim]) for dim in olds):
                continue
            for dim in olds:
                expanded[dim] = old[dim]
            for dim in news:
                result[dim] = new[dim]
        if not all(map(g.same_size, expanded, found)):
            mask = self.call(aten.expand.default, mask, self.sizes(expanded))
        contiguous = self.call(aten.clone.default, mask, memory_format=torch.contiguous_format)
        return self.call(aten.view.default, contiguous, self.sizes(result))

    def positions(self, size: Any, dim: int, like: Node) -> Node:
        """0, 1, … along one dimension of a tensor of as many, where that is."""
        (end,) = self.sizes([size])
        device = like.meta["val"].device
        # Not arange: Inductor of PyTorch 2.11 decomposes it, which it is too late for, and cannot lower it.
        count = self.call(
            torch.ops.prims.iota.default,
            end,
            **{"start": 0, "step": 1, "dtype": torch.int64, "device": device, "requires_grad": False},
        )
        mask = self.unsqueeze(count, *(other for other in range(like.meta["val"].dim()) if other != dim))
        assert isinstance(mask, Node)
        return mask

    def sizes(self, sizes: Iterable[Any]) -> list[int | Node]:
        """Sizes as arguments of a node."""
        return [size if isinstance(size, int) else self._symbolic(size) for size in sizes]

    def _symbolic(self, size: torch.SymInt) -> Node:
        product: Any = 1
        for base, power in size.node.expr.as_powers_dict().items():
            factor = int(base) if base.is_Integer else self._symbols.get(str(base))
            if factor is None or not power.is_Integer or power < 1:
                raise UnknownSize(str(size))
            for _ in range(int(power)):
                product = factor if product == 1 else self.call(operator.mul, product, factor)
        return product  # type: ignore[no-any-return]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A node of this call, made before if there was one."""
        key = (target, *map(_hashable, args), *map(_hashable, sorted(kwargs.items())))
        if key not in self._made:
            torch.fx.map_arg((args, kwargs), self._move_up)
            with self._graph.inserting_after(self._end):
                node = self._graph.call_function(target, args, kwargs)
            with self._fake_mode:
                node.meta = {"val": g.value_of(node), "partitioner_tag": "is_forward"}
            self._made[key] = self._end = node
            self._above.add(node)
            self._at_hand.add(node)
        return self._made[key]

    def _move_up(self, node: Node) -> None:
        """Move a node of the forward, and what it is computed from, to where masks are."""
        below, found = [node], set()
        while below:
            node = below.pop()
            if node not in self._above and node not in found:
                found.add(node)
                below.extend(node.all_input_nodes)
        for node in [each for each in self._graph.nodes if each in found] if found else []:
            self._end.append(node)
            self._end = node
        self._above |= found

    def move_to_end(self, nodes: Sequence[Node]) -> None:
        """Move masks behind all others: what they are made of has changed."""
        for node in nodes:
            self._end.append(node)
            self._end = node

    def erase_unused(self) -> None:
        """Erase the masks of which nothing was made."""
        for node in reversed(self._made.values()):
            if not node.users:
                self._graph.erase_node(node)


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _groups(old: Sequence[Any], new: Sequence[Any]) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions of two shapes of as many entries that have as many entries each."""
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news = [i], [j]
        while not g.same_size(a := _product(old, olds), b := _product(new, news)):
            grows, shape = (olds, old) if g.sizes((a,)) < g.sizes((b,)) else (news, new)
            grows.append(grows[-1] + 1)
            if grows[-1] >= len(shape):
                raise UnknownSize(f"{tuple(old)} as {tuple(new)}")
        yield [dim for dim in olds if dim < len(old)], [dim for dim in news if dim < len(new)]
        i, j = olds[-1] + 1, news[-1] + 1


def _product(shape: Sequence[Any], dims: Iterable[int]) -> Any:
    total: Any = 1
    for dim in dims:
        total = total * shape[dim] if dim < len(shape) else total
    return total


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
