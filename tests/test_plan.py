"""Ops that are recorded into CUDA graphs against those that are called, on the same batches. Without a GPU
the kernels are interpreted, and every step runs as the one that would be recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sparse_compile.passes import forward
from torch import Tensor, nn

pytest.importorskip("triton")

from sparse_compile import (
    Reuse,
    Sample,
    Schedule,
    SparseBackend,
    compilers,
    device_linear,
    planned_linear,
    sparse_backend,
)
from sparse_compile.kernels import choice, on_device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SAMPLES, TOKENS, WIDTH = 4, 6, 8
STEPS = 6

SCHEDULES = {
    "exact": Schedule.exact(),
    "sample": Schedule(linear=Sample(0.3)),
    "sample, clip": Schedule(linear=Sample(0.3, clip=1.5)),
    "sample dW": Schedule(linear=Sample(0.3, gradients="weight")),
    "sample dX": Schedule(linear=Sample(0.3, gradients="input")),
    "reuse": Schedule(linear=Reuse(0.6)),
    "reuse, sample": Schedule(linear=Reuse(0.6, source="sample")),
    "reuse, every 3rd": Schedule(linear=Reuse(0.6, refresh_every=3)),
    "blocks": Schedule(blocks=Sample(0.3)),
    "left alone": Schedule(linear=Sample(0.3), exclude=["layers.0.*"]),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return y


class Net(nn.Module):
    """Two blocks; the loss is of the tokens with a label."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=-100)


def net() -> Net:
    torch.manual_seed(3)
    return Net().to(DEVICE)


def batch(
    samples: int = SAMPLES, tokens: int = TOKENS, alive: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """X, and labels of the first ``alive`` tokens of each sample."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, tokens, WIDTH, generator=generator)
    labels = torch.randint(3, (samples, tokens), generator=generator)
    labels[:, alive:] = -100
    return x.to(DEVICE), labels.to(DEVICE)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_CPU", ())
    monkeypatch.setattr(forward, "_GPU", ("cpu", "cuda"))
    monkeypatch.setattr(forward, "_WORTH_ASKING", 0)
    monkeypatch.setattr(on_device, "usable", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr(on_device, "available", lambda device: True)
    monkeypatch.setattr(device_linear, "WORTH_LOOKING", 0)
    monkeypatch.setattr(planned_linear, "WORTH_LOOKING", 0)
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: list(candidates)[-1])


def backend_of(schedule: Schedule, monkeypatch: pytest.MonkeyPatch, *, planned: bool) -> SparseBackend:
    monkeypatch.setattr(compilers, "records", lambda patches: planned)
    torch.manual_seed(5)  # of what it draws
    return sparse_backend(schedule, compiler="aot_eager", debug=True)


def step(run: Any, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The gradients of one step, in which no weight changes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    optimizer.zero_grad()
    run(*inputs).backward()
    optimizer.step()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def train(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch, *, planned: bool, steps: int = STEPS
) -> tuple[list[list[Tensor]], SparseBackend]:
    """The gradients of each step on one batch."""
    model = net()
    backend = backend_of(schedule, monkeypatch, planned=planned)
    run = torch.compile(model, backend=backend)
    found = [step(run, model, batch()) for _ in range(steps)]
    after = backend.graphs[-1].after
    assert ("prepare_backward" in after) == planned
    assert ("planned" in after) == planned
    torch._dynamo.reset()
    return found, backend


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_are_those_of_ops_that_are_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, backend = train(SCHEDULES[name], monkeypatch, planned=True)
    theirs, other = train(SCHEDULES[name], monkeypatch, planned=False)
    # What is reused is remembered a step later: where it has to be, is not known before.
    late = 1 if "reuse" in name else 0
    for mine, their in zip(ours[late:], theirs, strict=False):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-7)
    for mine, their in zip(backend.report().sites, other.report().sites, strict=True):
        assert (mine.name, mine.method, mine.keep) == (their.name, their.method, their.keep)
        if not late:
            assert mine.flops_backward == pytest.approx(their.flops_backward, rel=0.2)
