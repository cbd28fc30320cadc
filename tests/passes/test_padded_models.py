"""The models that people train, on padded batches: which rows of their forwards are left out, and that
gradients are those of all rows where they are not carried either. In float64; each model is traced once."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from carried import assert_equal, gradients, masks_of_forwards
from carried import counts as tracer_counts
from joint import Joint, calls, joint, trace
from padded import CASES, LENGTHS, T, decoder, labelled
from sparse_compile.passes import forward, layouts
from torch import Tensor, nn
from torch._inductor.lowering import lowerings
from torch.fx import GraphModule
from tracing import Tracer
from transformers.pytorch_utils import Conv1D

from sparse_compile.kernels import linear as kernel
from sparse_compile.sites import SiteRecord

ops = torch.ops.sparse_compile

# Inductor decomposes what it is given, aot_eager leaves it as traced: of some models both are tried.
BOTH = ("first token, dropout", "every token", "last token, gpt2", "two sequences")
TRACED = [*((case, True) for case in CASES), *((case, False) for case in BOTH)]
models = pytest.mark.parametrize(
    ("case", "decomposed"),
    TRACED,
    ids=[f"{case}-{'decomposed' if decomposed else 'as traced'}" for case, decomposed in TRACED],
)

# Of how many linears the rows are carried, and how many are rewritten.
CARRIED = {
    **dict.fromkeys(("first token", "first token, dropout", "first token, eager"), (12, 14)),
    **{"every token": (13, 13), "some tokens": (14, 14), "mean of tokens": (12, 13)},
    **dict.fromkeys(("last token, llama", "last token, qwen2", "next token"), (15, 15)),
    **dict.fromkeys(("last token, gpt2", "next token, gpt2"), (9, 9)),
    "next token, padded left": (15, 15),
    "two sequences": (33, 33),  # of the encoder and of the decoder
}


@pytest.fixture(autouse=True)
def few_rows_are_carried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_FEWEST_ROWS", 2)


def rows_with_gradient(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """By linear, in the order of its calls, which rows of its output have a gradient, by eager autograd: one
    that nothing depends on has one that is exactly zero, and in float64 no other has."""
    found: dict[str, list[Tensor]] = {}

    def watch(name: str, module: nn.Module, x: Any, y: Tensor) -> None:
        found.setdefault(name, []).append(torch.zeros(y[..., 0].numel(), dtype=torch.bool))
        flags = found[name][-1]

        def note(dy: Tensor) -> None:
            flags.copy_(dy.flatten(0, -2).ne(0).any(1))

        y.register_hook(note)

    handles = [
        module.register_forward_hook(functools.partial(watch, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    torch.manual_seed(2)
    model(**inputs).backward()
    for handle in handles:
        handle.remove()
    return found


def rows_computed(traced: Joint, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Tensor]]:
    """The same as the passes have it; a linear whose forward is left as it is, is not in it."""
    masks = masks_of_forwards(monkeypatch)
    module, records = traced.rewritten()
    traced.gradients(module)
    names = [records[node.args[5]].name for node in calls(module, ops.linear_forward)]
    found: dict[str, list[Tensor]] = {}
    for name, mask in zip(names, masks, strict=True):
        found.setdefault(name, []).append(mask)
    return found


# The queries of a causal attention: the first token sees itself alone, and whatever its query, that gets all.
CAUSAL_QUERIES = re.compile(r"(self_attn\.q_proj|decoder\..*SelfAttention\.q)$")


def first_tokens(inputs: dict[str, Tensor], rows: int) -> Tensor:
    """Which of the rows of a linear belong to the first token of a sample."""
    length = rows // len(LENGTHS)
    first = inputs["attention_mask"].argmax(1) if length == T else torch.zeros(len(LENGTHS), dtype=torch.long)
    return F.one_hot(first, length).bool().flatten()


@pytest.mark.parametrize("case", [case for case, decomposed in TRACED if decomposed])
@pytest.mark.parametrize("options", [{}, {"dx_whole": True}, {"compact": False}], ids=str)
def test_what_is_inserted_can_be_lowered(case: str, options: dict[str, bool]) -> None:
    """It comes after Inductor has decomposed what it cannot lower: in PyTorch 2.11 arange is of that."""
    traced = joint(case, True)
    module, _ = traced.rewritten(**options)
    before, after = (
        {n.target for n in m.graph.nodes if n.op == "call_function"} for m in (traced.module, module)
    )
    inserted = {target for target in after - before if getattr(target, "namespace", "") in ("aten", "prims")}
    assert inserted
    assert inserted <= lowerings.keys()
    assert torch.ops.aten.arange.start_step not in after


@models
def test_the_rows_computed_are_those_with_a_gradient(case, decomposed, monkeypatch):
    _, batch = CASES[case]
    traced = joint(case, decomposed)
    truth = rows_with_gradient(traced.model, batch())
    found = rows_computed(traced, monkeypatch)
    skipped = 0
    for name, flags in truth.items():
        # A linear of which all rows are needed has an op only where that depends on the batch.
        for mask, wanted in zip(
            found.get(name, [torch.ones_like(flag) for flag in flags]), flags, strict=True
        ):
            if CAUSAL_QUERIES.search(name):
                wanted = wanted | (mask & first_tokens(batch(), len(mask)))
            assert mask.tolist() == wanted.tolist(), name
            skipped += int((~mask).sum())
    assert skipped > 0


def test_a_query_all_of_whose_keys_are_masked_sees_them_all(monkeypatch):
    """The token of padding before a sequence that is padded on the left: it predicts the first real one."""
    batch = functools.partial(labelled, left=True)
    traced = trace(lambda: decoder("Llama", "ForCausalLM"), batch, decomposed=False)
    truth = rows_with_gradient(traced.model, batch())
    found = rows_computed(traced, monkeypatch)
    assert len(found) == len(truth) == 15
    for name, (mask,) in found.items():
        (wanted,) = truth[name]
        assert (mask | ~wanted).all(), name
        assert mask[:T].all() == ("layers.0" in name or "k_proj" in name or "v_proj" in name), name


@pytest.mark.parametrize("case", ["every token", "mean of tokens", "last token, llama", "two sequences"])
def test_what_is_in_the_other_rows_does_not_matter(case, monkeypatch):
    """Loss and gradients are those of all rows, with large random numbers in the place of the copies."""
    forward = kernel.forward

    def poisoned(x: Tensor, w: Tensor, bias: Tensor | None, kept: Tensor) -> Tensor:
        y = forward(x, w, bias, kept)
        return (100 * torch.randn_like(y)).index_copy(0, kept, y[kept])

    monkeypatch.setattr(kernel, "forward", poisoned)
    traced = joint(case, case not in BOTH)
    module, _ = traced.rewritten()
    found, truth = traced.gradients(module), traced.gradients()
    assert found.keys() == truth.keys()
    for name, gradient in truth.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def counts(module: GraphModule, records: list[SiteRecord]) -> tuple[int, int]:
    """Of how many linears the rows are carried, and how many are rewritten."""
    found = calls(module, ops.linear_backward)
    carried = [len(op.args) > 9 for op in found]
    assert [records[op.args[4]].carried for op in found] == carried
    return sum(carried), len(carried)


@models
def test_gradients_are_those_of_carrying_all_rows(case, decomposed):
    traced = joint(case, decomposed)
    module, records = traced.rewritten(compact=True)
    assert_equal(traced.gradients(module), traced.gradients())
    assert counts(module, records) == CARRIED[case]


@pytest.mark.parametrize("case", ["first token, dropout", "last token, gpt2"])
def test_gradients_of_what_is_partitioned(case):
    """As AOTAutograd does it for training; against the model as it is."""
    build, inputs = CASES[case]
    model, tracer = build(), Tracer(compact=True)
    compiled = torch.compile(model, backend=tracer, fullgraph=True)
    assert_equal(gradients(model, compiled, **inputs()), gradients(model, model, **inputs()))
    assert tracer_counts(tracer) == CARRIED[case]


@pytest.mark.parametrize(
    ("case", "decomposed"), [("first token, dropout", True), ("last token, gpt2", False)]
)
def test_gradients_under_dynamic_shapes(case, decomposed):
    traced = joint(case, decomposed, dynamic=True)
    assert any(isinstance(size, int) for size in traced.inputs), "no size is a symbol"
    module, records = traced.rewritten(compact=True)
    assert_equal(traced.gradients(module), traced.gradients())
    assert counts(module, records) == CARRIED[case]


@models
def test_gradients_where_a_gpu_carries(case, decomposed, monkeypatch):
    """As many linears' rows; those that gather no gradient, or but one row a sample, are left to ops."""
    monkeypatch.setattr(forward, "_CPU", ())
    monkeypatch.setattr(forward, "_GPU", ("cpu",))
    traced = joint(case, decomposed)
    module, records = traced.rewritten(compact=True, gpu_carries=True)
    assert_equal(traced.gradients(module), traced.gradients())
    counted = {i for op in calls(module, ops.backward_rows) for i in op.args[3]}
    assert counted == {i for i, record in enumerate(records) if record.carried}
    linears, rewritten = CARRIED[case]
    assert len(counted) == linears
    assert len(calls(module, ops.linear_backward)) == rewritten - linears
