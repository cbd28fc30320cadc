"""A model that is moved while it trains: what was kept for one GPU is not used elsewhere, nor lost."""

from __future__ import annotations

import cuda_attention
import pytest
import torch
from cuda_attention import cuda_attention_on_cpu  # noqa: F401
from cuda_linear import TOKENS, N, at, batch, drawn_as_on_a_gpu, written

pytest.importorskip("triton")

from sparse_compile import Reuse, Sample, device_attention, device_linear
from sparse_compile.attention_site import AttentionSite
from sparse_compile.device_attention import DeviceAttention
from sparse_compile.device_linear import DeviceLinear
from sparse_compile.kernels import choice, on_device, triton
from sparse_compile.linear_site import LinearSite
from sparse_compile.tally import Tally

GPU = torch.cuda.is_available()


pytestmark = pytest.mark.usefixtures("cuda_attention_on_cpu")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton, in every dtype that it knows."""
    if not GPU:
        monkeypatch.setattr(on_device, "usable", lambda dy: dy.dtype in triton.DTYPES)
    monkeypatch.setattr(device_linear, "WORTH_LOOKING", 0)
    monkeypatch.setattr(device_attention, "WORTH_LOOKING", 0)
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: "triton")


@pytest.mark.parametrize("method", [None, Reuse(0.7), Sample(0.3), Sample(0.3, gradients="weight")])
def test_double_and_back(method: Reuse | Sample | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton knows no float64: the products are those of a site that was never on a GPU."""
    drawn_as_on_a_gpu(monkeypatch)
    moved, site = LinearSite("layer", seed=1), LinearSite("layer", seed=1)
    options = {"tokens": TOKENS, "phase": at(method), "dw_transposed": False}
    kernels = []
    for step, dtype in enumerate((torch.float32, torch.float64, torch.float32)):
        there = [t.to("cuda" if GPU and dtype == torch.float32 else "cpu", dtype) for t in batch(step, 0.5)]
        found = written(moved.linear_backward(*there, **options))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(on_device, "usable", lambda dy: False)
            theirs = site.linear_backward(*(t.to(dtype) for t in batch(step, 0.5)), **options)
        torch.testing.assert_close(found, written(theirs), rtol=1e-4, atol=1e-5)
        kernels.append(moved.kernel)
    assert kernels == ["triton", "", "triton"]
    before = moved.counters.rows_zero
    assert before >= (0 if isinstance(method, Reuse) else N // 2), "what was counted before it moved"
    moved.settle()
    assert moved.counters.rows_zero >= before + N // 2, "and after"


def test_what_was_counted_is_settled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not mixed with what another device counts, whose tensors cannot be added."""
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    forward = cuda_attention.batch().on_device("efficient", torch.device("cuda" if GPU else "cpu"))[1]
    settled: list[bool] = []

    class Gradient:
        dtype = torch.float32

        def __init__(self, device: torch.device) -> None:
            self.device = device

    monkeypatch.setattr(on_device, "usable", lambda dy: dy.device.type == "cuda")
    for of in (
        lambda dy, last: DeviceLinear.of(dy, last, lambda: settled.append(True)),
        lambda dy, last: DeviceAttention.of(dy, forward, last, lambda: settled.append(True)),
    ):
        settled.clear()
        first = of(Gradient(here), None)
        assert of(Gradient(here), first) is first
        assert not settled
        second = of(Gradient(there), first)
        assert second is not first
        assert settled == [True]
        assert of(Gradient(there), second) is second
    assert DeviceLinear.of(Gradient(torch.device("cpu")), second, lambda: None) is None
    assert DeviceAttention.of(Gradient(here), "a forward of the CPU", second, lambda: None) is None


def test_an_attention_that_has_left_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuse of single entries has no kernel on a GPU; on the CPU it is done again."""
    method = Reuse(0.5, granularity="element")
    site = AttentionSite("layer", seed=1)
    device = torch.device("cuda" if GPU else "cpu")
    site.backward(*cuda_attention.batch(0, 0.5).on_device("efficient", device), method=method)
    assert (site.method, site.kernel) == ("exact", "triton")
    for step in range(2):
        site.backward(*cuda_attention.batch(step, 0.5).on_cpu(), method=method)
    assert (site.method, site.kernel) == ("reuse", "")
    site.settle()
    rows = site.counters.rows // 3
    assert site.counters.rows_zero == rows // 2, "of the first, whose tally was on the device"


def test_each_device_has_its_own_sums() -> None:
    tally, other = Tally(), torch.device("cuda" if GPU else "meta")
    tally.on(torch.device("cpu"))[0] += 3
    assert tally.on(other).device.type == other.type
    assert tally.on(torch.device("cpu")).tolist() == [3, 0, 0]
    if GPU:
        tally.on(other)[0] += 4
        assert tally.settle() == (7, 0, 0)
        assert tally.settle() == (0, 0, 0)
