"""Training with pruned activations: gradients against eager code, and what is really saved."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from pruned import HEADS, HIDDEN, Block
from torch import Tensor, nn

from sparse_compile import PruneSaved, Reuse, Schedule, SparseBackend, sparse_backend
from sparse_compile.methods import prune

BATCH, TOKENS = 4, 8  # one activation has 1024 entries, the fewest that are packed
FORMS = {
    "chain": {"attention": "chain"},
    "fused": {"attention": "fused"},
    "silu": {"activation": "silu"},
    "relu": {"activation": "relu"},
}


def block(**options) -> Block:
    torch.manual_seed(0)
    return Block(**options).double()


def compiled(
    model: nn.Module, schedule: Schedule, compiler: str = "aot_eager"
) -> tuple[nn.Module, SparseBackend]:
    backend = sparse_backend(schedule, compiler=compiler)
    return torch.compile(model, backend=backend), backend  # type: ignore[return-value]


def gradients(run, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x.grad = None
    torch.manual_seed(1)
    y = run(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {**found, "x": x.grad.clone()}


def batch(tokens: int = TOKENS) -> Tensor:
    return torch.randn(
        BATCH, tokens, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    ).requires_grad_()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error, largest = float((found[name] - value).abs().max()), float(value.abs().max())
        assert error <= rtol * largest + 1e-12, f"{name}: off by {error:.1e} of {largest:.1e}"


def saved_by(loss: Tensor, model: nn.Module, *inputs: Tensor) -> dict[tuple[str, tuple[int, ...]], int]:
    """What a compiled forward really saved, parameters and inputs aside: bytes by storage."""
    node, seen = loss.grad_fn, set()
    while node is not None and not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    held = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *inputs]}
    total: dict[tuple[str, tuple[int, ...]], int] = {}
    for tensor in node.saved_tensors:  # type: ignore[union-attr]
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held | seen:
            seen.add(storage.data_ptr())
            key = (str(tensor.dtype), tuple(tensor.shape))
            total[key] = total.get(key, 0) + storage.nbytes()
    return total


@pytest.mark.parametrize("ratio", [0.5, 0.9])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_formula(form, ratio):
    model, x = block(**FORMS[form]), batch()
    expected = gradients(lambda x: model.pruned(x, ratio), model, x)
    dense = gradients(model, model, x)
    run, _ = compiled(model, Schedule.back_razor(ratio))
    assert_close(gradients(run, model, x), expected)
    assert not torch.allclose(expected["down.weight"], dense["down.weight"], rtol=1e-2)


@pytest.mark.parametrize("ratio", [0.5, 0.9])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_not_as_published_are_those_of_the_formula(form, ratio):
    model, x = block(**FORMS[form]), batch(tokens=16)
    expected = gradients(lambda x: model.pruned(x, ratio, published=False, center=True), model, x)
    plain = gradients(lambda x: model.pruned(x, ratio), model, x)
    run, backend = compiled(model, Schedule(saved_activations=PruneSaved(ratio)))
    assert_close(gradients(run, model, x), expected)
    assert not torch.allclose(expected["q.weight"], plain["q.weight"], rtol=1e-2)
    by_kind = {kind.kind: kind for kind in backend.report().saved}
    # A bit for each entry, the kept values, a mean of 32 features for each sample, and a byte a row.
    pruned = BATCH * (16 * HIDDEN // 8 + 8 * prune.count(1 - ratio, 16 * HIDDEN) + 8 * HIDDEN + 16)
    # A linear behind a norm reads what is packed for the norm: only `o` is left.
    assert by_kind["norm input"].bytes_packed == 2 * pruned
    if form != "relu":  # there, the output of the activation is twice as wide
        assert by_kind["linear input"].bytes_packed == pruned + BATCH * 16 * (HEADS - 1)  # rows of a head
    if form == "fused":
        assert by_kind["attention"].bytes_packed == 3 * BATCH * 16 * (HIDDEN + 8)  # 8 bits, and a step a row


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("affine", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_the_result_of_a_norm_is_made_again(affine, dtype):
    """With every entry kept, the linear behind the norm has the exact gradient."""
    torch.manual_seed(0)
    layers = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN, **affine), nn.Linear(HIDDEN, HIDDEN)
    model, x = nn.Sequential(*layers).to(dtype), batch().detach().to(dtype).requires_grad_()
    dense = gradients(model, model, x)
    run, backend = compiled(model, Schedule(saved_activations=PruneSaved(1e-9)))
    # In bfloat16 the mean of a row, and with it the middle of the sum, is rounded otherwise.
    assert_close(gradients(run, model, x), dense, rtol=1e-12 if dtype == torch.float64 else 2**-6)
    assert [(kind.kind, kind.tensors) for kind in backend.report().saved] == [("norm input", 1)]


class Norms(nn.Module):
    """Residual blocks, in which a row that is zero stays zero."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.norms = nn.ModuleList(norm(HIDDEN, eps=1e-6) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for norm, linear in zip(self.norms, self.linears, strict=True):
            h = h + linear(norm(h))
        return h


@pytest.mark.parametrize("size", [0.0, 1e-2])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_small_rows_are_not_taken_for_the_mean(norm, size):
    """A norm divides by what a row is: a zero row (padding, before a token with a label) is multiplied by
    1,000, and a mean in its place would be as much too large."""
    torch.manual_seed(0)
    model = Norms(norm).double()
    x = torch.randn(BATCH, 32, HIDDEN, dtype=torch.float64) + torch.randn(HIDDEN, dtype=torch.float64)
    x[1, :2] *= size
    x.requires_grad_()
    dense = gradients(model, model, x)
    run, _ = compiled(model, Schedule(saved_activations=PruneSaved(0.5)))
    for name, gradient in gradients(run, model, x).items():
        assert float(torch.cosine_similarity(gradient.flatten(), dense[name].flatten(), 0)) > 0.9, name
        assert float(gradient.norm()) < 1.1 * float(dense[name].norm()), name


def test_the_formula_holds_with_rows_that_are_small():
    model, x = block(), batch(tokens=16).detach()
    model.embed.bias.data.zero_()
    x = x + torch.randn(HIDDEN, dtype=torch.float64)
    x[0, 3:5], x[1, 7] = 0, 0.1 * x[1, 7]
    x.requires_grad_()
    expected = gradients(lambda x: model.pruned(x, 0.5, published=False, center=True), model, x)
    run, _ = compiled(model, Schedule(saved_activations=PruneSaved(0.5)))
    assert_close(gradients(run, model, x), expected)


def test_means_are_not_taken_off_few_rows():
    """They would be as large as a good part of what is kept."""
    model, x = block(), batch(tokens=15)
    expected = gradients(lambda x: model.pruned(x, 0.9, published=False), model, x)
    run, _ = compiled(model, Schedule(saved_activations=PruneSaved(0.9)))
    assert_close(gradients(run, model, x), expected)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("form", ["chain", "fused"])
def test_statistics_of_many_rows_are_not_pruned(form, norm):
    """The scale of a norm has one entry a row: with 1,024 rows it is as large as an activation."""
    model = block(attention=form)
    if norm == "rms":
        model.first = model.second = nn.RMSNorm(HIDDEN).double()
    x = torch.randn(16, 64, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x.requires_grad_()
    run, backend = compiled(model, Schedule.back_razor(0.5))
    found = gradients(run, model, x)
    if norm == "layer":
        assert_close(found, gradients(lambda x: model.pruned(x, 0.5), model, x))
    else:
        dense = gradients(model, model, x)
        assert float(torch.cosine_similarity(found["x"].flatten(), dense["x"].flatten(), 0)) > 0.9
    saved = {kind["kind"]: kind["tensors"] for kind in backend.report().to_dict()["saved"]}
    # As with few rows; a fused attention saves no probabilities.
    assert saved.pop("attention") == (4 if form == "chain" else 3)
    assert saved == {"activation input": 1, "norm input": 2, "linear input": 3}
    assert all(site.rows_skipped == 0 for site in backend.report().sites)


def test_gradients_with_dropout_are_those_of_the_formula():
    """The mask is the forward's own, kept to the bit."""
    model, x = block(dropout=0.3), batch()
    expected = gradients(lambda x: model.pruned(x, 0.5), model, x)
    run, backend = compiled(model, Schedule.back_razor(0.5))
    assert_close(gradients(run, model, x), expected)
    kinds = {kind["kind"]: kind for kind in backend.report().to_dict()["saved"]}
    assert kinds["mask"] == {"kind": "mask", "tensors": 1, "bytes_dense": 1024, "bytes_packed": 128}


@pytest.mark.parametrize("form", FORMS)
def test_ratio_0_is_exact(form):
    model, x = block(dropout=0.3, **FORMS[form]), batch()
    dense = gradients(torch.compile(model, backend="aot_eager"), model, x)
    run, _ = compiled(model, Schedule.back_razor(0.0))
    assert_close(gradients(run, model, x), dense, rtol=1e-13)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5"])
def test_ratio_0_is_exact_for_real_models(name):
    model, inputs = zoo.make(name, torch.float64)
    dense = zoo.gradients(model, inputs)
    run, _ = compiled(model, Schedule.back_razor(0.0))
    found = zoo.gradients(model, inputs, run)
    for key, value in dense.items():
        if value is not None:
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


def test_report_lists_what_is_saved_by_kind():
    model, x = block(dropout=0.1), batch()
    run, backend = compiled(model, Schedule.back_razor(0.9))
    gradients(run, model, x)
    saved = {kind["kind"]: kind["tensors"] for kind in backend.report().to_dict()["saved"]}
    # Norms read the two residual sums; attention Q, K, V and the probabilities; linears the outputs of two
    # norms and of the attention. GELU's output is computed again.
    assert saved == {"activation input": 1, "norm input": 2, "attention": 4, "linear input": 3, "mask": 1}
    assert "linear input" in str(backend.report())
    assert sparse_backend(Schedule.exact()).report().to_dict()["saved"] == []


@pytest.mark.parametrize("values", ["same", "fp16", "bf16", "int8"])
def test_report_agrees_with_what_is_really_saved(values):
    model, x = block(), batch()
    run, backend = compiled(model, Schedule(saved_activations=PruneSaved(0.9, values)))
    saved = saved_by(run(x), model, x)
    packed = sum(kind.bytes_packed for kind in backend.report().saved)
    # The rest are the means and deviations of two norms, and the token.
    assert sum(saved.values()) == packed + 4 * BATCH * TOKENS * 8 + 32
    entries = {"same": 8, "fp16": 2, "bf16": 2, "int8": 1}[values]
    k = prune.count(0.1, TOKENS * HIDDEN)
    dtype = {"same": "float64", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}[values]
    assert saved[f"torch.{dtype}", (BATCH * k,)] == 7 * BATCH * k * entries


@pytest.mark.parametrize("values", ["fp16", "bf16", "int8"])
def test_narrow_values_are_near_the_whole_ones(values):
    model, x = block(), batch()
    whole = gradients(lambda x: model.pruned(x, 0.5, published=False), model, x)
    run, _ = compiled(model, Schedule(saved_activations=PruneSaved(0.5, values)))
    for name, found in gradients(run, model, x).items():
        assert (found - whole[name]).norm() <= 0.02 * whole[name].norm() + 1e-9, name


def test_an_activation_of_several_readers_is_packed_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.a, self.b = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

        def forward(self, x):
            h = self.embed(x)
            return self.a(h) * 2 + self.b(h.tanh()) + h.mT.mT.exp()

    model, x = Shared().double(), batch()
    run, backend = compiled(model, Schedule.back_razor(0.9))
    run(x).sum().backward()
    assert [record.shape for records in backend._runtime.saved.values() for record in records] == [
        (32, HIDDEN)
    ]


def test_small_tensors_inputs_and_the_loss_are_left():
    model, x = nn.Sequential(nn.Linear(HIDDEN, 31)).double(), batch()
    run, backend = compiled(model, Schedule.back_razor(0.9))
    torch.nn.functional.cross_entropy(
        run(x).flatten(0, 1), torch.zeros(BATCH * TOKENS, dtype=torch.long)
    ).backward()
    assert backend.report().saved == ()


def test_together_with_reuse():
    """dX of a linear is reuse's own, from the whole dY; only what is saved is pruned."""
    model, x = block(), batch()
    run, backend = compiled(model, Schedule(linear=Reuse(0.0), saved_activations=PruneSaved(0.5)))
    expected = gradients(lambda x: model.pruned(x, 0.5, published=False), model, x)
    assert_close(gradients(run, model, x), expected)
    run, backend = compiled(
        copy.deepcopy(model), Schedule(linear=Reuse(0.5), saved_activations=PruneSaved(0.5))
    )
    for _ in range(2):
        run(x).square().sum().backward()
    assert {site.method for site in backend.report().sites if site.kind == "linear"} == {"reuse"}
    assert len(backend.report().saved) == 4


def test_dynamic_shapes():
    model = block()
    backend = sparse_backend(Schedule.back_razor(0.5), compiler="aot_eager")
    run = torch.compile(model, backend=backend, dynamic=True)
    for samples, tokens in ((4, 8), (6, 11), (5, 16)):
        x = torch.randn(samples, tokens, HIDDEN, dtype=torch.float64).requires_grad_()
        assert_close(gradients(run, model, x), gradients(lambda x: model.pruned(x, 0.5), model, x))
    assert len(backend._runtime._graphs) == 1


def test_a_checkpointed_region_is_recomputed_and_not_packed():
    model, x = block(), batch()
    dense = gradients(model, model, x)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    run, backend = compiled(checkpointed, Schedule.back_razor(0.9))
    assert_close(gradients(run, model, x), dense)
    assert backend.report().saved == ()


@pytest.mark.parametrize("budget", [0.0, 0.1, 0.3, 0.7])
def test_with_an_activation_memory_budget(budget):
    model, x = block(), batch()
    expected = gradients(lambda x: model.pruned(x, 0.5), model, x)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        run, _ = compiled(model, Schedule.back_razor(0.5))
        assert_close(gradients(run, model, x), expected)


def test_under_autocast():
    model, x = block().float(), batch().detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = gradients(model, model, x)
        run, backend = compiled(model, Schedule.back_razor(0.0))
        found = gradients(run, model, x)
        # A bias of the keys shifts all scores of a query alike: its true gradient is zero, the rest rounding.
        for each in (found, dense):
            assert each.pop("k.bias").abs().max() < 1e-2
        assert_close(found, dense, rtol=2e-2)
        run, backend = compiled(copy.deepcopy(model), Schedule.back_razor(0.9))
        saved = saved_by(run(x), model, x)
    stored = {dtype for dtype, shape in saved if len(shape) == 1}
    assert "torch.bfloat16" in stored
    assert sum(kind.bytes_packed for kind in backend.report().saved) <= sum(saved.values())


def test_pruned_activations_are_a_sixth_of_what_plain_compile_saves():
    """At BERT-base's proportions; the benchmark measures the real size."""
    model, x = block(attention="fused").float(), batch().detach().float()
    x = torch.randn(BATCH, 64, HIDDEN).requires_grad_()
    plain = torch.compile(model, backend="aot_eager_decomp_partition")
    dense = sum(saved_by(plain(x), model, x).values())
    run, _ = compiled(model, Schedule.back_razor(0.9))
    torch.testing.assert_close(run(x), plain(x))  # the forward is dense
    assert sum(saved_by(run(x), model, x).values()) <= 0.17 * dense


@pytest.mark.parametrize("attention", ["fused", "chain"])
def test_inductor(attention):
    published = attention == "chain"
    model, x = block(attention=attention, dropout=0.0), batch()
    schedule = Schedule(saved_activations=PruneSaved(0.5, as_published=published))
    run, backend = compiled(model, schedule, "inductor")
    expected = gradients(lambda x: model.pruned(x, 0.5, published=published), model, x)
    assert_close(gradients(run, model, x), expected)
    assert (
        sum(saved_by(run(x), model, x).values())
        <= 1.1 * sum(k.bytes_packed for k in backend.report().saved) + 24
    )


def test_a_product_over_tokens():
    """Its input is laid out with the tokens first, so that a group of rows has some of every sample."""
    tokens = 64

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
            self.weight = nn.Parameter(torch.randn(tokens, tokens))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.einsum("ts,bsd->btd", self.weight, self.up(x)))

    model, x = Mixing().double(), batch(tokens)
    run, backend = compiled(model, Schedule(saved_activations=PruneSaved(0.5)))
    found = gradients(run, model, x)
    assert backend.report().saved
    expected = gradients(model, model, x)
    for name in ("x", "down.bias", "up.bias"):  # which no pruned input takes part in
        torch.testing.assert_close(found[name], expected[name])
