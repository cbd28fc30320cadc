"""The graph passes, in the order in which they run on a joint forward/backward graph.

They know graphs and sites and nothing of numbers. What a pass inserts is one op per site, which asks the
runtime at every step what is to be done; so a phase change needs no new graph. Four things are in the graph
only if the schedule has a use for them: the ends of blocks, the packing of what is saved for backward,
whose ratio is a size in the graph and holds for the whole training, the handing over of weight gradients, and
the gathering of input gradients from few rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import torch
from sparse_compile.passes import graph as g
from sparse_compile.passes.attention import rewrite_attentions
from sparse_compile.passes.blocks import Block, mark_blocks, rewrite_blocks
from sparse_compile.passes.forward import rewrite_forwards
from sparse_compile.passes.hand_over import hand_over
from sparse_compile.passes.leftovers import CalledLinear, linears_called, record_leftovers
from sparse_compile.passes.linear import NO_SITE, rewrite_linears
from sparse_compile.passes.needed import has_own_gradients
from sparse_compile.passes.plan import plan_ops
from sparse_compile.passes.regions import inline_regions
from sparse_compile.passes.saved import pack_saved
from torch.fx import Graph, Node

from sparse_compile import naming, sites
from sparse_compile.settings.prune import PruneSaved
from sparse_compile.sites import SavedRecord, SiteRecord, to_manifest

__all__ = [
    "Block",
    "CalledLinear",
    "has_own_gradients",
    "inline_regions",
    "linears_called",
    "mark_blocks",
    "rewrite",
    "source_hash",
]


def rewrite(
    graph: Graph,
    parameters: dict[int, str],
    linears: Sequence[CalledLinear] = (),
    blocks: Sequence[str] = (),
    saved: PruneSaved | None = None,
    handed_over: Collection[str] = (),
    dx_whole: bool = False,
    skip_unneeded: bool | Literal["loss"] = True,
    compact: bool = False,
    gpu_carries: bool = False,
    plan_at: int | None = None,
) -> tuple[list[SiteRecord], list[SavedRecord]]:
    """Rewrite a joint graph in place.

    Args:
        graph: the joint graph of AOTAutograd, with or without Inductor's decompositions.
        parameters: position among the graph's inputs -> name of the parameter there.
        linears: those that must turn up in the result (:func:`linears_called`).
        blocks: paths of the blocks whose ends are marked (:func:`mark_blocks`).
        saved: how to pack what is saved for backward; None leaves that to the partitioner.
        handed_over: names of the linears whose weight gradients go to the runtime (:func:`hand_over`).
        dx_whole: the schedule approximates no linear, and their dX are written whole (`passes/linear.py`).
        skip_unneeded: rows of the forward that nothing needs are not computed either (`passes/needed.py`);
            with "loss", nothing but the loss needs any.
        compact: nor are they carried from op to op (`passes/compact.py`).
        gpu_carries: nor on a GPU, which then waits for their number (`passes/own_products.py`).
        plan_at: which of the graph's inputs is the number of a plan (`passes/plan.py`), if there is one.

    Returns:
        A record of every linear and attention, rewritten, or left alone and why; and one of every tensor
        that is packed for backward. The same records are in the graph, as the manifest of its ``begin`` op.
    """
    records: list[SiteRecord] = []
    inputs = graph.find_nodes(op="placeholder")
    if not any(g.is_backward(node) for node in graph.nodes):
        rewrite_blocks(graph, None, blocks)
        return records, []  # an inference graph: there is no gradient
    names = {node: parameters[i] for node in inputs if (i := g.input_index(node)) in parameters}
    below = g.parameters_below(graph, names)
    token = g.insert_begin(graph, inputs)

    ends = rewrite_blocks(graph, token, blocks)
    ops, backwards = rewrite_linears(graph, token=token, below=below, records=records, dx_whole=dx_whole)
    hand_over(graph, ops, chosen=handed_over, parameters=names, records=records)
    # After the linears: an attention without a fused op is made of the products that they left over.
    ops |= rewrite_attentions(graph, token=token, records=records)
    records.extend(ends.values())
    ops |= ends
    # Last: it lists what none of the others recognised.
    record_leftovers(graph, below=below, called=linears, records=records)

    _tell_apart(ops, records)
    # When nothing looks for the forward's products any more.
    if skip_unneeded:
        loss_only = skip_unneeded == "loss"
        done = rewrite_forwards(
            *(graph, backwards),
            token=token,
            below=below,
            loss_only=loss_only,
            compact=compact,
            gpu_carries=gpu_carries,
        )
        ops |= {forward: ops[backward] for forward, backward in done.ops.items()}
        ops = {done.replaced.get(op, op): record for op, record in ops.items()}
        for op in [*done.replaced.values(), *itertools.chain(*done.counted.values())]:
            _note_carried(ops, op, records)
        for op, counted in done.counted.items():
            op.update_arg(3, [records.index(ops.pop(backward)) for backward in counted])
    # After the linears, so that their inputs have one reader each; it makes no site.
    packed = pack_saved(graph, method=saved, below=below) if saved is not None else []

    # When the records are complete: an op's site number is its record's position in the manifest.
    for op, record in ops.items():
        op.update_arg(op.args.index(NO_SITE), records.index(record))
    token.update_arg(1, to_manifest(records, packed))
    if plan_at is not None:
        plan = next(node for node in inputs if g.input_index(node) == plan_at)
        plan_ops(graph, ops, token=token, plan=plan, sites=len(records))
    graph.lint()
    return records, packed


def _tell_apart(ops: dict[Node, SiteRecord], records: list[SiteRecord]) -> None:
    """A block whose own operations, or own weight, are a site of another kind gets a name beside that one."""
    taken = {record.name for record in records if record.kind != "block"}
    for op, record in list(ops.items()):
        if record.kind == "block" and record.name in taken:
            ops[op] = dataclasses.replace(record, name=f"{record.name}{naming.END_OF_BLOCK}")
            records[records.index(record)] = ops[op]


def _note_carried(ops: dict[Node, SiteRecord], op: Node, records: list[SiteRecord]) -> None:
    old = ops[op]
    new = dataclasses.replace(old, carried=True)
    if old != new:
        records[records.index(old)] = new
        ops.update({other: new for other, record in ops.items() if record == old})


def source_hash() -> str:
    """A hash of what a rewritten graph depends on, for the keys of compile caches: the passes' own source,
    the ops that they insert and the form of the manifest."""
    package = Path(sites.__file__).parent
    ours = [*sorted(package.glob("*ops.py")), *(package / name for name in ("lowerings.py", "sites.py"))]
    paths = [*sorted(Path(__file__).parent.glob("*.py")), *ours, package / "methods/prune.py"]
    sources = [path.read_bytes() for path in paths]
    return hashlib.sha256(b"\0".join([torch.__version__.encode(), *sources])).hexdigest()
