"""CUDA's fused attentions become one op each, with all that their own backward takes; near-misses do not."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from cuda_attention import FORMS, attend, cuda_attention_on_cpu  # noqa: F401
from sparse_compile.passes import graph as g
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from tracing import Model, Trace, layer, trace

SAMPLES, HEADS, TOKENS, WIDTH = 2, 3, 5, 8
PRODUCT = 2 * SAMPLES * HEADS * TOKENS * TOKENS * WIDTH  # FLOPs of Q·Kᵀ, or of A·V

pytestmark = pytest.mark.usefixtures("cuda_attention_on_cpu")
each_form = pytest.mark.parametrize("form", FORMS)


def heads(keys: int = TOKENS, groups: int = HEADS, width: int = WIDTH) -> list[Tensor]:
    """Q, K and V; float32, since the log-sum-exp of these ops is."""
    shapes = (HEADS, TOKENS, WIDTH), (groups, keys, WIDTH), (groups, keys, width)
    return [torch.randn(SAMPLES, *shape, requires_grad=True) for shape in shapes]


def traced(core: Any, *inputs: Any, **options: Any) -> Trace:
    model = Model(lambda m, *x: m.core(*x), core=Model(lambda m, *x: core(*x)))
    return trace(model, *inputs, rtol=1e-5, **options)


def backwards(found: Trace) -> list[str]:
    return [str(node.target) for node in found.graph.nodes if "attention_backward" in str(node.target)]


@pytest.mark.parametrize("decompositions", [None, select_decomp_table()], ids=["as traced", "decomposed"])
@pytest.mark.parametrize("causal", [False, True])
@each_form
def test_one_record_and_one_op(form: str, causal: bool, decompositions: Any) -> None:
    found = traced(
        lambda *x: attend(form, *x, is_causal=causal, scale=0.3), *heads(), decompositions=decompositions
    )
    (record,) = found.records
    assert (record.name, record.kind, record.rewritten, record.reason) == ("core", "attention", True, "")
    assert record.shape == (SAMPLES, HEADS, TOKENS, WIDTH)
    assert (record.flops_forward, record.flops_backward) == (2 * PRODUCT, 5 * PRODUCT)
    assert backwards(found) == ["sparse_compile.cuda_attention_backward.default"]
    (op,) = found.attention_ops.values()
    given = g.arguments(op)
    assert (given["form"], given["causal"], given["scale"], given["mask"]) == (form, causal, 0.3, None)
    assert given["max_q"] == given["max_k"] == (0 if form == "efficient" else TOKENS)
    # O, log-sum-exp and the state of the random numbers are those of the forward.
    of_forward = [g.strip_aliases(given[name]) for name in ("out", "lse", "seed", "offset")]
    assert all(node.target is operator.getitem for node in of_forward)
    random = (2, 3) if form == "efficient" else (6, 7)
    assert [node.args[1] for node in of_forward] == [0, 1, *random]
    assert len({node.args[0] for node in of_forward}) == 1
    assert not any(node.args[1] == 3 for node in op.users)


@each_form
def test_what_compilers_are_told_of_the_gradients_is_what_the_own_backward_gives(form: str) -> None:
    found = traced(lambda *x: attend(form, *(each.transpose(1, 2) for each in x)), *heads())
    (op,) = found.attention_ops.values()
    operands = [g.arguments(op)[name].meta["val"] for name in "qkv"]
    with operands[0].fake_mode:
        leaves = [torch.empty_strided(x.shape, x.stride(), requires_grad=True) for x in operands]
        out = attend(form, *leaves)
        own = torch.autograd.grad(out, leaves, torch.empty_like(out))
    assert [x.stride() for x in op.meta["val"]] == [x.stride() for x in own]


@pytest.mark.parametrize("form", ["efficient", "cudnn"])
@pytest.mark.parametrize("keys", [TOKENS, 7])
def test_masks(form: str, keys: int) -> None:
    mask = torch.randn(SAMPLES, 1, TOKENS, keys).expand(-1, HEADS, -1, -1)
    found = traced(lambda q, k, v: attend(form, q, k, v, mask), *heads(keys))
    (op,) = found.attention_ops.values()
    assert g.arguments(op)["mask"].meta["val"].stride(1) == 0


@each_form
def test_grouped_heads_and_other_keys(form: str) -> None:
    (record,) = traced(lambda *x: attend(form, *x), *heads(keys=9, groups=1)).records
    assert (record.rewritten, record.flops_forward) == (True, 2 * PRODUCT * 9 // TOKENS)


@pytest.mark.parametrize("frozen", ["q", "k", "v"])
@each_form
def test_a_gradient_that_is_not_asked_for(form: str, frozen: str) -> None:
    inputs = heads()
    inputs["qkv".index(frozen)].requires_grad_(False)
    assert [record.rewritten for record in traced(lambda *x: attend(form, *x), *inputs).records] == [True]


@each_form
def test_several_in_one_module(form: str) -> None:
    found = traced(lambda q, k, v: attend(form, attend(form, q, k, v), k, v), *heads(keys=7))
    assert [(r.name, r.rewritten, r.call) for r in found.records] == [("core", True, 0), ("core", True, 1)]
    assert len(found.attention_ops) == 2


@each_form
def test_sizes_that_are_not_known_when_it_is_traced(form: str) -> None:
    causal = form != "efficient"
    found = traced(lambda *x: attend(form, *x, is_causal=causal), *heads(), dynamic=True)
    assert [record.rewritten for record in found.records] == [True]


def test_beside_linears() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q = m.qkv(x).view(SAMPLES, TOKENS, HEADS, WIDTH).transpose(1, 2)
        return m.out(attend("flash", q, q, q).transpose(1, 2).flatten(2))

    size = HEADS * WIDTH
    model = Model(forward, qkv=layer(size, size), out=layer(size, size)).float()
    found = trace(model, torch.randn(SAMPLES, TOKENS, size), rtol=1e-5)
    assert {record.kind for record in found.records if record.rewritten} == {"linear", "attention"}
    assert [linear.name for linear in found.linears] == ["qkv", "out"]


REFUSED = {
    "dropout": (
        lambda form, q, k, v: attend(form, q, k, v, dropout_p=1e-9),
        FORMS,
        "it drops probabilities inside the op, which alone can tell which",
    ),
    "causal, other keys": (
        lambda form, q, k, v: attend(form, q, k[:, :, 1:], v[:, :, 1:], is_causal=True),
        ("flash",),
        "its causal mask is aligned to the last key, which is not that of the last query",
    ),
    "a mask that learns": (
        lambda form, q, k, v: attend(form, q, k, v, (q @ k.mT).tanh()),
        ("efficient",),
        "its mask wants a gradient, which takes all rows",
    ),
    "wider values": (
        lambda form, q, k, v: attend(form, q, k, torch.cat([v, v], -1)),
        ("efficient",),
        "its values are not known to be as wide as its keys",
    ),
}


@pytest.mark.parametrize(("name", "form"), [(name, form) for name in REFUSED for form in REFUSED[name][1]])
def test_near_misses_are_named_and_left_alone(
    name: str, form: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(What the ops on CPU give for these is not looked at: some of it they do not know.)"""
    monkeypatch.setattr("tracing.assert_close", lambda *_: None)
    core, _, reason = REFUSED[name]
    found = traced(lambda *x: core(form, *x), *heads())
    (record,) = (r for r in found.records if r.kind == "attention")
    assert (record.name, record.rewritten, record.reason) == ("core", False, reason)
    assert not found.attention_ops
    assert backwards(found) == [f"aten._scaled_dot_product_{form}_attention_backward.default"]


@pytest.mark.parametrize("form", ["efficient", "cudnn"])
def test_a_causal_mask_of_other_keys_begins_at_the_first(form: str) -> None:
    found = traced(lambda *x: attend(form, *x, is_causal=True), *heads(keys=7))
    assert [record.rewritten for record in found.records] == [True]


@each_form
def test_no_gradient(form: str) -> None:
    """Of the attention; there is one of something else."""
    inputs = [x.detach() for x in heads()]
    scale = torch.ones(WIDTH, requires_grad=True)
    (record,) = traced(lambda s, *x: attend(form, *x) * s, scale, *inputs).records
    assert (record.kind, record.rewritten, record.reason) == (
        "attention",
        False,
        "no gradient flows through it",
    )
