"""Ops that can be recorded become planned ones, with the number of a plan; what is decided at every step
stays out, on its side of the graph; and without that number nothing changes."""

from __future__ import annotations

import collections
import operator
from typing import Any

import pytest
import torch
from cuda_attention import attend, cuda_attention_on_cpu  # noqa: F401
from functorch.compile import min_cut_rematerialization_partition
from sparse_compile.passes import forward
from sparse_compile.passes import graph as g
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from sparse_compile import Schedule, SparseBackend, compilers, sparse_backend
from sparse_compile.kernels import on_device
from sparse_compile.plan import NUMBERS

ours = torch.ops.sparse_compile
pytestmark = pytest.mark.usefixtures("cuda_attention_on_cpu")


class Net(nn.Module):
    """Linears, one of which is frozen, with an attention between them; the loss reads some rows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.frozen = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 1, 8)).permute(2, 0, 3, 1, 4)
        x = self.frozen(attend("efficient", q, k, v).transpose(1, 2).flatten(2))
        return torch.where(keep.unsqueeze(2), self.out(x), 0.0).square().sum()


def rewritten(number: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Graph, Graph, Graph]:
    """The joint graph, and those of forward and backward that the partitioner makes of it."""
    monkeypatch.setattr(forward, "_CPU", ())
    monkeypatch.setattr(forward, "_GPU", ("cpu",))
    monkeypatch.setattr(forward, "_WORTH_ASKING", 0)
    monkeypatch.setattr(on_device, "available", lambda device: True)
    if not number:
        monkeypatch.setattr(SparseBackend, "_planned_calls", lambda *_: None)
    found: list[Graph] = []

    def partition(joint: GraphModule, *args: Any, **options: Any) -> tuple[GraphModule, GraphModule]:
        halves = min_cut_rematerialization_partition(joint, *args, **options)
        found.extend(each.graph for each in (joint, *halves))
        return halves

    monkeypatch.setattr(compilers, "min_cut_rematerialization_partition", partition)
    run = torch.compile(Net(), backend=sparse_backend(Schedule.exact(), compiler="aot_eager"))
    run(torch.randn(2, 6, 8), torch.arange(6).expand(2, 6) < 4)
    joint, before, after = found
    return joint, before, after


def targets(graph: Graph) -> collections.Counter[str]:
    return collections.Counter(
        str(node.target) for node in graph.nodes if "sparse_compile" in str(node.target)
    )


def test_every_op_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    joint, before, after = rewritten(True, monkeypatch)
    assert targets(before) == {
        "sparse_compile.begin.planned": 1,
        "sparse_compile.needed_slots.planned": 2,
        "sparse_compile.linear_forward_rows.planned": 3,
    }
    assert targets(after) == {
        "sparse_compile.prepare_backward.default": 1,
        "sparse_compile.linear_backward.planned": 3,
        "sparse_compile.cuda_attention_backward.planned": 1,
    }
    (prepare,) = joint.find_nodes(op="call_function", target=ours.prepare_backward.default)
    assert prepare.meta["val"].shape == (4, NUMBERS)  # three linears and an attention
    (begin,) = joint.find_nodes(op="call_function", target=ours.begin.planned)
    number = begin.args[0]
    for node in joint.nodes:
        if "planned" in str(node.target) and node is not begin:
            backward = g.is_backward(node)
            assert node.args[1] is number
            control = node.args[0]
            assert control is prepare if backward else control.args == (begin, 1)
            # Nothing that is recorded reads from the CPU.
            assert all(each.meta["val"].device == control.meta["val"].device for each in tensors_read(node))


def tensors_read(node: Node) -> list[Node]:
    return [each for each in node.all_input_nodes if isinstance(each.meta["val"], Tensor)]


def test_ops_of_the_needed_rows_know_whose_mask_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    joint, *_ = rewritten(True, monkeypatch)
    slots = joint.find_nodes(op="call_function", target=ours.needed_slots.planned)
    sites = {made: g.arguments(made)["site"] for made in slots}
    readers = [
        *joint.find_nodes(op="call_function", target=ours.linear_forward_rows.planned),
        *joint.find_nodes(op="call_function", target=ours.linear_backward.planned),
    ]
    for reader in readers:
        given = g.arguments(reader)
        kept = (given.get("needed") or [given.get("kept")])[0]
        if kept is None:
            assert given["mask"] == -1
            continue
        assert kept.target is operator.getitem
        assert sites[kept.args[0]] == given["mask"]
    # Whether a forward skips rows is in the plan: nobody reads it from the CPU.
    assert all(user.args[1] < 4 for made in slots for user in made.users)


def test_without_a_number_nothing_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    joint, before, after = rewritten(False, monkeypatch)
    assert "planned" not in str(joint)
    assert targets(before)["sparse_compile.begin.default"] == 1
    assert targets(after)["sparse_compile.linear_backward.default"] == 3


def test_the_order_of_arguments_is_that_of_the_ops() -> None:
    """passes/plan.py puts them together by position."""
    for planned, called in (
        (ours.linear_backward, ["dy", "x", "w", "site", "tokens", "dw_transposed", "dx_whole"]),
        (ours.needed_slots, ["needed", "site"]),
        (ours.sample_weights, ["squares", "site"]),
    ):
        names = [each.name for each in planned.planned._schema.arguments]
        assert names[:2] == ["control", "plan"]
        assert names[2 : 2 + len(called)] == called
