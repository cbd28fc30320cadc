"""A linear's site on a GPU, or on the CPU as if it were one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparse_compile import Phase, Reuse, Sample, Schedule, SparseBackend, device_linear
from sparse_compile.kernels import linear as aten
from sparse_compile.kernels import on_device
from sparse_compile.linear_site import LinearSite

SAMPLES, TOKENS, INPUTS, OUTPUTS = 4, 6, 10, 9
N = SAMPLES * TOKENS


def batch(step: int, dead: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    """dY, X, W, with a share of dY's rows zero."""
    generator = torch.Generator().manual_seed(step)
    shapes = (N, OUTPUTS), (N, INPUTS), (OUTPUTS, INPUTS)
    dy, x, w = (torch.randn(shape, generator=generator) for shape in shapes)
    dy[torch.randperm(N, generator=generator)[: round(dead * N)]] = 0
    return dy, x, w


def at(method: Reuse | Sample | None) -> Phase:
    """What a schedule says whose linears are done by ``method``."""
    return Schedule(linear=method).at(0)


class OnDevice:
    """Runs a site as on a GPU."""

    def __init__(self, site: LinearSite, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site, self.device, self.monkeypatch = site, device, monkeypatch

    def __call__(
        self, dy: Tensor, x: Tensor | None, w: Tensor | None, **options: object
    ) -> tuple[Tensor | None, Tensor | None]:
        moved = (None if t is None else t.to(self.device) for t in (dy, x, w))
        with self.monkeypatch.context() as patch:
            patch.setattr(on_device, "usable", lambda dy: True)
            patch.setattr(device_linear, "WORTH_LOOKING", 0)
            return written(self.site.linear_backward(*moved, **options))


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """In which an error is raised by what waits for the GPU, which has something to do: by PyTorch's own
    doing, or for a number that has not arrived."""

    def synchronize(event: torch.cuda.Event) -> None:
        assert event.query(), "the host waits for a number"

    torch.cuda.synchronize()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.Event, "synchronize", synchronize)
        torch.cuda._sleep(500_000_000)  # cycles: a quarter of a second
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()


def ops_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a schedule cannot be planned ahead; see ``sparse_compile/plan.py``."""
    monkeypatch.setattr(SparseBackend, "_planned_calls", lambda *_: None)


def written(gradients: tuple[aten.DistinctRows | None, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """dX written out, and dW, on the CPU."""
    dx, dw = gradients
    return None if dx is None else aten.written_out(dx).cpu(), None if dw is None else dw.cpu()


def drawn_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU draws in the order that kernels compute, and from their numbers."""
    from sparse_compile.kernels.triton import reference
    from sparse_compile.methods.sample import Draw

    monkeypatch.setattr(Draw, "order", reference.Numbers.order)
    monkeypatch.setattr(Draw, "start", reference.Numbers.start)
