"""Find every attention and put an op of ours in the place of its backward.

Why: query rows whose output gradient is zero, or estimated, need not be computed again. In its first form an
attention reaches the joint graph as one fused op, whose backward is another:

    forward    O, L, … = _scaled_dot_product_flash_attention_for_cpu(Q, K, V, …)
    backward   dQ, dK, dV = _scaled_dot_product_flash_attention_for_cpu_backward(dO, Q, K, V, O, L, …)

becomes

    backward   dQ, dK, dV = sparse_compile.fused_attention_backward(token, site, dO, Q, K, V, O, L, …)

The fused ops of other devices (_flash_, _efficient_, _cudnn_, …) and FlexAttention are named in the report
and left alone. The second form, with dropout on CPU or ``attn_implementation="eager"``, is a chain of two
products with a softmax between them: ``passes/attention_chain.py``.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections import Counter

import torch
from sparse_compile.passes import graph as g
from sparse_compile.passes.attention_chain import find_chains, match_chain, rewrite_chain
from sparse_compile.passes.linear import NO_SITE, NoMatch
from torch.fx import Graph, Node

from sparse_compile.sites import SiteRecord

aten = torch.ops.aten


def rewrite_attentions(graph: Graph, *, token: Node, records: list[SiteRecord]) -> dict[Node, SiteRecord]:
    """Rewrite the attentions of a joint graph, append a record of each fused one, and turn the records of the
    products of an unfused one into a single record of kind ``"attention"``.

    Args:
        graph: the joint graph, changed in place.
        token: its ``begin`` node.
        records: the graph's manifest, so far.

    Returns:
        The ops that were inserted, and the record of each. Their site numbers are not set yet.
    """
    # The records so far are those of the forward products, each of them and in the same order.
    of_product = dict(zip(g.products(graph, backward=False), records, strict=True))
    ops: dict[Node, SiteRecord] = {}
    calls: Counter[str] = Counter()
    for forward in [node for node in graph.nodes if _is_fused_attention(node)]:
        record = _record_fused(forward)
        try:
            backward = match_fused(forward)
        except NoMatch as why:
            records.append(dataclasses.replace(record, reason=str(why)))
            continue
        records.append(_rewritten(record, records, calls))
        ops[rewrite_fused(graph, backward, token=token)] = records[-1]
    for scores, out in find_chains(graph):
        parts = [of_product[scores], of_product[out]]
        record = _record_chain(scores, out, parts)
        at, _ = (_remove(records, part) for part in parts)
        try:
            chain = match_chain(scores, out)
        except NoMatch as why:
            records.insert(at, dataclasses.replace(record, reason=str(why)))
            continue
        records.insert(at, _rewritten(record, records, calls))
        ops[rewrite_chain(graph, chain, token=token)] = records[at]
    return ops


def _remove(records: list[SiteRecord], record: SiteRecord) -> int:
    """Remove this very record, not one equal to it; its position."""
    position = next(i for i, each in enumerate(records) if each is record)
    del records[position]
    return position


def _rewritten(record: SiteRecord, records: list[SiteRecord], calls: Counter[str]) -> SiteRecord:
    """The record of an attention that is rewritten. Its name is not a linear's, too: a site has one kind."""
    name = record.name
    if any(other.name == name and other.kind == "linear" for other in records):
        name = f"{name}.attention".lstrip(".")
    calls[name] += 1
    return dataclasses.replace(record, name=name, rewritten=True, call=calls[name] - 1)


def _record_chain(scores: Node, out: Node, parts: list[SiteRecord]) -> SiteRecord:
    return SiteRecord(
        name=g.module_path(scores),
        kind="attention",
        shape=g.sizes(g.shape_of(out)),
        flops_forward=sum(part.flops_forward for part in parts),
        flops_backward=sum(part.flops_backward for part in parts),
        rewritten=False,
    )


def _is_fused_attention(node: Node) -> bool:
    return not g.is_backward(node) and ("scaled_dot_product" in _op_name(node) or _is_flex(node))


def _is_flex(node: Node) -> bool:
    return _op_name(node) == "flex_attention"


def _op_name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).partition(".")[0]


def match_fused(forward: Node) -> Node:
    """The node of the backward of a fused attention.

    Raises:
        NoMatch: with the reason, if our op cannot stand in for it.
    """
    if _is_flex(forward):
        raise NoMatch("the backward of FlexAttention is generated from its score function and not rewritten")
    if forward.target is not aten._scaled_dot_product_flash_attention_for_cpu.default:
        raise NoMatch(f"the backward of the op {_op_name(forward)} is not rewritten in this version")
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    for node in forward.graph.find_nodes(op="call_function", target=backward):
        logsumexp, _ = g.strip_transposes(node.args[5])
        if logsumexp.target is operator.getitem and logsumexp.args[0] is forward:
            return node
    raise NoMatch("no gradient flows through it")


def rewrite_fused(graph: Graph, backward: Node, *, token: Node) -> Node:
    """Replace the backward of a fused attention by one ``fused_attention_backward`` op, and return it."""
    *tensors, _, causal = backward.args
    mask, scale = backward.kwargs.get("attn_mask"), backward.kwargs.get("scale")
    with graph.inserting_before(backward):
        gradients = g.call(
            graph,
            torch.ops.sparse_compile.fused_attention_backward.default,
            *(token, NO_SITE, *tensors, causal, mask, scale),
            like=backward,
        )
    backward.replace_all_uses_with(gradients)
    graph.erase_node(backward)
    return gradients


def _record_fused(forward: Node) -> SiteRecord:
    query, key = (g.sizes(g.shape_of(operand)) for operand in forward.args[:2])  # type: ignore[arg-type]
    flops = 4 * math.prod(query) * key[-2]  # Q·Kᵀ and A·V
    return SiteRecord(
        name=g.module_path(forward),
        kind="attention",
        shape=query,
        flops_forward=flops,
        flops_backward=5 * flops // 2,  # S again, dV, dA, dQ, dK
        rewritten=False,
    )
