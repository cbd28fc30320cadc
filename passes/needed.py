"""Find, for every linear of a forward, the rows of its result that anything needs.

Why: the rows of a padded batch that stand for no token are computed like all others, and then nothing reads
them: attention masks them out, and a head takes the first token or an average over real ones. No output of
the model depends on them, and no gradient. Which rows those are follows from the inputs of the model alone,
and can be known before the first product.

The forward is walked from its outputs back to its inputs. Each op says what of its operands it needs for
what is needed of its result, as a mask (``passes/masks.py``):

    an output of the graph     all of it (or nothing, if it is not the loss and only that is asked for)
    X[:, 0]                    of X its first rows
    X · m, where(m, X, 0)      what is needed of the product, where m is not 0; m from inputs alone
    nll_loss(X, labels)        the rows whose label is not to be ignored
    attention                  of Q the rows needed of O; of K and V those that such a row of Q may see
    Y = X · Wᵀ, a norm, a softmax    the rows needed of Y
    entry by entry, views      the same entries
    any other op               all of its operands

Rows that are not needed may hold any finite numbers: what they are multiplied by is exactly zero, in the
forward as in the backward. (So a model that masks by adding -10,000, and not the least of all numbers, is
taken to need all rows.)
"""

from __future__ import annotations

from typing import Any

import torch
from sparse_compile.passes import graph as g
from sparse_compile.passes import visible
from sparse_compile.passes.masks import ALL, Mask, Masks, UnknownSize, is_one
from sparse_compile.passes.needed_rules import Known, keeps_rows_apart, of_operands
from torch._functorch._aot_autograd.descriptors import PlainAOTOutput
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten


def has_own_gradients(gm: GraphModule) -> bool:
    """Whether a Dynamo graph holds an ``autograd.Function``. Its gradient is what its author says, and need
    not be zero in rows that its result does not depend on (a straight-through mask): all rows are needed."""
    function = torch.ops.higher_order.autograd_function_apply
    graphs = [module.graph for module in gm.modules() if isinstance(module, GraphModule)]
    return any(graph.find_nodes(op="call_function", target=function) for graph in graphs)


def rows_needed(
    graph: Graph,
    products: list[Node],
    masks: Masks,
    below: dict[Node, frozenset[str]],
    *,
    loss_only: bool = False,
) -> tuple[dict[Node, Mask], dict[Node, Node]]:
    """The rows that are needed of a forward.

    Args:
        graph: the joint graph.
        masks: makes the masks; those that no result is made of are left for it to erase.
        below: :func:`passes.graph.parameters_below`.
        loss_only: of what the model returns, its loss alone is needed, if it returns one.

    Returns:
        The mask of each node that is needed at all; and for each of the linears ``products`` of which not all
        rows are, a node: bool [N].
    """
    needed = _Walk(graph, masks, below).run(_outputs(graph, loss_only))
    found = {}
    for product in products:
        mask = masks.any_over(needed.get(product, ALL), [1])
        if mask is not ALL and not is_one(g.shape_of(mask)[0]):
            found[product] = masks.call(aten.squeeze.dims, mask, [1])
    return needed, found


def _outputs(graph: Graph, loss_only: bool) -> list[Node]:
    """The outputs of the forward of a joint graph that are needed.

    A loss is a single number that the model returns. Buffers that a forward changes are always needed.
    """
    output = graph.output_node()
    described = output.meta.get("desc") or []
    needed = [node for node in output.all_input_nodes if not g.is_backward(node)]
    returned = {
        node: len(g.shape_of(node)) == 0 and node.meta["val"].dtype.is_floating_point
        for node, what in zip(output.args[0], described, strict=False)  # type: ignore[arg-type]
        if isinstance(what, PlainAOTOutput) and isinstance(node, Node) and g.is_tensor(node)
    }
    if loss_only and any(returned.values()):
        needed = [node for node in needed if returned.get(node, True)]
    return needed


class _Walk:
    """From the outputs of a forward to its inputs."""

    def __init__(self, graph: Graph, masks: Masks, below: dict[Node, frozenset[str]]) -> None:
        chains = {product: chain for chain in visible.find(graph) for product in (chain.scores, chain.out)}
        self._known = Known(masks, chains)
        self._graph = graph
        self._below = below
        self._needed: dict[Node, Mask] = {}
        self._saved: set[Node] = set()  # what the backward alone reads

    def run(self, outputs: list[Node]) -> dict[Node, Mask]:
        """The mask of every node of the forward that is needed at all, for these of the graph's outputs."""
        for node in outputs:
            self._note(node, ALL)
        for node in reversed(list(self._graph.nodes)):
            if node.op != "call_function" or g.is_backward(node):
                continue
            mask = self._needed.get(node)
            if mask is None:
                self._look_at_saved(node)
                continue
            try:
                for operand, its in of_operands(self._known, node, mask):
                    self._note(operand, its)
            except UnknownSize:
                for operand in node.all_input_nodes:
                    self._note(operand, ALL)
        return self._needed

    def _look_at_saved(self, node: Node) -> None:
        """A node on which no output depends. If the backward reads it, or what is made of it, or if it is
        there for its effect, all of it may be needed; but not where it keeps rows apart: then the gradients
        of the same rows read it."""
        checks = node.is_impure() and torch.Tag.nondeterministic_seeded not in getattr(
            node.target, "tags", ()
        )
        if not checks and node not in self._saved and not any(map(g.is_backward, node.users)):
            return
        if keeps_rows_apart(node):
            self._saved.update(node.all_input_nodes)
        else:
            for operand in node.all_input_nodes:
                self._note(operand, ALL)

    def _note(self, node: Any, mask: Mask) -> None:
        if isinstance(node, Node) and node not in self._below:
            known = self._needed.get(node)
            self._needed[node] = mask if known is None else self._known.masks.union(known, mask)
