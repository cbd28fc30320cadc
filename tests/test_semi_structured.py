"""2:4 on a GPU's sparse tensor cores. Without a GPU, all but cuSPARSELt itself: its product is then ATen's,
of a matrix that PyTorch's own packing has seen to be 2:4."""

from __future__ import annotations

import pytest
import torch
from cuda_linear import at, written
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

pytest.importorskip("triton")

from sparse_compile import Reuse, Schedule, sparse_backend
from sparse_compile.kernels import choice, on_device, semi_structured
from sparse_compile.linear_site import LinearSite
from sparse_compile.methods import reuse

SAMPLES, TOKENS, INPUTS, OUTPUTS = 4, 32, 64, 128
N = SAMPLES * TOKENS
ON_GPU = torch.cuda.is_available()


def unpacked_product(pruned: Tensor, dense: Tensor) -> Tensor:
    packed, meta = sparse_semi_structured_from_dense_cutlass(pruned.contiguous())
    again = sparse_semi_structured_to_dense_cutlass(packed, meta)
    assert torch.equal(again, pruned), "more than two of some four are kept"
    return torch.mm(again, dense)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU that takes 2:4, or the CPU standing in for one."""
    if ON_GPU:
        if not torch.backends.cusparselt.is_available():
            pytest.skip("this PyTorch has no cuSPARSELt")
        return torch.device("cuda")
    monkeypatch.setattr(on_device, "usable", lambda dy: True)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(semi_structured, "multiply", unpacked_product)
    return torch.device("cpu")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: "cusparselt")
    return "cusparselt"


def batch(seed: int, dead: float, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """dY [N, O], X [N, I], W [O, I]."""
    generator = torch.Generator().manual_seed(seed)
    dy, x, w = (
        torch.randn(shape, generator=generator) for shape in ((N, OUTPUTS), (N, INPUTS), (OUTPUTS, INPUTS))
    )
    dy[torch.randperm(N, generator=generator)[: round(dead * N)]] = 0
    return [t.to(device, dtype) for t in (dy, x, w)]


@pytest.mark.parametrize("ratio", ["2:4", "1:4"])
@pytest.mark.parametrize("dw_transposed", [False, True])
@pytest.mark.parametrize("dead", [0.0, 0.4, 1.0])
def test_gradients_are_those_of_dense_products(
    ratio: str, dw_transposed: bool, dead: float, device: torch.device, chosen: str
) -> None:
    """Of the same estimate: both sites have seen the same gradients."""
    ours, theirs = LinearSite("layer", seed=1), LinearSite("layer", seed=1)
    options = {"tokens": TOKENS, "phase": at(Reuse(ratio)), "dw_transposed": dw_transposed}
    for step in range(3):
        operands = batch(step, dead if step else 0.0, device, torch.bfloat16)
        found = written(ours.linear_backward(*operands, **options))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choice, "fastest", lambda key, candidates: "aten")
            wanted = written(theirs.linear_backward(*operands, **options))
        for one, other in zip(found, wanted, strict=True):
            # bfloat16 has 8 bits, and the base is added before the product in one and after it in the other.
            scale = other.float().norm() / other.numel() ** 0.5
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(scale) + 1e-30)
    assert (ours.kernel, theirs.kernel) == (chosen, "aten")
    for site in (ours, theirs):
        site.settle()
        assert site.counters.rows_zero == 2 * round(dead * N)


@pytest.mark.parametrize("ratio", ["2:4", "1:4"])
def test_the_estimate_is_that_of_the_cpu(ratio: str, device: torch.device, chosen: str) -> None:
    """Against the formula written for the CPU, in float32 so that no two magnitudes are the same."""
    base = torch.randn(TOKENS, OUTPUTS, device=device)
    dy, _, _ = batch(1, 0.3, device, torch.float32)
    keep = int(ratio[0])
    live = (dy != 0).any(1)
    for estimate, dim in zip(on_device.keep_of_four(dy, base, live, keep), (1, 0), strict=True):
        wanted = reuse.n_of_m(dy.cpu(), base.cpu(), keep, 4, live.cpu(), dim=dim)
        torch.testing.assert_close(estimate.dense().cpu(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "outputs", "dtype"),
    [
        ("3:4", OUTPUTS, torch.bfloat16),
        ("2:8", OUTPUTS, torch.bfloat16),
        ("2:4", 96, torch.bfloat16),
        ("2:4", OUTPUTS, torch.float32),
        (0.5, OUTPUTS, torch.bfloat16),
    ],
)
def test_what_it_does_not_take_is_dense(
    ratio: str | float,
    outputs: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: next(reversed(candidates)))
    site = LinearSite("layer", seed=1)
    for step in range(2):
        dy, x, w = batch(step, 0.0, device, dtype)
        granularity = "row" if isinstance(ratio, str) else "element"
        phase = at(Reuse(ratio, granularity=granularity))
        site.linear_backward(dy[:, :outputs], x, w[:outputs], tokens=TOKENS, phase=phase, dw_transposed=False)
    assert site.kernel == "aten"


def test_the_report_says_what_multiplied(device: torch.device, chosen: str) -> None:
    torch.manual_seed(0)
    layers = torch.nn.Linear(INPUTS, OUTPUTS), torch.nn.Tanh(), torch.nn.Linear(OUTPUTS, INPUTS)
    model = torch.nn.Sequential(*layers).to(device, torch.bfloat16)
    backend = sparse_backend(Schedule(linear=Reuse("2:4")), compiler="aot_eager")
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(SAMPLES, TOKENS, INPUTS, device=device, dtype=torch.bfloat16)
    for _ in range(2):
        compiled(x).square().mean().backward()
    assert [site.kernel for site in backend.report().sites] == [chosen, chosen]
    assert f"reuse, {chosen}" in str(backend.report())


@pytest.mark.skipif(not ON_GPU, reason="needs cuSPARSELt, and so a GPU")
def test_cusparselt_multiplies_what_was_pruned(device: torch.device) -> None:
    dy, x, _ = batch(0, 0.0, device, torch.bfloat16)
    live = torch.ones(N, dtype=torch.bool, device=device)
    base = torch.zeros(TOKENS, OUTPUTS, device=device, dtype=torch.bfloat16)
    _, estimate = on_device.keep_of_four(dy, base, live, 2)
    ours = semi_structured.multiply(estimate.residual, x)
    torch.testing.assert_close(ours, estimate.residual @ x, rtol=2e-2, atol=2e-2)
