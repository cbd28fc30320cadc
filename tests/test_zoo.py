"""Under `exact()` and at ratio 0 every model of the zoo trains as under plain torch.compile.

"Equal" means: to the rounding of the dtype. Zero rows are left out of a sum, so its terms may be added in
another order, and no more than that.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from zoo import ZOO

from sparse_compile import Reuse, Schedule, SparseBackend, sparse_backend

SCHEDULES = {"exact": Schedule.exact(), "ratio 0": Schedule(linear=Reuse(0.0))}

PRODUCT = re.compile(r"= torch\.ops\.aten\.(?:mm|addmm)\.default\(")
OUR_FORWARD = re.compile(r"= torch\.ops\.sparse_compile\.linear_forward\.default\(")
OUR_OP = re.compile(r"= torch\.ops\.sparse_compile\.linear_backward\.default\(")
OUR_ATTENTION = re.compile(r"= torch\.ops\.sparse_compile\.(?:fused_)?attention_backward\.default\(")

Gradients = dict[str, Tensor | None]


@pytest.fixture(autouse=True)
def _skip_whatever_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """In layers as small as the zoo's, gathering the rows that are not zero costs more than it saves."""
    monkeypatch.setattr("sparse_compile.methods.exact.fewest_to_skip", lambda *_, **__: 1)
    monkeypatch.setattr("sparse_compile.methods.exact.fewest_to_skip_in_attention", lambda *_, **__: 0)


@functools.cache
def plain(name: str, dtype: torch.dtype = torch.float32) -> Gradients:
    """The gradients of a model of the zoo under plain `torch.compile`."""
    model, inputs = zoo.make(name, dtype)
    found = zoo.gradients(model, inputs, torch.compile(model, backend="aot_eager"))
    torch._dynamo.reset()
    return found


@functools.cache
def ours(
    name: str, schedule: Schedule, dtype: torch.dtype = torch.float32
) -> tuple[Gradients, SparseBackend]:
    """The gradients under a schedule of ours, and the backend that saw one step."""
    model, inputs = zoo.make(name, dtype)
    backend = sparse_backend(schedule, compiler="aot_eager", debug=True)
    found = zoo.gradients(model, inputs, torch.compile(model, backend=backend))
    torch._dynamo.reset()
    return found, backend


def assert_same_gradients(expected: Gradients, found: Gradients, dtype: torch.dtype = torch.float32) -> None:
    """Every gradient equals the expected one to 100 roundings of its own largest entry, or to one rounding
    of the model's largest.

    The second is for gradients whose true value is zero, so that all of what is computed is rounding: the
    softmax does not see a bias of the keys, which moves all scores of a row alike.
    """
    assert found.keys() == expected.keys()
    assert {k for k, v in found.items() if v is None} == {k for k, v in expected.items() if v is None}
    present = {name: value for name, value in expected.items() if value is not None}
    eps = torch.finfo(dtype).eps
    noise = eps * max(value.abs().max().item() for value in present.values())
    for name, value in present.items():
        gradient = found[name]
        assert gradient is not None
        assert gradient.dtype == value.dtype
        assert gradient.shape == value.shape
        error = (gradient - value).abs().max().item()
        allowed = 100 * eps * value.abs().max().item() + noise
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", ZOO)
def test_gradients_equal_those_of_plain_compile(name: str, schedule: Schedule) -> None:
    found, backend = ours(name, schedule)
    assert_same_gradients(plain(name), found)
    assert_every_linear_is_reported(name, backend)
    assert_every_backward_product_is_ours(name, backend)


def assert_every_linear_is_reported(name: str, backend: SparseBackend) -> None:
    entry, (model, _) = ZOO[name], zoo.make(name)
    linears = [site for site in backend.report().sites if site.kind == "linear"]
    assert sorted(site.name for site in linears) == sorted(zoo.linears(model))
    assert len(linears) == entry.sites
    assert sum(site.rewritten for site in linears) == entry.rewritten
    assert all(site.reason for site in linears if not site.rewritten)
    attentions = [site for site in backend.report().sites if site.kind == "attention"]
    assert len(attentions) == entry.attentions
    assert all(site.calls == 1 for site in attentions)
    biased = [site.name for site in attentions if not site.rewritten]
    assert all(name.endswith("SelfAttention") for name in biased)
    assert len(biased) == (2 if name == "t5" else 0)  # its position bias is learned from dS
    assert {site.reason for site in attentions} <= {
        "",
        "the gradient of its scores or probabilities is used for something else, too",
    }
    assert len(backend.report().sites) == entry.sites + entry.attentions


def assert_every_backward_product_is_ours(name: str, backend: SparseBackend) -> None:
    """One op of ours for each site; the products that remain are the forward's, one for each site too, and
    ours where rows of it are not needed."""
    (graph,) = backend.graphs
    rewritten = ZOO[name].rewritten
    assert len(PRODUCT.findall(graph.before)) > 2 * rewritten
    assert len(PRODUCT.findall(graph.after)) + len(OUR_FORWARD.findall(graph.after)) == rewritten
    assert len(OUR_OP.findall(graph.after)) == rewritten
    attentions = [site for site in backend.report().sites if site.kind == "attention" and site.rewritten]
    assert len(OUR_ATTENTION.findall(graph.after)) == len(attentions)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_gradients_with_eager_attention(name: str) -> None:
    """Chains of products, where ``sdpa`` is a fused op for most of the models."""
    found = []
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager", debug=True)
    for compiler in ("aot_eager", backend):
        model, inputs = zoo.make(name)
        model.set_attn_implementation("eager")  # type: ignore[operator]
        found.append(zoo.gradients(model, inputs, torch.compile(model, backend=compiler)))
        torch._dynamo.reset()
    assert_same_gradients(*found)
    assert_every_linear_is_reported(name, backend)
    assert "fused_attention" not in backend.graphs[0].after


def test_only_the_experts_of_a_mixture_are_not_rewritten() -> None:
    _, backend = ours("mixtral", Schedule.exact())
    reasons = {s.name: s.reason for s in backend.report().sites if s.kind == "linear" and not s.rewritten}
    assert list(reasons) == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]
    assert all(re.search(r"its product is the op .*grouped_mm.*not rewritten", r) for r in reasons.values())


def test_rows_of_padding_are_skipped_in_every_layer() -> None:
    _, backend = ours("bert", Schedule.exact())
    rows, padding = len(zoo.LENGTHS) * max(zoo.LENGTHS), sum(max(zoo.LENGTHS) - n for n in zoo.LENGTHS)
    for site in backend.report().sites:
        assert (site.rows, site.rows_skipped) == (rows, padding)
        if site.kind == "linear":
            assert site.rows_computed == rows - padding
            assert site.flops_backward == pytest.approx(site.flops_backward_dense * (1 - padding / rows))


@pytest.mark.parametrize(("name", "tokens"), [("distilbert", 16), ("vit", 17)])
def test_after_the_last_attention_only_the_row_that_the_head_reads_is_computed(
    name: str, tokens: int
) -> None:
    _, backend = ours(name, Schedule.exact())
    skipped = {
        site.name.rpartition(".")[2]: site.rows_skipped / site.rows
        for site in backend.report().sites
        if site.kind == "linear"
    }
    queries, keys, values, *others = skipped
    assert skipped[keys] == skipped[values] == skipped["classifier"] == 0
    *others, _ = (name for name in others if name != "pre_classifier")
    assert all(skipped[name] == 1 - 1 / tokens for name in (queries, *others))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradients_in_double_precision(name: str) -> None:
    found, _ = ours(name, Schedule.exact(), torch.float64)
    assert_same_gradients(plain(name, torch.float64), found, torch.float64)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [functools.partial(zoo.bert, layers=1), zoo.gpt2], ids=["bert", "gpt2"])
def test_gradients_with_dropout(build: Any, implementation: str) -> None:
    """From one seed the same entries are dropped. (``sdpa`` then is a chain of products, too.)"""
    found = []
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager")
    for compiler in ("aot_eager", backend):
        _, inputs = zoo.make("gpt2" if build is zoo.gpt2 else "bert")
        torch.manual_seed(0)
        model = build(dropout=0.3).train()
        model.set_attn_implementation(implementation)
        torch.manual_seed(1)
        found.append(zoo.gradients(model, inputs, torch.compile(model, backend=compiler)))
        torch._dynamo.reset()
    assert_same_gradients(*found)
    assert [site.rewritten for site in backend.report().sites if site.kind == "attention"] == [True]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradients_under_bf16_autocast(name: str, implementation: str) -> None:
    """Our error against the true gradient is that of plain torch.compile, and one rounding of bf16."""

    def autocast(compiled: nn.Module) -> Any:
        return torch.autocast("cpu", torch.bfloat16)(compiled)

    truth = plain(name)
    model, inputs = zoo.make(name)
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    dense = zoo.gradients(model, inputs, autocast(torch.compile(model, backend="aot_eager")))
    torch._dynamo.reset()
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager", debug=True)
    found = zoo.gradients(model, inputs, autocast(torch.compile(model, backend=backend)))

    assert_every_linear_is_reported(name, backend)
    assert_every_backward_product_is_ours(name, backend)
    eps = torch.finfo(torch.bfloat16).eps
    noise = eps * max(value.abs().max().item() for value in truth.values() if value is not None)
    for key, value in truth.items():
        if value is None:
            assert found[key] is None
            continue
        assert found[key].dtype == dense[key].dtype  # type: ignore[union-attr]
        error, usual = (float((g[key] - value).abs().max()) for g in (found, dense))  # type: ignore[operator]
        assert error <= usual + eps * value.abs().max().item() + noise, key


def test_gradients_under_inductor_with_dropout(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one seed both compilers draw the same masks."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    backend = sparse_backend(Schedule.exact())
    found = []
    for compiler in ("inductor", backend):
        _, inputs = zoo.make("bert")
        torch.manual_seed(0)
        model = zoo.bert(dropout=0.1, layers=1).train()
        torch.manual_seed(1)
        found.append(zoo.gradients(model, inputs, torch.compile(model, backend=compiler)))
        torch._dynamo.reset()
    assert_same_gradients(*found)
    linears = [site for site in backend.report().sites if site.kind == "linear"]
    assert sorted(site.name for site in linears) == sorted(zoo.linears(model))
    assert all(site.rewritten for site in backend.report().sites)
