"""Find the attentions of a joint graph. They are named and listed in the report; none is rewritten yet.

An attention reaches the joint graph either as one fused op,

    o, … = _scaled_dot_product_flash_attention_for_cpu(Q, K, V, …)      (or _efficient_, _cudnn_, …)

or, with dropout on CPU or ``attn_implementation="eager"``, as a chain inside one module:

    S = bmm(Q, Kᵀ);  A = softmax(S · s + mask);  O = bmm(A, V)
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch
from sparse_compile.passes import graph as g
from torch.fx import Graph, Node

from sparse_compile.sites import SiteRecord

LEFT_ALONE = "the backward of attention is not rewritten in this version"

aten = torch.ops.aten

# The last is what Inductor's decompositions leave of the others.
_SOFTMAX = (aten._softmax.default, aten._safe_softmax.default, aten.exp.default)


def record_attentions(graph: Graph, records: list[SiteRecord]) -> None:
    """Append a record for every fused attention, and turn the records of the products of an unfused one
    into a single record of kind ``"attention"``."""
    records.extend(_fused(node) for node in graph.nodes if _is_fused_attention(node))
    loose = Counter(record.name for record in records if record.kind == "matmul" and len(record.shape) == 3)
    softmaxes = {g.module_path(node) for node in graph.nodes if node.target in _SOFTMAX}
    for name in (name for name, count in loose.items() if count >= 2 and _holds(name, softmaxes)):
        chain = [record for record in records if record.kind == "matmul" and record.name == name]
        records[records.index(chain[0])] = dataclasses.replace(
            chain[0],
            kind="attention",
            shape=chain[-1].shape,
            flops_forward=sum(record.flops_forward for record in chain),
            flops_backward=sum(record.flops_backward for record in chain),
            reason=LEFT_ALONE,
        )
        for record in chain[1:]:
            records.remove(record)


def _holds(module: str, paths: set[str]) -> bool:
    """Whether one of the paths is the module's own or that of a module in it."""
    return any(not module or f"{path}.".startswith(f"{module}.") for path in paths)


def _is_fused_attention(node: Node) -> bool:
    if g.is_backward(node):
        return False
    name = getattr(node.target, "__name__", str(node.target))
    return "scaled_dot_product" in name or name == "flex_attention"


def _fused(node: Node) -> SiteRecord:
    query, key = (g.sizes(g.shape_of(operand)) for operand in node.args[:2])  # type: ignore[arg-type]
    *batch_and_heads, queries, width = query
    flops = 4 * queries * key[-2] * width  # Q·Kᵀ and A·V
    for size in batch_and_heads:
        flops *= size
    return SiteRecord(
        name=g.module_path(node),
        kind="attention",
        shape=query,
        flops_forward=flops,
        flops_backward=5 * flops // 2,  # the two products again, dV, dA, dQ, dK: S is recomputed
        rewritten=False,
        reason=LEFT_ALONE,
    )
