"""Carry only the rows that anything needs from op to op, and not just into the products.

Why: once a linear leaves out the rows of a padded batch, what is left of a step is largely elementwise work
on all of them: norms, activation functions, random numbers for dropout, residual sums, and the gathering of
each linear's rows. Where the needed rows of one tensor are those of the next, none of that has to be done.

    x [B, T, I] ─ linear ─ gelu ─ linear ─ dropout ─ + ─ norm ─ …      N = B · T rows each

becomes, with ``rows`` int64 [n] made at the head of the graph from the masks of ``passes/needed.py``,

    x [n, I]    ─ linear ─ gelu ─ linear ─ dropout ─ + ─ norm ─ …

forward and backward alike: what keeps rows apart is done to n of them. Before any other op (attention, whose
rows meet; a head that takes the first token) the tensor is written out again: rows that are left out are
copies of one that is not in the forward, zeros in a gradient. n is a size that the graph does not know: it is
compiled once for all batches.

Which nodes: of the forward, those of which not all rows are needed (and what only the backward reads).
``rows`` is the union of what they need. Of the backward, what is computed from gradients of these rows: of a
tensor of which a row is not needed, the gradient is zero there. Two things lead into such a region: the
output gradient of a linear whose result is in it; and what an op outside of it (a head, a loss) gives as the
gradient of a tensor in it, found by the number that autograd gave to both sides of the op. If the region is
computed from tensors with rows that are not in it (a hidden state that is returned, say; an input that wants
a gradient), nothing is changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from sparse_compile.passes import compact_rules as rules
from sparse_compile.passes import graph as g
from sparse_compile.passes.layouts import layouts_of
from sparse_compile.passes.masks import ALL, Mask, Masks, UnknownSize, is_one
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

aten = torch.ops.aten


def compact_rows(
    graph: Graph,
    needed: dict[Node, Mask],
    masks: Masks,
    sites: dict[Node, Node],
) -> dict[Node, Node]:
    """Rewrite what keeps rows apart to compute the needed ones only.

    Args:
        graph: the joint graph, changed in place, after its linears have been rewritten.
        needed: what is needed of each node of the forward (``passes/needed.py``).
        masks: makes the masks.
        sites: the ``linear_backward`` op of each ``linear_forward``.

    Returns:
        The ops of ours that were replaced, and by what.
    """
    replaced: dict[Node, Node] = {}
    if _gives_gradients_of_inputs(graph, masks):
        return {}
    for layout in layouts_of(sites):
        left = {forward: backward for forward, backward in sites.items() if forward not in replaced}
        if not left:
            break
        try:
            region = _Region(graph, needed, masks, layout, left)
        except UnknownSize:
            continue
        replaced |= region.rewrite() if region.is_closed() else {}
    return replaced


def _gives_gradients_of_inputs(graph: Graph, masks: Masks) -> bool:
    """Whether an input that is no parameter gets a gradient: what is made of it counts as given elsewhere."""
    output = graph.output_node()
    inputs = {g.input_index(node): node for node in graph.find_nodes(op="placeholder")}
    described = zip(output.args[0], output.meta.get("desc") or [], strict=False)  # type: ignore[arg-type]
    of = [
        getattr(getattr(what, "grad_of", None), "idx", None) for value, what in described if value is not None
    ]
    return any(masks.at_hand(inputs[index]) for index in of if index is not None and index in inputs)


class Unfit(Exception):
    """A node that cannot be computed on few rows; it is left as it is."""


class _Region:
    """The part of a joint graph that is computed on few rows, and those rows.

    Args:
        layout: B and T of the tensors [B, T, …] and [N, …] that have the rows.
    """

    def __init__(
        self,
        graph: Graph,
        needed: dict[Node, Mask],
        masks: Masks,
        layout: tuple[Any, Any],
        sites: dict[Node, Node],
    ) -> None:
        self.graph = graph
        self.samples, self.tokens = layout
        self.n = self.samples * self.tokens
        self._needed = needed
        self._masks = masks
        self._nodes = list(graph.nodes)
        self._forward = {backward: forward for forward, backward in sites.items()}
        self._tangents = g.computed_from_tangents(graph)
        self._compact: dict[Node, Node] = {}  # what is computed on few rows, and the node that does it
        self._gathered: dict[Node, Node] = {}  # what is computed on all of them, and few of its rows
        self._entered: set[Node] = set()  # of these, the gradients that are zero in all other rows
        self._replaced: dict[Node, Node] = {}  # sums over all rows, and the same over few
        self._used: list[Mask] = []
        device = next(iter(sites)).meta["val"].device
        self.rows, self.count, self._slots, self._pairs = self._placeholders(device)

    # ---- the rows

    def _placeholders(self, device: torch.device) -> tuple[Node, Node, Node, list[Node]]:
        """rows [n], n, slots [N], and rows as indices of [B, T]; the mask is known when the region is."""
        call = self._masks.call
        n, tokens = self._masks.sizes([self.n, self.tokens])
        anything = call(aten.full.default, [n], True, dtype=torch.bool, device=device)
        rows = call(torch.ops.sparse_compile.needed_rows.default, anything)
        g.unbacked_rows(rows, self.n // 2)
        count = call(aten.sym_size.int, rows, 0)
        slots = call(torch.ops.sparse_compile.row_slots.default, rows, n)
        sample = call(aten.div.Tensor_mode, rows, tokens, rounding_mode="trunc")
        token = call(aten.sub.Tensor, rows, call(aten.mul.Tensor, sample, tokens))
        return rows, count, slots, [sample, token]

    def _settle_rows(self) -> None:
        """Give ``rows`` the union of the masks that were met, and move it behind them."""
        union: Mask = self._used[0]
        for mask in dict.fromkeys(self._used[1:]):
            union = self._masks.union(union, mask)
        self.rows.args = (self._masks.call(aten.expand.default, union, self.sizes([self.n])),)
        self._masks.move_to_end(
            [self.rows, self.count, self._slots, self._pairs[0], self._pairs[1].args[1], self._pairs[1]]
        )

    def _note(self, node: Node) -> None:
        """``rows`` must hold what is needed of this node of the forward."""
        mask = self._needed.get(node)
        if mask is None or mask is ALL:
            return
        lead = self.lead(g.shape_of(node))
        rank = len(g.shape_of(mask))
        mask = self._masks.any_over(mask, range(lead, rank))
        whole = [*([self.samples, self.tokens] if lead == 2 else [self.n]), *[1] * (rank - lead)]
        self._used.append(self._masks.reshaped(mask, whole, [self.n]))

    # ---- what is in the region

    def lead(self, shape: torch.Size) -> int:
        """How many dimensions of a tensor are its rows: 2 of [B, T, …], 1 of [N, …], otherwise 0."""
        if not is_one(self.tokens) and g.same_sizes(shape[:2], [self.samples, self.tokens]):
            return 2
        return 1 if g.same_sizes(shape[:1], [self.n]) else 0

    def _is_free(self, node: Node) -> bool:
        """Whether not all rows of a node of the forward are needed."""
        return self._needed.get(node) is not ALL and not self._masks.fixed(node)

    def is_closed(self) -> bool:
        """Whether all that the region is computed from, as far as it has rows, is in it."""
        above: set[Node] = set()
        for node in reversed(self._nodes):
            if node.op != "call_function" or g.is_backward(node):
                continue
            mask = self._needed.get(node)
            has_rows = g.is_tensor(node) and self.lead(g.shape_of(node)) > 0
            if (node in above and not self._masks.fixed(node)) or (has_rows and mask not in (None, ALL)):
                if has_rows and mask is ALL and node.meta["val"].dtype.is_floating_point:
                    return False
                above.update(node.all_input_nodes)
        return bool(above)

    def rewrite(self) -> dict[Node, Node]:
        entries: set[Node] | None = None
        for node in (each for each in self._nodes if each.op == "call_function"):
            if g.is_backward(node) or self._is_free(node):
                skipping = contextlib.suppress(Unfit, UnknownSize, GuardOnDataDependentSymNode)
                with skipping, self.graph.inserting_before(node):
                    self._try(node)
            if g.is_backward(node) and self.is_gradient(node):  # all of the forward has been seen
                entries = self._entries() if entries is None else entries
                if node in entries and node not in self:
                    self.enter(node)
        if not self._used:
            return {}
        self._settle_rows()
        ours = {old: new for old, new in self._compact.items() if rules.is_ours(old)}
        self._put_in_place()
        return ours

    def _entries(self) -> set[Node]:
        """Gradients of the region's tensors that come from ops outside of it: the last that autograd has made
        for such an op, if of all that the op has read one tensor alone can have a gradient, and that is in
        the region. (An op that autograd does not see, under no_grad, has the number of the one before.)"""
        forward, backward = ({}, {})  # type: tuple[dict[int, list[Node]], dict[int, list[Node]]]
        for node in self._nodes:
            if node.op == "call_function" and "seq_nr" in node.meta:
                side = backward if g.is_backward(node) else forward
                side.setdefault(node.meta["seq_nr"], []).append(node)
        found = set()
        for number, nodes in forward.items():
            read = {x for node in nodes for x in node.all_input_nodes if self._may_have_gradient(x)}
            sources = read.difference(nodes)
            if len(sources) == 1 and any(node not in self for node in nodes):
                (x,) = sources
                if not self.lead(g.shape_of(x)):
                    continue
                gradients = [
                    node
                    for node in backward.get(number, [])
                    if g.is_tensor(node) and self.is_gradient(node) and g.same_shape(node, x)
                ]
                found.update(gradients[-1:] if x in self else [])
        return found

    def _may_have_gradient(self, x: Node) -> bool:
        return g.is_tensor(x) and not self._masks.at_hand(x) and x.meta["val"].dtype.is_floating_point

    def _try(self, node: Node) -> None:
        rule = rules.RULES.get(node.target)
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = rules.pointwise
        if rule is not None:
            rule(self, node)

    # ---- for rules

    def __contains__(self, node: Any) -> bool:
        # What is computed from inputs alone has all of its rows, whoever has gathered some of them.
        return node in self._compact or (node in self._gathered and not self._masks.fixed(node))

    def has_site(self, backward: Node) -> bool:
        """Whether a ``linear_backward`` is that of a linear in the region."""
        return self._forward.get(backward) in self._compact

    def is_gradient(self, node: Any) -> bool:
        return node in self._tangents

    def is_zero_elsewhere(self, node: Any) -> bool:
        """Whether a node is a gradient of which all but the region's rows are zero."""
        return node in self._entered or (node in self._compact and node in self._tangents)

    def of(self, node: Node) -> Node:
        """A tensor of the region on its rows."""
        found = self._compact.get(node) or self._gathered.get(node)
        if found is None:
            raise Unfit
        return found

    def set(self, node: Node, compact: Node, *, own_rows: bool = False) -> None:
        """``compact`` computes ``node`` on the region's rows.

        Args:
            own_rows: ``node`` may need rows that its operands in the region do not.
        """
        if g.is_tensor(node):
            self.sizes(g.shape_of(node))  # else it could not be written out
        self._compact[node] = compact
        if own_rows and not g.is_backward(node):
            self._note(node)

    def replace(self, node: Node, by: Node) -> None:
        """``by`` computes the same as ``node``, all of it."""
        self._replaced[node] = by

    def emit(self, target: Any, *args: Any, like: Node, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        try:
            with like.meta["val"].fake_mode if hasattr(like.meta["val"], "fake_mode") else self._fake_mode:
                node.meta = {**like.meta, "val": g.value_of(node)}
        except BaseException:
            self.graph.erase_node(node)
            raise
        return node

    @property
    def _fake_mode(self) -> Any:
        return self.rows.meta["val"].fake_mode

    def sizes(self, sizes: Iterable[Any]) -> list[int | Node]:
        """Sizes as arguments of a node.

        Raises:
            UnknownSize: one is no product of the graph's own symbols.
        """
        return self._masks.sizes(sizes)

    def gather(self, node: Node, *, like: Node) -> Node:
        """The region's rows of a tensor that has all of them."""
        if node not in self._gathered:
            lead = self.lead(g.shape_of(node))
            if not lead:
                raise Unfit
            index = self._pairs if lead == 2 else [self.rows]
            self._gathered[node] = self.emit(aten._unsafe_index.Tensor, node, index, like=like)
            if not g.is_backward(node) and not self._masks.fixed(node):
                self._note(node)
        return self._gathered[node]

    def enter(self, node: Node) -> None:
        """Take the region's rows of a tensor that is computed on all; a gradient is zero in the others."""
        self._entered.add(node)
        with self.graph.inserting_after(node):
            self.gather(node, like=node)

    def operand(self, x: Any, like: Node) -> Any:
        """An operand of an elementwise ``like``, whose rows are those of a result [B, T, …] or [N, …]."""
        if not isinstance(x, Node) or not g.is_tensor(x):
            return x
        shape = g.shape_of(like)
        lead, rank = self.lead(shape), len(shape)
        its, missing = g.shape_of(x), rank - len(g.shape_of(x))
        if x in self:
            if missing or self.lead(its) != lead:
                raise Unfit
            return self.of(x)
        leading = [its[i - missing] if i >= missing else 1 for i in range(lead)]
        if all(is_one(size) for size in leading):
            extra = max(0, len(its) - (rank - lead))
            return self.emit(aten.squeeze.dims, x, list(range(extra)), like=like) if extra else x
        if g.same_sizes(leading, shape[:lead]) and not missing:
            return self.gather(x, like=like)
        for _ in range(missing):
            x = self.emit(aten.unsqueeze.default, x, 0, like=like)
        sizes = self.sizes([*shape[:lead], *g.shape_of(x)[lead:]])
        whole = self.emit(aten.expand.default, x, sizes, like=like)
        return self.gather(whole, like=like)

    # ---- afterwards

    def _put_in_place(self) -> None:
        """Let all others read the region's tensors written out, and erase what nothing reads."""
        gone = set(self._compact) | set(self._replaced)
        for node, by in self._replaced.items():
            node.replace_all_uses_with(by)
        for node, compact in self._compact.items():
            readers = [user for user in node.users if user not in gone]
            for side in (False, True):
                if chosen := [user for user in readers if g.is_backward(user) == side]:
                    with self.graph.inserting_before(min(chosen)):
                        whole = self._written_out(node, compact, like=node, backward=side)
                    if not side and node in self._needed:  # for the next layout
                        self._needed[whole] = self._needed[node]
                    for user in chosen:
                        user.replace_input_with(node, whole)
        for node in reversed(self._nodes):
            if node in gone and not node.users:
                self.graph.erase_node(node)
        for node in reversed(list(self._gathered.values())):
            if not node.users:
                self.graph.erase_node(node)

    def _written_out(self, node: Node, compact: Node, *, like: Node, backward: bool) -> Node:
        """[B, T, …] or [N, …] of a tensor of the region [n, …]."""
        tag = {"partitioner_tag": "is_backward" if backward else "is_forward"}
        shape = list(g.shape_of(node))
        rest = shape[self.lead(g.shape_of(node)) :]
        slots = self._masks.call(aten.clamp_min.default, self._slots, 0)
        whole = self.emit(aten._unsafe_index.Tensor, compact, [slots], like=like)
        made = [whole]
        if self.is_gradient(node):
            here = self._masks.call(aten.ge.Scalar, self._slots, 0)
            here = self._masks.call(aten.view.default, here, self.sizes([self.n, *[1] * len(rest)]))
            dtype = node.meta["val"].dtype
            zero = self.emit(aten.full.default, [], 0, like=like, dtype=dtype, device=node.meta["val"].device)
            whole = self.emit(aten.where.self, here, whole, zero, like=like)
            made += [zero, whole]
        if not g.same_sizes(shape, [self.n, *rest]):
            whole = self.emit(aten.view.default, whole, self.sizes(shape), like=like)
            made.append(whole)
        for each in made:
            each.meta.update(tag)
        return whole
