"""The end of a block on a GPU against the same on the CPU. Without a GPU the kernels are interpreted."""

from __future__ import annotations

import pytest
import torch
from cuda_linear import drawn_as_on_a_gpu, nothing_waits, ops_are_called
from torch import Tensor

pytest.importorskip("triton")

from sparse_compile import Phase, Sample, Schedule, device_linear, sparse_backend
from sparse_compile.block_site import BlockSite
from sparse_compile.controller import Controller
from sparse_compile.kernels import choice, on_device

SAMPLES = 12
METHODS = {"exact": None, "sample": Sample(0.3), "clip": Sample(0.3, clip=1.5), "all": Sample(1.0)}


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_as_on_a_gpu(monkeypatch)


def squares(step: int, dead: int = 0) -> Tensor:
    """Σ dH² of each sample, some of them zero."""
    found = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(step)).exp()
    found[:dead] = 0
    return found


def at(method: Sample | None) -> Phase:
    return Schedule(blocks=method).at(0)


def both(
    ours: BlockSite, site: BlockSite, found: Tensor, phase: Phase, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The weights of a GPU, and those of a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_device, "usable", lambda _: True)
        weights = ours.weights(found.to(device), phase=phase)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_device, "usable", lambda _: False)
        return weights.cpu(), site.weights(found, phase=phase)


@pytest.mark.parametrize("name", METHODS)
def test_the_samples_that_the_cpu_draws(name: str, device: torch.device) -> None:
    ours, site = (BlockSite("block", seed=3, block=(1, 3)) for _ in range(2))
    for step, dead in enumerate((0, 3, 5)):
        found, wanted = both(ours, site, squares(step, dead), at(METHODS[name]), device)
        torch.testing.assert_close(found, wanted)
        assert ours.method == site.method
    ours.settle()
    assert ours.counters == site.counters
    assert ours.state_dict() == site.state_dict()


def test_no_more_go_on_than_there_are(device: torch.device) -> None:
    ours, site = (BlockSite("block", block=(0, 1)) for _ in range(2))
    for dead in (10, SAMPLES):
        found, wanted = both(ours, site, squares(0, dead), at(Sample(0.5)), device)
        assert torch.equal(found, wanted * (squares(0, dead) != 0))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, of what is not finite
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_gradient(bad: float, device: torch.device) -> None:
    found = squares(0)
    found[7] = bad
    weights, _ = both(BlockSite("a"), BlockSite("b"), found, at(Sample(0.3)), device)
    assert not (weights * found).sum().isfinite()


def test_a_measurement_is_the_hosts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule.vcas(cal_var_freq=2)
    ours, site = (BlockSite("block", controller=Controller(schedule)) for _ in range(2))
    seen: list[Tensor] = []
    monkeypatch.setattr(ours.controller, "observe_samples", lambda name, norms, draw: seen.append(norms))
    found, _ = both(ours, site, squares(0), schedule.at(0), device)
    assert torch.equal(found, torch.ones(SAMPLES))
    assert torch.equal(seen[0], squares(0).sqrt())
    both(ours, site, squares(1), schedule.at(1), device)
    assert len(seen) == 1


def test_training_a_model(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole backend: what is dropped behind a block is skipped in all before it."""
    monkeypatch.setattr(on_device, "usable", lambda _: True)
    monkeypatch.setattr(device_linear, "WORTH_LOOKING", 0)
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: "triton")
    ops_are_called(monkeypatch)
    torch.manual_seed(0)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(8, 8)
            self.norm = torch.nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.up(x)).tanh()

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), Block()])
            self.head = torch.nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    model = Net().to(device)
    backend = sparse_backend(Schedule(blocks=Sample(0.25)), compiler="aot_eager")
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(16, 3, 8, device=device)
    for _ in range(2):
        compiled(x).square().sum().backward()
    sites = {site.name: site for site in backend.report().sites}
    assert sites["blocks.1"].rows_computed == 2 * 8
    assert sites["blocks.0"].rows_computed == 2 * 4
    assert sites["blocks.1.up"].rows_skipped == 2 * 8 * 3
    assert sites["blocks.0.up"].rows_skipped == 2 * 12 * 3
    assert sites["head"].rows_skipped == 0


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: on the CPU there is nothing to wait for"
)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_waits_for_the_gpu(name: str) -> None:
    site, found = BlockSite("block", block=(0, 2)), squares(0).cuda()
    for _ in range(2):
        site.weights(found, phase=at(METHODS[name]))
    with nothing_waits():
        site.weights(found, phase=at(METHODS[name]))
