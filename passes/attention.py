"""Find every attention and put an op of ours in the place of its backward.

Why: query rows whose output gradient is zero, or estimated, need not be computed again. In its first form an
attention reaches the joint graph as one fused op, whose backward is another:

    forward    O, L, … = _scaled_dot_product_flash_attention_for_cpu(Q, K, V, …)
    backward   dQ, dK, dV = _scaled_dot_product_flash_attention_for_cpu_backward(dO, Q, K, V, O, L, …)

becomes

    backward   dQ, dK, dV = sparse_compile.fused_attention_backward(token, site, dO, Q, K, V, O, L, …)

The fused ops of CUDA (_flash_, _efficient_, _cudnn_) become ``cuda_attention_backward``, which gets all that
their own backward was given: for all rows it is still that which runs. Those of other devices and
FlexAttention are named in the report and left alone. The second form, with dropout on CPU or
``attn_implementation="eager"``, is a chain of two products with a softmax between them:
``passes/attention_chain.py``.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections import Counter
from typing import Any

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
        if not all(any(each is part for each in records) for part in parts):
            continue  # scores that are a sum of several products: the first of them stands for the attention
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


# The forward of a fused op -> its backward, and the form by which ``cuda_attention_backward`` knows it.
_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARDS = {
    _CPU: (aten._scaled_dot_product_flash_attention_for_cpu_backward.default, "cpu"),
    aten._scaled_dot_product_flash_attention.default: (
        aten._scaled_dot_product_flash_attention_backward.default,
        "flash",
    ),
    aten._scaled_dot_product_efficient_attention.default: (
        aten._scaled_dot_product_efficient_attention_backward.default,
        "efficient",
    ),
    aten._scaled_dot_product_cudnn_attention.default: (
        aten._scaled_dot_product_cudnn_attention_backward.default,
        "cudnn",
    ),
}


def match_fused(forward: Node) -> Node:
    """The node of the backward of a fused attention.

    Raises:
        NoMatch: with the reason, if our op cannot stand in for it.
    """
    if _is_flex(forward):
        raise NoMatch("the backward of FlexAttention is generated from its score function and not rewritten")
    if forward.target not in _BACKWARDS:
        raise NoMatch(f"the backward of the op {_op_name(forward)} is not rewritten in this version")
    target, form = _BACKWARDS[forward.target]  # type: ignore[index]
    for node in forward.graph.find_nodes(op="call_function", target=target):
        logsumexp, _ = g.strip_transposes(g.arguments(node)["logsumexp"])
        if logsumexp.target is operator.getitem and logsumexp.args[0] is forward:
            _refuse(g.arguments(node), form)
            return node
    raise NoMatch("no gradient flows through it")


def _refuse(given: dict[str, Any], form: str) -> None:
    """Raise for arguments of a fused op's backward with which some rows cannot be computed alone."""
    if given["dropout_p"] != 0.0:
        raise NoMatch("it drops probabilities inside the op, which alone can tell which")
    query, key, value = (g.shape_of(given[name]) for name in ("query", "key", "value"))
    if not g.same_size(query[3], value[3]):
        raise NoMatch("its values are not known to be as wide as its keys")
    if form == "flash" and given["is_causal"] and not g.same_size(query[2], key[2]):
        raise NoMatch("its causal mask is aligned to the last key, which is not that of the last query")
    if form == "efficient" and given["grad_input_mask"][3]:
        raise NoMatch("its mask wants a gradient, which takes all rows")


def rewrite_fused(graph: Graph, backward: Node, *, token: Node) -> Node:
    """Replace the backward of a fused attention by one op of ours, and return it."""
    given = g.arguments(backward)
    names = ("query", "key", "value", "out", "logsumexp", "is_causal")
    do = given.get("grad_out", given.get("grad_out_"))
    operands = (*(given[name] for name in names), given.get("attn_mask", given.get("attn_bias")))
    form = next(form for target, form in _BACKWARDS.values() if target is backward.target)
    with graph.inserting_before(backward):
        if form == "cpu":
            op = torch.ops.sparse_compile.fused_attention_backward.default
            arguments = (token, NO_SITE, do, *operands, given["scale"])
        else:
            op = torch.ops.sparse_compile.cuda_attention_backward.default
            lengths = ((name, None) for name in ("cum_seq_q", "cum_seq_k"))
            most = ((name, 0) for name in ("max_q", "max_k"))
            rest = [given.get(name, otherwise) for name, otherwise in (*lengths, *most)]
            rest += [given["philox_seed"], given["philox_offset"]]
            arguments = (token, NO_SITE, form, do, *operands, given["scale"], *rest)
        gradients = g.call(graph, op, *arguments, like=backward)
    for user in list(backward.users):
        if user.args[1] == 3:  # the gradient of a mask, which is None
            graph.erase_node(user)
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
