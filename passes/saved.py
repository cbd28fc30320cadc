"""Put a pruned, packed form between forward and backward in the place of every activation that is saved.

Why: what a forward leaves for its backward is most of the memory of training, and a backward that reads only
the largest entries of it trains as well (Back Razor, see ``methods/prune.py``).

    forward    x = …                              backward   … = f(dy, x)

becomes

    forward    x = …
               mask, kept, scales, means, rows = sparse_compile.pack(x, samples, groups, keep, values)
    backward   x̂ = sparse_compile.unpack(mask, kept, scales, means, rows, size, dtype)
               … = f(dy, x̂)

The input of an activation function (GELU, SiLU, …) is not pruned but rounded to 8 bits: a zero in the place
of a small entry is read as a slope of ½, and the slopes of most of those entries are far from it. With such
inputs pruned to a tenth, the gradient behind one GELU of MiniLM had a cosine of 0.56 with the true one, and
0.15 behind six. (The published code does not prune them either.) Plain ops do it, which a compiler fuses with
the function and with its gradient. Where it need not be as published, Q, K and V of a fused attention are
rounded too.

The joint graph still shows who reads what, so the choice is made there, and the partitioner then finds
nothing but the packed form to save. What stands in for a value that the backward reads:

- **its source.** A value that is a view of another, or an elementwise function of one other (GELU, dropout, a
  scaling, the division in a norm), is computed again in the backward from that one's pruned form, which is
  packed once for all its readers. So GELU's output is never saved, an activation under several views is saved
  once, and so is the input of a norm for the norm and for the linear behind it (not as published).
- **fused attention** saves no probabilities; its backward makes them again from Q and K and the log-sum-exp.
  With another Q and K that sum would be wrong and the probabilities without bound. So the attention itself
  runs again in the backward, on the pruned Q, K and V. One that drops out is left whole.
- **masks**, of dropout and of ReLU, are kept to the bit.

Left alone: the inputs of the graph, parameters and what comes from them alone; what is broadcast (the means
and scales of norms, where a zero would be one for a whole row); small tensors; whatever a checkpoint says is
to be recomputed; and all readers that are not known to bear a pruned value, such as the loss.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from sparse_compile.passes import graph as g
from sparse_compile.passes.readers import (
    ACTIVATION,
    ATTENTION,
    COMPARISONS,
    LINEAR,
    MASK,
    NORM,
    OTHER,
    is_mask,
    is_statistic,
    kind_of_read,
    layer_norm_of,
    recomputable,
)
from sparse_compile.passes.recompute import RESHAPES, copy_node, operands, recompute
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from sparse_compile.methods import prune
from sparse_compile.settings.prune import PruneSaved
from sparse_compile.sites import SAVED_KINDS, SavedRecord

aten = torch.ops.aten
ours = torch.ops.sparse_compile

_FEWEST_ROWS = 16  # of a group, for whose means a sixteenth of the entries may be spent
SMALLEST = 1024  # entries; for less, an op costs more than the memory is worth
# What is smaller than this part of the largest activation is saved whole, too: the one token a sample that a
# head reads takes next to no memory, and the gradients of the head are large.
_SMALL_SHARE = 100
_OF_TOKENS = (ACTIVATION, NORM, LINEAR)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda")
# What restores an activation depends on no gradient: nothing else keeps a partitioner from doing it in the
# forward.
_FORWARD, _BACKWARD = "must_be_in_forward", "must_be_in_backward"
_RECOMPUTED = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def pack_saved(graph: Graph, *, method: PruneSaved, below: dict[Node, frozenset[str]]) -> list[SavedRecord]:
    """Change every read of a forward activation by the backward of a joint graph.

    Args:
        graph: the joint graph, changed in place; the linears' products are replaced by our own op already.
        method: the ratio, and the form of the kept values.
        below: :func:`passes.graph.parameters_below`.

    Returns:
        A record of each tensor that is packed.
    """
    readers = [node for node in graph.nodes if g.is_backward(node)]
    packer = _Packer(graph, method, below)
    for reader in readers:
        packer.look_at(reader)
    packer.leave_out_small()
    for reader in readers:
        packer.rewrite(reader)
    return packer.records


class _Packer:
    """The walk over a backward, in the graph's order: what is unpacked for one reader serves all later ones.

    Attributes:
        records: of what is packed so far.
    """

    def __init__(self, graph: Graph, method: PruneSaved, below: dict[Node, frozenset[str]]) -> None:
        self.records: list[SavedRecord] = []
        self._smallest = SMALLEST
        self._graph = graph
        self._method = method
        self._below = below
        self._inner = _inner(graph, below)
        self._kinds: dict[Node, str] = {}
        self._sources: dict[Node, Node] = {}
        self._rounded: set[Node] = set()
        self._restored: dict[Node, Node] = {}

    def look_at(self, reader: Node) -> None:
        """Note as what the sources of a reader's operands are read; of several kinds the first counts."""
        fused = _is_fused_attention(reader)
        for value in _forward_values(reader):
            kind = ATTENTION if fused else self._kind(reader, value)
            if kind is not None:
                source = self._source(value)
                self._kinds[source] = min(kind, self._kinds.get(source, kind), key=SAVED_KINDS.index)
                if fused and not self._method.as_published:
                    self._rounded.add(source)

    def leave_out_small(self) -> None:
        """Raise the least size to a share of the largest activation that was looked at. The logits are not
        among those, nor are the probabilities of an attention: both can be a hundred times as wide. Nor are
        parameters, which a linear reads like an activation."""
        kinds = {source: kind for source, kind in self._kinds.items() if self._is_worth_it(source)}
        sizes = [g.numel(source) for source, kind in kinds.items() if kind in _OF_TOKENS]
        self._smallest = max(SMALLEST, max(sizes, default=0) // _SMALL_SHARE)

    def rewrite(self, reader: Node) -> None:
        if _is_fused_attention(reader):
            self._rewrite_attention(reader)
        elif reader.target in COMPARISONS or reader.target is aten.threshold_backward.default:
            self._rewrite_sign(reader)
        else:
            for value in _forward_values(reader):
                prunes = self._prunable(value) and self._kind(reader, value) is not None
                if prunes or (is_mask(value) and self._is_worth_it(value)):
                    reader.replace_input_with(value, self._restore(value, reader))

    def _rewrite_attention(self, reader: Node) -> None:
        """Run a fused attention again in the backward, and let ``reader``, its gradient, read that run."""
        outputs = {value: found for value in reader.all_input_nodes if (found := _attention_output(value))}
        forward = next((attention for attention, _ in outputs.values()), None)
        if forward is None or _drops_out(forward):
            return
        qkv: list[Any] = [value for value in forward.all_input_nodes if value in forward.args[:3]]
        if not all(value in reader.all_input_nodes and self._prunable(value) for value in qkv):
            return
        pruned = {value: self._restore(value, reader) for value in qkv}
        with self._graph.inserting_before(reader):
            rerun = copy_node(self._graph, forward, pruned)
            for value, (_, index) in outputs.items():
                output = g.call(self._graph, operator.getitem, rerun, index, like=reader)
                reader.replace_input_with(value, output)
        for value, restored in pruned.items():
            reader.replace_input_with(value, restored)

    def _rewrite_sign(self, reader: Node) -> None:
        """Save what a reader only compares with a number, as ReLU's gradient does, as one bit an entry."""
        (*dy, read), number = reader.args[:-1], reader.args[-1]
        if not isinstance(read, Node) or isinstance(number, Node):
            return
        value = g.strip_aliases(read)
        if not self._is_worth_it(value):
            return
        test = aten.le.Scalar if dy else reader.target
        with self._graph.inserting_before(value.next):
            mask = self._restore(g.call(self._graph, test, value, number, like=value), reader)
        if dy:
            with self._graph.inserting_before(reader):
                mask = g.call(self._graph, aten.masked_fill.Scalar, dy[0], mask, 0, like=reader)
        reader.replace_all_uses_with(mask)
        self._graph.erase_node(reader)

    def _kind(self, reader: Node, value: Node) -> str | None:
        """As what ``reader`` reads ``value``, or None; a plain product may be the loss, and then is None."""
        kind = kind_of_read(reader, value)
        return None if kind == OTHER and value not in self._inner else kind

    def _prunable(self, value: Node) -> bool:
        """Whether the backward may get ``value`` from the pruned form of an activation."""
        source = self._source(value)
        if self._method.exact or is_statistic(value) or is_statistic(source):
            return False
        return source.meta["val"].dtype in _DTYPES and self._is_worth_it(source)

    def _is_worth_it(self, value: Node) -> bool:
        """Whether ``value`` is a large tensor that the forward makes and saves."""
        return (
            value.op == "call_function"
            and not g.is_backward(value)
            and value not in self._below
            and value.meta["val"].dtype in (*_DTYPES, torch.bool)
            and value.meta["val"].device.type in _DEVICES
            and value.meta.get("recompute") not in _RECOMPUTED
            and g.numel(value) >= self._smallest
        )

    def _source(self, value: Node) -> Node:
        """The activation that ``value`` is a view or an elementwise function of; itself if of none or two."""
        if value not in self._sources:
            self._sources[value] = value
            if self._recomputable(value) and not g.is_backward(value) and value not in self._below:
                found = {
                    self._source(operand) for operand in self._pruned_operands(value) if not is_mask(operand)
                }
                source = found.pop() if len(found) == 1 else value
                # A cast to something narrower is packed itself.
                if source.meta["val"].dtype.itemsize <= value.meta["val"].dtype.itemsize:
                    self._sources[value] = source
        return self._sources[value]

    def _recomputable(self, value: Node) -> bool:
        if (norm := layer_norm_of(value)) is None:
            return recomputable(value)
        has_statistics = len({user.args[1] for user in norm.users}) == 3
        return has_statistics and "Norm" in g.module_class(value) and not self._method.as_published

    def _pruned_operands(self, value: Node) -> list[Node]:
        """Those operands that are not read whole, as a norm's scale is by the norm, and its parameters. (A
        softmax's sum is not: what it divides is not its input, and its result is what is to be pruned.)"""
        if "Norm" not in g.module_class(value):
            return operands(value)
        whole = {} if self._method.as_published else self._below
        return [each for each in operands(value) if each not in whole and not is_statistic(each)]

    def _restore(self, value: Node, reader: Node) -> Node:
        """What stands for ``value`` in the backward; made just before ``reader`` if it is not there yet."""
        if value not in self._restored:
            if is_mask(value):
                restored = self._pack_mask(value, reader)
            elif value is self._source(value):
                rounds = self._kinds[value] == ACTIVATION or value in self._rounded
                restored = (self._round if rounds and self._method.ratio > 0 else self._pack)(value, reader)
            else:
                pruned = self._pruned_operands(value)
                found = {operand: self._restore(operand, reader) for operand in pruned}
                with self._graph.inserting_before(reader):
                    restored = recompute(self._graph, value, found)
            self._restored[value] = restored
        return self._restored[value]

    def _pack(self, source: Node, reader: Node) -> Node:
        value = source.meta["val"]
        whole = _with_samples(source)
        with self._graph.inserting_before(whole.next):
            samples = g.size(self._graph, whole, 0)
            size = [g.size(self._graph, source, dim) for dim in range(value.dim())]
            groups = _groups(self._graph, source, samples) if not self._method.as_published else 0
            packed = g.call(
                self._graph,
                ours.pack.default,
                *(source, samples, groups, 1 - self._method.ratio, self._method.values),
                like=source,
            )
            parts = [g.call(self._graph, operator.getitem, packed, i, like=source) for i in range(5)]
        _save(packed, *parts)
        self._note(source, self._kinds[source], parts)
        return self._unpack(reader, ours.unpack.default, *parts, size, value.dtype)

    def _round(self, source: Node, reader: Node) -> Node:
        with self._graph.inserting_before(source.next):
            parts = g.inline(self._graph, prune.round_rows, source, like=source, tag=_FORWARD)
            needed = g.call(self._graph, ours.needed.default, parts, like=source)
        _save(needed, *parts)
        self._note(source, self._kinds[source], parts)
        restore = functools.partial(prune.restore_rows, dtype=source.meta["val"].dtype)
        with self._graph.inserting_before(reader):
            return g.inline(self._graph, restore, *parts, like=reader, tag=_BACKWARD)  # type: ignore[no-any-return]

    def _pack_mask(self, mask: Node, reader: Node) -> Node:
        with self._graph.inserting_before(mask.next):
            size = [g.size(self._graph, mask, dim) for dim in range(mask.meta["val"].dim())]
            bits = g.call(self._graph, ours.pack_bits.default, mask, like=mask)
        _save(bits)
        self._note(mask, MASK, [bits])
        return self._unpack(reader, ours.unpack_bits.default, bits, size)

    def _unpack(self, reader: Node, target: Any, *args: Any) -> Node:
        with self._graph.inserting_before(reader):
            restored = g.call(self._graph, target, *args, like=reader)
        restored.meta["partitioner_tag"] = _BACKWARD
        return restored

    def _note(self, source: Node, kind: str, parts: list[Node]) -> None:
        self.records.append(
            SavedRecord(
                name=g.module_path(source),
                kind=kind,
                shape=g.sizes(g.shape_of(source)),
                bytes_dense=_bytes(source),
                bytes_packed=sum(map(_bytes, parts)),
            )
        )


def _inner(graph: Graph, below: dict[Node, frozenset[str]]) -> set[Node]:
    """The nodes of the forward on which a later use of a parameter depends: not those of the loss."""
    inner: set[Node] = set()
    for node in reversed(graph.nodes):
        users = [user for user in node.users if not g.is_backward(user)]
        if any(user in inner or not below.keys().isdisjoint(user.all_input_nodes) for user in users):
            inner.add(node)
    return inner


def _forward_values(reader: Node) -> list[Node]:
    """The tensors of the forward that a node of the backward reads."""
    return [node for node in reader.all_input_nodes if g.is_tensor(node) and not g.is_backward(node)]


def _is_fused_attention(node: Node) -> bool:
    """Whether a node is a fused attention or its backward, PyTorch's own or ours."""
    ours = torch.ops.sparse_compile
    is_ours = node.target in (ours.fused_attention_backward.default, ours.cuda_attention_backward.default)
    return is_ours or "scaled_dot_product" in str(node.target)


def _attention_output(value: Node) -> tuple[Node, int] | None:
    """The fused attention of the forward whose result ``value`` is, and which of its results."""
    value = g.strip_aliases(value)
    if value.target is not operator.getitem or not _is_fused_attention(value.args[0]):  # type: ignore[arg-type]
        return None
    return value.args[0], value.args[1]  # type: ignore[return-value]


def _drops_out(attention: Node) -> bool:
    """Whether an attention drops some of its probabilities: a second run would drop others."""
    return g.arguments(attention).get("dropout_p", 0.0) != 0.0


def _with_samples(source: Node) -> Node:
    """The form of an activation whose first dimension is the batch.

    That is the one with most dimensions: a linear's output [N, O] is viewed as [B, T, O] by what reads it,
    and a batched product [B · H, T, D] as [B, H, T, D].
    """
    forms, found = [source], [source]
    while forms:
        views = [user for user in forms.pop().users if user.target in RESHAPES and not g.is_backward(user)]
        forms.extend(views)
        found.extend(views)
    return max(found, key=lambda node: len(g.shape_of(node)))


def _groups(graph: Graph, source: Node, samples: int | Node) -> int | Node:
    """Of how many groups of rows the means are taken off: the tokens of each sample, or of each of its heads.
    0 where there are so few rows in a group that a mean would be a good part of it."""
    *leading, rows, _ = (1, *g.sizes(g.shape_of(source)))
    if len(leading) <= 1:
        known = samples if isinstance(samples, int) else samples.meta["val"]
        return samples if rows >= _FEWEST_ROWS * g.sizes((known,))[0] else 0
    if rows < _FEWEST_ROWS:
        return 0
    sizes = [samples, *leading]
    if all(isinstance(size, int) for size in sizes) and math.prod(leading) % samples:  # type: ignore[operator]
        return 0  # a group would have rows of several samples
    groups: int | Node = 1
    for dim in range(len(leading) - 1):
        size = g.size(graph, source, dim)
        if isinstance(groups, int) and (groups == 1 or isinstance(size, int)):
            groups = size if groups == 1 else groups * size  # type: ignore[assignment]
        else:
            groups = g.call(graph, operator.mul, groups, size, like=source)
    return groups


def _save(*nodes: Node) -> None:
    for node in nodes:
        node.meta["partitioner_tag"] = _FORWARD
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _bytes(node: Node) -> int:
    return g.numel(node) * node.meta["val"].dtype.itemsize
