"""An attention on a GPU against the same on the CPU. Without a GPU the kernels are interpreted, and the fused
ops stand-ins of ``cuda_attention.py``; with one they are PyTorch's own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cuda_attention import (
    FORMS,
    GPU,
    HEADS,
    SAMPLES,
    TOKENS,
    WIDTH,
    attend,
    batch,
    close,
    cuda_attention_on_cpu,  # noqa: F401
    dtype_of,
)
from cuda_linear import drawn_as_on_a_gpu, nothing_waits
from torch import Tensor, nn

pytest.importorskip("triton")

from sparse_compile import Monitor, Reuse, Sample, Schedule, device_attention, sparse_backend
from sparse_compile.attention_site import AttentionSite
from sparse_compile.clock import Clock
from sparse_compile.kernels import attention_cuda, choice, on_device
from sparse_compile.kernels.attention_cuda import CudaFused, Queries
from sparse_compile.runtime import NO_TOKEN
from sparse_compile.telemetry import Telemetry

aten = torch.ops.aten
N = SAMPLES * TOKENS
METHODS = {
    "exact": None,
    "sample": Sample(0.3),
    "sample, clip": Sample(0.3, clip=1.5),
    "reuse": Reuse(0.6),
    "reuse, sample": Reuse(0.7, source="sample", refresh_every=2),
}


@pytest.fixture(autouse=True)
def _drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_as_on_a_gpu(monkeypatch)


each_form = pytest.mark.parametrize("form", FORMS)
pytestmark = pytest.mark.usefixtures(
    "cuda_attention_on_cpu", "sample_however_little_it_saves", "reuse_however_little_it_saves"
)


@pytest.fixture
def sample_however_little_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_compile.methods.attention.sampling_pays", lambda *_, **__: True)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "usable", lambda dy: True)
    monkeypatch.setattr(device_attention, "WORTH_LOOKING", 0)


@pytest.fixture(params=["aten", "triton"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: None) -> str:
    """What computes the rows, whichever would be faster."""
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: request.param)
    return str(request.param)


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: None) -> None:
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: "triton")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("form", "kind"),
    [("flash", "plain"), ("flash", "causal"), ("efficient", "padded"), ("cudnn", "padded, causal")],
)
def test_gradients_are_those_of_the_cpu(
    form: str, name: str, kind: str, kernel: str, device: torch.device
) -> None:
    """Row for row: the same are drawn."""
    ours, site = (AttentionSite("layer", seed=1) for _ in range(2))
    for step, dead in enumerate((0.4, 0.8, 0.1) if "reuse" in name else (0.4, 0.9)):
        found = batch(step, dead, masked="padded" in kind, causal="causal" in kind)
        theirs = site.backward(*found.on_cpu(), method=METHODS[name])
        close(ours.backward(*found.on_device(form, device), method=METHODS[name]), theirs)
    assert ours.method == site.method
    assert ours.kernel == kernel


@pytest.mark.parametrize("name", METHODS)
def test_rows_that_are_all_zero_or_none(name: str, by_triton: None, device: torch.device) -> None:
    ours, site = (AttentionSite("layer", seed=1) for _ in range(2))
    for step, dead in enumerate((1.0, 0.0, 1.0)):
        found = batch(step, dead)
        theirs = site.backward(*found.on_cpu(), method=METHODS[name])
        close(ours.backward(*found.on_device("efficient", device), method=METHODS[name]), theirs)


def test_a_sample_that_keeps_all_is_exact(by_triton: None, device: torch.device) -> None:
    site = AttentionSite("layer")
    close(
        site.backward(*batch().on_device("efficient", device), method=Sample(1.0)),
        AttentionSite("layer").backward(*batch().on_cpu(), method=None),
    )
    assert site.method == "exact"


@each_form
def test_some_rows_come_in_the_layout_of_all(form: str, device: torch.device, as_on_a_gpu: None) -> None:
    do, forward = batch().on_device(form, device)
    live = torch.rand(SAMPLES, TOKENS, device=device) < 0.5
    some = forward.backward_of_queries(do, Queries(live, None, 0.5))
    assert [x.stride() for x in some] == [x.stride() for x in forward.backward(do)]
    assert not some[0].transpose(1, 2)[~live].any()


@each_form
@pytest.mark.parametrize("left_alone", [None, "excluded"])
def test_where_nothing_is_skipped_the_gradients_are_the_own_backwards_to_the_bit(
    form: str, left_alone: str | None, device: torch.device, as_on_a_gpu: None
) -> None:
    do, forward = batch(dead=0.0).on_device(form, device)
    site = AttentionSite("layer", left_alone=left_alone)
    for ours, own in zip(site.backward(do, forward, method=None), forward.backward(do), strict=True):
        assert torch.equal(ours, own)
    assert site.method == ("dense" if left_alone else "exact")
    assert site.counters.rows_computed == N


def test_the_efficient_op_gets_both_in_its_own_layout(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    do, forward = batch().on_device("efficient", device)
    apart = dataclasses.replace(forward, out=forward.out.contiguous())
    seen: list[Tensor] = []

    class Spy:
        @staticmethod
        def _scaled_dot_product_efficient_attention_backward(do: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.extend([do, args[4]])
            return aten._scaled_dot_product_efficient_attention_backward(do, *args, **kwargs)

    monkeypatch.setattr(attention_cuda, "aten", Spy)
    apart.backward(do.contiguous())
    assert len(seen) == 2
    assert all(x.transpose(1, 2).is_contiguous() for x in seen)


def test_what_the_device_counted_reaches_the_report(by_triton: None, device: torch.device) -> None:
    site = AttentionSite("layer")
    for step in range(3):
        site.backward(*batch(step, 0.5).on_device("efficient", device), method=None)
    site.settle()
    done = site.counters
    assert (done.rows, done.rows_zero, done.rows_computed) == (3 * N, 3 * N // 2, 3 * N // 2)
    assert done.flops_backward == done.flops_backward_dense / 2
    site.settle()
    assert done.rows_zero == 3 * N // 2, "what was counted is counted once"


def test_what_is_drawn_is_counted(kernel: str, device: torch.device) -> None:
    site = AttentionSite("layer")
    site.backward(*batch(0, 0.5).on_device("efficient", device), method=Sample(0.3))
    site.settle()
    done = site.counters
    assert done.rows_zero == N // 2
    assert done.rows_computed == (round(0.3 * N) if kernel == "triton" else N)


def test_heads_that_the_kernel_cannot_hold_are_left_to_the_own_backward(
    by_triton: None, device: torch.device
) -> None:
    q = torch.randn(1, 1, 4, 136, device=device)
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(q, q, q, None, True)
    forward = CudaFused("efficient", q, q, q, out, lse, False, None, None, (None, None, 0, 0, seed, offset))
    do = torch.zeros_like(q)
    do[:, :, 1] = 1
    for method in (None, Sample(0.5)):
        site = AttentionSite("layer")
        found = site.backward(do, forward, method=method)
        assert site.kernel == "aten"
        assert all(torch.allclose(x, y) for x, y in zip(found, forward.backward(do), strict=True))


def test_an_attention_that_costs_nothing_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    def never(do: Tensor) -> None:
        raise AssertionError("it looked")

    monkeypatch.setattr(on_device, "usable", lambda dy: True)
    monkeypatch.setattr(on_device, "live_queries", never)
    found = batch()
    close(
        AttentionSite("layer").backward(*found.on_device("efficient", device), method=None),
        AttentionSite("layer").backward(*found.on_cpu(), method=None),
    )


def test_looks_for_zero_rows_become_rare_where_there_are_none(
    monkeypatch: pytest.MonkeyPatch, by_triton: None, device: torch.device
) -> None:
    looks, look = [], on_device.live_queries
    monkeypatch.setattr(on_device, "live_queries", lambda do: looks.append(step) or look(do))
    site, none, some = AttentionSite("layer"), batch(dead=0.0), batch(dead=0.5)
    for step in range(20):
        site.backward(*(none if step < 10 else some).on_device("efficient", device), method=None)
    assert looks == [0, 2, 6, *range(14, 20)]
    assert site.kernel == "triton"


@pytest.mark.parametrize("apart", [False, True])
def test_live_queries(apart: bool, device: torch.device) -> None:
    """In whichever order dO lies in memory."""
    do = batch(dead=0.6).do.to(device)
    do[0, 1, 2] = 0
    do[0, 0, 2, 3] = 1e-30
    live = on_device.live_queries(do.contiguous() if apart else do)
    assert torch.equal(live, (do != 0).any(3).any(1))


@pytest.mark.parametrize("method", [Reuse(0.9, granularity="element"), Reuse("2:4")])
def test_reuse_of_single_entries_is_exact_and_the_report_says_so(
    method: Reuse, kernel: str, device: torch.device
) -> None:
    site, found = AttentionSite("layer"), batch()
    for _ in range(2):
        ours = site.backward(*found.on_device("efficient", device), method=method)
        close(ours, AttentionSite("layer").backward(*found.on_cpu(), method=None))
    phase = Schedule(attention=method).at(0)
    assert (site.method, site.keep(phase)) == ("exact", 1.0)
    assert site.note(phase) == (
        "on a GPU attention computes whole rows alone, by Triton: only zero rows are skipped"
    )


def test_reuse_without_a_kernel_is_exact(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "usable", lambda dy: False)
    site, found = AttentionSite("layer"), batch()
    for _ in range(2):
        ours = site.backward(*found.on_device("efficient", device), method=Reuse(0.9))
        close(ours, AttentionSite("layer").backward(*found.on_cpu(), method=None))
    assert (site.method, site.kernel) == ("exact", "aten")


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, of inf · 0
def test_an_overflow_reaches_the_gradients_and_leaves_no_means(kernel: str, device: torch.device) -> None:
    for method in (None, Sample(0.3), Reuse(0.6)):
        found = batch(dead=0.4)
        found.do[1, 0, 3, 2] = torch.inf
        site = AttentionSite("layer")
        gradients = site.backward(*found.on_device("efficient", device), method=method)
        assert not all(x.isfinite().all() for x in gradients)
        # And leaves nothing that would be reused.
        gradients = site.backward(*batch().on_device("efficient", device), method=method)
        assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("name", ["sample", "reuse"])
def test_what_a_monitor_measures_is_that_of_the_cpu(name: str, kernel: str, device: torch.device) -> None:
    clock = Clock(Schedule.exact())
    ours, site = (AttentionSite("layer", seed=1, telemetry=Telemetry(1, clock)) for _ in range(2))
    for step in range(3):
        clock.step = step
        ours.backward(*batch(step).on_device("efficient", device), method=METHODS[name])
        site.backward(*batch(step).on_cpu(), method=METHODS[name])
    found, wanted = (each.telemetry.measurements() for each in (ours, site) if each.telemetry)
    assert len(found) == (9 if name == "sample" else 6)
    for row, theirs in zip(found, wanted, strict=True):
        assert (row.step, row.gradient) == (theirs.step, theirs.gradient)
        for value in ("cosine", "relative_error", "energy_kept"):
            assert getattr(row, value) == pytest.approx(getattr(theirs, value), rel=1e-3)


@pytest.mark.parametrize("name", ["sample", "reuse, sample"])
def test_a_resumed_run_goes_on_as_the_other_would_have(
    name: str, by_triton: None, device: torch.device
) -> None:
    first, second = (AttentionSite("layer", seed=1) for _ in range(2))
    operands = batch().on_device("efficient", device)
    first.backward(*operands, method=METHODS[name])
    second.load_state_dict(first.state_dict())
    pairs = zip(*(site.backward(*operands, method=METHODS[name]) for site in (first, second)), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(("form", "masked"), [("flash", False), ("efficient", True), ("cudnn", False)])
def test_opcheck(form: str, masked: bool, device: torch.device, by_triton: None) -> None:
    """What the kernels return is what compilers were told."""
    do, f = batch(masked=masked).on_device(form, device)
    arguments = (do, f.q, f.k, f.v, f.out, f.lse, f.causal, f.mask, f.scale, *f.rest)
    op = torch.ops.sparse_compile.cuda_attention_backward.default
    torch.library.opcheck(op, (torch.tensor(NO_TOKEN), 0, form, *arguments))
    assert torch.Tag.cudagraph_unsafe in op.tags


class Attention(nn.Module):
    """[B, T, 16] to the same."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self._form = form

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).view(*x.shape[:2], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        return self.out(attend(self._form, *heads, is_causal=True).transpose(1, 2).flatten(2))


@each_form
@pytest.mark.parametrize("name", ["exact", "sample", "reuse"])
def test_training_a_model(form: str, name: str, device: torch.device, by_triton: None) -> None:
    """Through the whole backend: the report says what computed the rows, and how many were skipped."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(form), nn.Tanh(), Attention(form)).to(device, dtype_of(form))
    schedule = Schedule(attention=METHODS[name])
    backend = sparse_backend(schedule, compiler="aot_eager", monitor=Monitor(every=1))
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(SAMPLES, TOKENS, 16, device=device, dtype=dtype_of(form))
    first_half = (torch.arange(TOKENS, device=device) < TOKENS // 2).to(x.dtype).unsqueeze(1)
    for _ in range(2):
        model.zero_grad()
        (compiled(x).square() * first_half).sum().backward()
        gradients = tuple(p.grad.clone() for p in model.parameters())
    report = backend.report()
    sites = [site for site in report.sites if site.kind == "attention"]
    assert [(site.method, site.kernel) for site in sites] == [(name, "triton")] * 2
    assert f"{name}, triton" in str(report)
    # Causal, and nothing reads the second half: its rows are zero in both layers.
    first, second = (site.rows_skipped for site in sites)
    assert second == N, "half of the rows, twice"
    assert first == N if name == "exact" else first >= N  # nor what comes after the last that was drawn
    if name == "exact":
        assert all(site.flops_backward == site.flops_backward_dense / 2 for site in sites)
        model.zero_grad()
        (model(x).square() * first_half).sum().backward()
        close(gradients, tuple(p.grad.cpu() for p in model.parameters()))


@pytest.mark.skipif(not GPU, reason="needs a GPU: on the CPU there is nothing to wait for")
@pytest.mark.parametrize("name", METHODS)
def test_nothing_waits_for_the_gpu(name: str, kernel: str, device: torch.device) -> None:
    site, operands = AttentionSite("layer"), batch().on_device("efficient", device)
    for _ in range(3):  # kernels are built
        site.backward(*operands, method=METHODS[name])
    with nothing_waits():
        site.backward(*operands, method=METHODS[name])
