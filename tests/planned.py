"""A small model in training whose ops are planned, as for CUDA graphs; see ``sparse_compile/plan.py``."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_attention import attend
from sparse_compile.passes import forward
from torch import Tensor, nn

from sparse_compile import (
    Monitor,
    Reuse,
    Sample,
    Schedule,
    SparseBackend,
    device_attention,
    device_linear,
    plan,
    planned_attention,
    planned_linear,
    replay,
    sparse_backend,
)
from sparse_compile.kernels import choice, on_device
from sparse_compile.planned_block import PlannedBlock
from sparse_compile.planned_linear import PlannedLinear
from sparse_compile.planner import Planner

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SAMPLES, TOKENS, WIDTH = 3, 6, 16
STEPS = 4

SCHEDULES = {
    "exact": Schedule.exact(),
    "sample": Schedule(linear=Sample(0.3), attention=Sample(0.4)),
    "sample, clip": Schedule(linear=Sample(0.3, clip=1.5)),
    "sample dW": Schedule(linear=Sample(0.3, gradients="weight")),
    "sample dX": Schedule(linear=Sample(0.3, gradients="input")),
    "reuse": Schedule(linear=Reuse(0.6), attention=Reuse(0.6)),
    "reuse, sample": Schedule(linear=Reuse(0.6, source="sample"), attention=Reuse(0.6, source="sample")),
    "reuse, every 3rd": Schedule(linear=Reuse(0.6, refresh_every=3)),
    "blocks": Schedule(blocks=Sample(0.3)),
    "left alone": Schedule(linear=Sample(0.3), exclude=["layers.0.*"]),
}

LINEARS = Schedule(linear=Reuse(0.6))


class Block(nn.Module):
    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH) if attends else None
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.qkv is not None:
            q, k, v = self.qkv(x).unflatten(2, (3, 1, -1)).permute(2, 0, 3, 1, 4)
            x = x + attend("efficient", q, k, v).transpose(1, 2).flatten(2)
        y: Tensor = x + nn.functional.gelu(self.mix(x))
        return y


class Net(nn.Module):
    """Two blocks, of which the second may attend; the loss is of the tokens with a label."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(attends=False), Block(attends)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=-100)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In which a CPU is taken for a GPU, with kernels for everything."""
    monkeypatch.setattr(forward, "_CPU", ())
    monkeypatch.setattr(forward, "_GPU", ("cpu", "cuda"))
    monkeypatch.setattr(forward, "_WORTH_ASKING", 0)
    monkeypatch.setattr(on_device, "usable", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr(on_device, "available", lambda device: True)
    monkeypatch.setattr(device_linear, "WORTH_LOOKING", 0)
    monkeypatch.setattr(planned_linear, "WORTH_LOOKING", 0)
    monkeypatch.setattr(planned_attention, "WORTH_LOOKING", 0)
    monkeypatch.setattr(device_attention, "WORTH_LOOKING", 0)
    monkeypatch.setattr(replay, "_PROGRAMS", math.inf)  # or the host would be found too slow for small layers
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: list(candidates)[-1])


Batch = tuple[Tensor, Tensor]


def batch(samples: int = SAMPLES, tokens: int = TOKENS, alive: int = 4, seed: int = 0) -> Batch:
    """X, and labels of the first ``alive`` tokens of each sample."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, tokens, WIDTH, generator=generator)
    labels = torch.randint(3, (samples, tokens), generator=generator)
    labels[:, alive:] = -100
    return x.to(DEVICE), labels.to(DEVICE)


class Run:
    """A model in training under a schedule, as if on a GPU; no weight changes."""

    def __init__(
        self,
        schedule: Schedule,
        monkeypatch: pytest.MonkeyPatch,
        *,
        planned: bool = True,
        compiler: str = "aot_eager",
        mode: str | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        torch.manual_seed(3)
        self.model = Net(attends=schedule.attention is not None).to(DEVICE)
        torch.manual_seed(5)  # of what it draws
        self.backend = sparse_backend(schedule, compiler=compiler, debug=True, monitor=monitor)
        self._monkeypatch, self._planned, self._mode = monkeypatch, planned, mode
        self._run = torch.compile(self.model, backend=self.backend, mode=mode)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0)

    def __call__(self, *batches: Batch, overflows: bool = False) -> list[Tensor]:
        """The gradients of one step; one that overflows is not taken, as by a GradScaler."""
        with self._monkeypatch.context() as patch:
            if not self._planned:
                patch.setattr(SparseBackend, "_planned_calls", lambda *_: None)
            self._optimizer.zero_grad()
            sum(self._run(*each) for each in batches or (batch(),)).backward()  # type: ignore[union-attr]
            if not overflows:
                self._optimizer.step()
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def loss(self, one: Batch) -> Tensor:
        """Of the model as it is compiled."""
        return self._run(*one)  # type: ignore[no-any-return]

    def counted_in_a_step(self, *batches: Batch) -> dict[str, dict[str, int]]:
        """What one more step adds to the counters of each site."""
        before = self._counters()
        self(*batches)
        after = self._counters()
        return {
            name: {what: n - before[name][what] for what, n in found.items()} for name, found in after.items()
        }

    def _counters(self) -> dict[str, dict[str, int]]:
        sites = self.backend._runtime.sites
        for site in sites.values():
            site.settle()
        return {name: dataclasses.asdict(site.counters) for name, site in sites.items()}

    def plan_of_a_step(self, *batches: Batch) -> plan.Plan:
        """What one more step does."""
        made: list[plan.Plan] = []
        with self._monkeypatch.context() as patch:
            begin = Planner.begin
            patch.setattr(Planner, "begin", staticmethod(lambda plan: (made.append(plan), begin(plan))))
            self(*batches)
        return made[0]

    @property
    def plans(self) -> list[plan.Plan]:
        """In the order in which they were made."""
        cases = [case for graph in self.backend._runtime._graphs for case in graph.planner._cases.values()]
        return [each for case in cases for each in case.plans.values()]


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@contextlib.contextmanager
def replaying(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In which no planned op launches anything: what it returns is that of no rows."""

    def nothing(
        site: Any, plan: Any, number: int, numbers: Tensor, first: Tensor, *rest: Any, **_: Any
    ) -> Any:
        if isinstance(site, PlannedBlock):
            return torch.ones_like(first)
        x, w = rest
        dx = None if w is None else (first.new_zeros(len(first), w.shape[1]), None)
        return dx, None if x is None else first.new_zeros(first.shape[1], x.shape[1])

    with monkeypatch.context() as patch:
        patch.setattr(PlannedLinear, "launch", nothing)
        patch.setattr(PlannedBlock, "launch", nothing)
        yield
