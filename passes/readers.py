"""Which reads of an activation, by the backward of a joint graph, bear a pruned value, and what can be
computed again from one.

Nodes are told apart by ``meta["original_aten"]``, the operator that they had before decompositions, so that
a graph is read alike with Inductor's and without any.
"""

from __future__ import annotations

import operator

import torch
from sparse_compile.passes import graph as g
from torch.fx import Node

from sparse_compile.sites import SAVED_KINDS

aten, prims = torch.ops.aten, torch.ops.prims

ACTIVATION, NORM, ATTENTION, LINEAR, MASK, OTHER = SAVED_KINDS

# The gradients that read what they saved entry by entry, or multiply by it: zeros in the place of small
# entries then change little. Not among them: the loss (exp of a log-probability), and what divides.
_KINDS = {
    **dict.fromkeys(("mm", "addmm", "convolution_backward"), LINEAR),
    **dict.fromkeys(("bmm", "baddbmm", "_softmax_backward_data"), ATTENTION),
    **dict.fromkeys(("gelu_backward", "silu_backward", "tanh_backward", "sigmoid_backward"), ACTIVATION),
    **dict.fromkeys(
        ("mish_backward", "elu_backward", "leaky_relu_backward", "hardswish_backward"), ACTIVATION
    ),
    **dict.fromkeys(("native_layer_norm_backward", "native_group_norm_backward"), NORM),
    **dict.fromkeys(("native_batch_norm_backward", "_fused_rms_norm_backward"), NORM),
    **dict.fromkeys(("mul", "pow"), OTHER),
}
_PRODUCTS = (LINEAR, ATTENTION)

COMPARISONS = (aten.le.Scalar, aten.lt.Scalar, aten.ge.Scalar, aten.gt.Scalar)

_VIEWS = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default),
    *(aten.transpose.int, aten.t.default, aten.expand.default, aten.clone.default, aten.alias.default),
    *(aten.detach.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims),
)
# ReLU is not among these: its output, of which half is zero anyway, is the better thing to prune.
_ELEMENTWISE = (
    *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default),
    *(aten.pow.Tensor_Scalar, aten.exp.default, aten.erf.default, aten.tanh.default, aten.sigmoid.default),
    *(aten.gelu.default, aten.silu.default, aten.reciprocal.default, aten._to_copy.default),
    torch.ops.prims.convert_element_type.default,
)
_LOOPS = {
    *(aten.sum.dim_IntList, aten.mean.dim, aten.var_mean.correction, aten.amax.default, aten.amin.default),
    *(aten.native_layer_norm.default, aten.native_layer_norm_backward.default, aten.native_dropout.default),
    *(prims.convert_element_type.default, aten._to_copy.default),
}


def kind_of_read(reader: Node, value: Node) -> str | None:
    """As what a node of the backward reads an activation; None if it needs the whole of it, or a part only.

    A view is read as whatever reads the view.
    """
    if reader.target in _VIEWS:
        kinds = {kind_of_read(user, reader) for user in reader.users}
        return None if None in kinds or not kinds else min(kinds, key=SAVED_KINDS.index)  # type: ignore[arg-type]
    kind = _KINDS.get(str(reader.meta.get("original_aten")).removeprefix("aten.").partition(".")[0])
    if kind == OTHER and "Norm" in g.module_class(reader):
        kind = NORM
    broadcast = g.is_tensor(reader) and g.numel(reader) != g.numel(value)
    return None if broadcast and kind not in _PRODUCTS else kind


def is_statistic(value: Node) -> bool:
    """Whether a value of the forward, or a function of it alone, is broadcast over an activation: as the mean
    and the scale of a norm are, and a gate of whole rows. A zero there would be one for a whole row.
    """
    while value.target in _VIEWS and g.numel(value) == g.numel(value.args[0]):  # type: ignore[arg-type]
        value = value.args[0]  # type: ignore[assignment]
    return value.op == "call_function" and _is_broadcast(value)


def _is_broadcast(value: Node) -> bool:
    of_norm = value.target is operator.getitem and "norm" in str(value.args[0].target)  # type: ignore[union-attr]
    if of_norm and value.args[1] != 0:
        return True
    for user in value.users:
        view = user.target in _VIEWS
        if g.is_backward(user) or not g.is_tensor(user) or not (view or _is_pointwise(user)):
            continue
        if g.numel(user) > g.numel(value) and not view:
            return True
        # Keys and values, too, are expanded, from groups of heads: a view alone says nothing.
        alone = len([operand for operand in user.all_input_nodes if g.is_tensor(operand)]) == 1
        if alone and _is_broadcast(user):
            return True
    return False


def _is_pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def read_by_loops(node: Node) -> bool:
    """Whether all that reads a node, through views, is on its own side of the graph and a loop of Inductor's.
    Such a loop may gather what it reads as it goes; for all else the node has to be written out."""
    for user in node.users:
        if user.op != "call_function" or g.is_backward(user) != g.is_backward(node):
            return False
        if user.target in _VIEWS:
            if not read_by_loops(user):
                return False
        elif not (_is_pointwise(user) or user.target in _LOOPS):
            return False
    return True


def recomputable(node: Node) -> bool:
    """Whether a node is a view of its operand, or an elementwise function of its operands."""
    return node.target in _VIEWS or node.target in _ELEMENTWISE or dropout_of(node) is not None


def dropout_of(node: Node) -> Node | None:
    """The ``native_dropout`` whose first result the node is."""
    if node.target is not operator.getitem or node.args[1] != 0:
        return None
    dropout: Node = node.args[0]  # type: ignore[assignment]
    return dropout if dropout.target is aten.native_dropout.default else None


def layer_norm_of(node: Node) -> Node | None:
    """The ``native_layer_norm`` whose first result the node is."""
    if node.target is not operator.getitem or node.args[1] != 0:
        return None
    norm: Node = node.args[0]  # type: ignore[assignment]
    return norm if norm.target is aten.native_layer_norm.default else None


def is_mask(node: Node) -> bool:
    """Whether a node is a bool that depends on activations or on chance, as the mask of a dropout does."""
    if not g.is_tensor(node) or node.meta["val"].dtype != torch.bool or g.is_backward(node):
        return False
    if node.target is operator.getitem:
        return node.args[0].target is aten.native_dropout.default  # type: ignore[union-attr]
    if node.target not in COMPARISONS:
        return False
    return node.args[0].meta["val"].dtype.is_floating_point  # type: ignore[union-attr]
