"""A linear on a GPU against the same linear on the CPU. Without a GPU the kernels are interpreted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from cuda_linear import (
    INPUTS,
    OUTPUTS,
    SAMPLES,
    TOKENS,
    N,
    OnDevice,
    at,
    batch,
    drawn_as_on_a_gpu,
    nothing_waits,
    ops_are_called,
    written,
)
from torch import Tensor

pytest.importorskip("triton")

from sparse_compile import Reuse, Sample, Schedule, device_linear, sparse_backend
from sparse_compile.clock import Clock
from sparse_compile.device_linear import DeviceLinear
from sparse_compile.kernels import choice, on_device
from sparse_compile.linear_site import LinearSite
from sparse_compile.methods.sample import Draw
from sparse_compile.runtime import NO_TOKEN
from sparse_compile.telemetry import Telemetry

METHODS = {
    "exact": None,
    "reuse": Reuse(0.7),
    "reuse, sample": Reuse(0.6, source="sample", refresh_every=2),
    "reuse, elements": Reuse(0.6, granularity="element"),
    "reuse, most rows": Reuse(0.1),
    "reuse, 3:4": Reuse("3:4"),
    "sample": Sample(0.3),
    "sample, clip": Sample(0.3, clip=1.5),
    "sample dW": Sample(0.3, gradients="weight"),
    "sample dX": Sample(0.3, gradients="input"),
}


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["aten", "triton"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What multiplies, whichever would be faster."""
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: request.param)
    return str(request.param)


@pytest.fixture
def run(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OnDevice]:
    return lambda name="layer": OnDevice(LinearSite(name, seed=1), device, monkeypatch)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("gradients", ["dX dW", "dX", "dW", "dX dWᵀ"])
def test_gradients_are_those_of_the_cpu(
    name: str, gradients: str, kernel: str, run: Callable[..., OnDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_as_on_a_gpu(monkeypatch)
    ours, site = run(), LinearSite("layer", seed=1)
    for step, dead in enumerate((0.4, 0.4, 0.0, 0.9, 1.0)):
        dy, x, w = batch(step, dead)
        options = {"tokens": TOKENS, "phase": at(METHODS[name]), "dw_transposed": "dWᵀ" in gradients}
        operands = (dy, x if "dW" in gradients else None, w if "dX" in gradients else None)
        theirs = written(site.linear_backward(*operands, **options))
        torch.testing.assert_close(ours(*operands, **options), theirs, rtol=1e-4, atol=1e-5)
    assert ours.site.method == site.method
    assert ours.site.kernel in ("aten", kernel)


def test_what_the_device_counted_reaches_the_report(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., OnDevice]
) -> None:
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: "triton")
    ops_are_called(monkeypatch)
    ours = run()
    for step in range(3):
        ours(*batch(step, 0.5), tokens=TOKENS, phase=at(None), dw_transposed=False)
    ours.site.settle()
    done = ours.site.counters
    assert (done.rows, done.rows_zero, done.rows_computed) == (3 * N, 3 * N // 2, 3 * N // 2)
    assert done.flops_backward == done.flops_backward_dense / 2
    ours.site.settle()
    assert done.rows_zero == 3 * N // 2, "what was counted is counted once"


def test_zero_rows_that_are_multiplied_all_the_same_are_not_counted_as_skipped(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., OnDevice]
) -> None:
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: "aten")
    ours = run()
    ours(*batch(0, 0.5), tokens=TOKENS, phase=at(None), dw_transposed=False)
    ours.site.settle()
    assert ours.site.counters.flops_backward == ours.site.counters.flops_backward_dense


def test_zero_rows_are_counted_once_where_one_gradient_is_sampled(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., OnDevice]
) -> None:
    """The norms tell them, and so does what skips them in the other gradient."""
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: "triton")
    ops_are_called(monkeypatch)
    ours = run()
    for step in range(3):
        ours(*batch(step, 0.5), tokens=TOKENS, phase=at(METHODS["sample dW"]), dw_transposed=False)
    ours.site.settle()
    assert ours.site.counters.rows_zero == 3 * N // 2
    assert ours.site.counters.rows_computed == 3 * N // 2


def test_an_adaptive_share_is_of_the_rows_that_are_not_zero(device: torch.device) -> None:
    """Which the device counts; the host hears of it at the next backward."""
    kept, live, drawn = DeviceLinear(), [], []
    for alive, rows in ((5, 8), (3, 8), (7, 8), (6, 6)):
        dy = (torch.arange(rows, device=device) < alive).float().unsqueeze(1)
        live.append(kept.live_before(rows))
        (estimate,) = kept.draw(dy, torch.ones_like(dy), rows, None, Draw("seed"), for_dx=False, share=0.4)
        drawn.append(int(estimate.count))
    assert live == [8, 5, 3, 6]
    assert drawn == [2, 1, 3, 2]


def test_reuse_counts_zero_rows(kernel: str, run: Callable[..., OnDevice]) -> None:
    ours = run()
    for step in range(2):
        ours(*batch(step, 0.5), tokens=TOKENS, phase=at(Reuse(0.7)), dw_transposed=False)
    before = ours.site.counters.rows_zero
    ours.site.settle()
    assert ours.site.counters.rows_zero >= before + N // 2


def test_a_layer_that_costs_nothing_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., OnDevice]
) -> None:
    def never(dy: Tensor) -> None:
        raise AssertionError("it looked")

    monkeypatch.setattr(on_device, "usable", lambda dy: True)
    monkeypatch.setattr(on_device, "live_rows", never)
    ours = run()
    options = {"tokens": TOKENS, "phase": at(None), "dw_transposed": False}
    gradients = ours.site.linear_backward(*(t.to(ours.device) for t in batch(0)), **options)
    dy, x, w = batch(0)
    torch.testing.assert_close(written(gradients), (dy @ w, dy.t() @ x), rtol=1e-4, atol=1e-5)


def test_looks_for_zero_rows_become_rare_where_there_are_none(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., OnDevice]
) -> None:
    looks = []
    look = on_device.live_rows
    monkeypatch.setattr(on_device, "live_rows", lambda dy: looks.append(step) or look(dy))
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: "triton")
    ops_are_called(monkeypatch)
    ours = run()
    for step in range(40):
        ours(*batch(step, 0.0), tokens=TOKENS, phase=at(None), dw_transposed=False)
    assert looks == [0, 2, 6, 14, 30]
    # Once a look sees some, every later backward looks, and skips them.
    for step in range(40, 60):
        ours(*batch(step, 0.5), tokens=TOKENS, phase=at(None), dw_transposed=False)
    assert looks[5:] == [*range(46, 60)]
    assert ours.site.kernel == "triton"


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, of inf · 0
def test_an_overflow_reaches_the_gradients_and_leaves_no_base(run: Callable[..., OnDevice]) -> None:
    ours = run()
    options = {"tokens": TOKENS, "dw_transposed": False}
    for method in (Reuse(0.7), Sample(0.3), None):
        dy, x, w = batch(0)
        dy[0] = torch.inf
        dx, dw = ours(dy, x, w, phase=at(method), **options)
        assert not dx.isfinite().all()
        assert not dw.isfinite().all()
    dx, dw = ours(*batch(1), phase=at(Reuse(0.7)), **options)
    assert dx.isfinite().all()
    assert dw.isfinite().all()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the ops: every linear takes the GPU's path, and Triton's kernels."""
    monkeypatch.setattr(on_device, "usable", lambda dy: True)
    monkeypatch.setattr(device_linear, "WORTH_LOOKING", 0)
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: "triton")
    ops_are_called(monkeypatch)


@pytest.mark.parametrize("gradients", ["dX dW", "dX", "dW"])
@pytest.mark.parametrize("dw_transposed", [False, True])
def test_opcheck(gradients: str, dw_transposed: bool, device: torch.device, as_on_a_gpu: None) -> None:
    """What the kernels return is what compilers were told."""
    dy, x, w = (t.to(device) for t in batch(0))
    operands = (dy, x if "dW" in gradients else None, w if "dX" in gradients else None)
    op = torch.ops.sparse_compile.linear_backward.default
    arguments = (torch.tensor(NO_TOKEN), *operands, 0, TOKENS, dw_transposed)
    # Not the comparison of results: rows that the index does not name hold anything.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, arguments, test_utils=checks)


@pytest.mark.parametrize("name", ["exact", "reuse", "sample"])
def test_training_a_model(name: str, device: torch.device, as_on_a_gpu: None) -> None:
    """Through the whole backend: the report says what multiplied, and how much was skipped."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(INPUTS, 16), torch.nn.Tanh(), torch.nn.Linear(16, OUTPUTS)
    model = torch.nn.Sequential(*layers).to(device)
    backend = sparse_backend(Schedule(linear=METHODS[name]), compiler="aot_eager")
    compiled = torch.compile(model, backend=backend)
    mask = (torch.arange(TOKENS, device=device) < TOKENS // 2).float().unsqueeze(1)
    x = torch.randn(SAMPLES, TOKENS, INPUTS, device=device)
    for _ in range(2):
        model.zero_grad()
        (compiled(x).square() * mask).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
    report = backend.report()
    assert [site.kernel for site in report.sites] == ["triton", "triton"]
    assert report.sites[1].rows_skipped == N, "half of the rows, twice"
    assert f"{name}, triton" in str(report)
    if name == "exact":
        assert report.totals["flops_backward"] == report.totals["flops_backward_dense"] / 2
        model.zero_grad()
        (model(x).square() * mask).sum().backward()
        for ours, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-5)


def test_the_choice_is_the_fastest_and_is_made_once() -> None:
    runs = []

    def candidate(name: str, work: int) -> Callable[[], Tensor]:
        return lambda: runs.append(name) or torch.randn(work, work) @ torch.randn(work, work)

    candidates: Mapping[str, Callable[[], object]] = {
        "aten": candidate("a", 300),
        "triton": candidate("t", 3),
    }
    assert choice.fastest("a key of this test", candidates) == "triton"
    count = len(runs)
    assert choice.fastest("a key of this test", candidates) == "triton"
    assert len(runs) == count, "no run to choose again"
    slower = {"aten": candidate("a", 3), "triton": candidate("t", 300)}
    assert choice.fastest("another key of this test", slower) == "aten"


def test_one_candidate_is_not_timed() -> None:
    def never() -> None:
        raise AssertionError("it ran")

    assert choice.fastest("a third key of this test", {"aten": never}) == "aten"


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: on the CPU there is nothing to wait for"
)
@pytest.mark.parametrize("name", ["exact", "reuse", "sample", "sample, clip"])
def test_nothing_waits_for_the_gpu(
    name: str, kernel: str, run: Callable[..., OnDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = run()
    options = {"tokens": TOKENS, "phase": at(METHODS[name]), "dw_transposed": False}
    operands = [t.cuda() for t in batch(0)]
    monkeypatch.setattr(device_linear, "WORTH_LOOKING", 0)
    for _ in range(3):  # kernels are built, and the base is there
        ours.site.linear_backward(*operands, **options)
    with nothing_waits():
        ours.site.linear_backward(*operands, **options)


@pytest.mark.parametrize("name", ["exact", "reuse", "reuse, elements", "sample, clip", "sample dW"])
def test_what_a_monitor_measures_is_that_of_the_cpu(
    name: str, kernel: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_as_on_a_gpu(monkeypatch)
    clock = Clock(Schedule.exact())
    sites = [LinearSite("layer", seed=1, telemetry=Telemetry(1, clock)) for _ in range(2)]
    ours = OnDevice(sites[0], device, monkeypatch)
    for step in range(4):
        clock.step = step
        for run in (ours, sites[1].linear_backward):
            run(*batch(step), tokens=TOKENS, dw_transposed=False, phase=at(METHODS[name]))
    found, wanted = (site.telemetry.measurements() for site in sites if site.telemetry)
    assert bool(found) == (name != "exact")
    for ours_row, row in zip(found, wanted, strict=True):
        assert (ours_row.step, ours_row.gradient) == (row.step, row.gradient)
        for value in ("cosine", "relative_error", "energy_kept"):
            assert getattr(ours_row, value) == pytest.approx(getattr(row, value), rel=1e-4)


@pytest.mark.parametrize("name", [*METHODS, "reuse, 2:4"])
def test_an_expert_without_tokens(name: str, kernel: str, run: Callable[..., OnDevice]) -> None:
    """Before and after batches in which it has some."""
    ours, method = run(), METHODS.get(name, Reuse("2:4"))
    for step in range(5):
        dy, x, w = batch(step)
        if step % 2 == 0:
            dy, x = dy[:0], x[:0]
        dx, dw = ours(dy, x, w, tokens=TOKENS, phase=at(method), dw_transposed=False)
        assert dx.shape == x.shape
        assert dw.isfinite().all()
        assert bool(dw.any()) == bool(len(dy))
