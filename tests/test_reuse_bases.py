"""Which gradient is reused: never one from before an exact phase, of another width, or of a forward that had
no backward; and what the report says where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_compile import Reuse, Sample, Schedule, SparseBackend, sparse_backend
from sparse_compile.methods.attention import choose_rows

B, T, D = 4, 6, 8


class Training:
    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        self.model = model.double()
        self.backend: SparseBackend = sparse_backend(schedule, compiler="aot_eager")
        self.run: Any = torch.compile(self.model, backend=self.backend)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0)

    def step(self, *inputs: Tensor, steps: bool = True) -> list[str]:
        """One step; the method of each linear in it."""
        self.optimizer.zero_grad()
        self.run(*inputs).square().sum().backward()
        if steps:
            self.optimizer.step()
        return [site.method for site in self.backend.report().sites if site.kind == "linear"]


def x(tokens: int = T, width: int = D, samples: int = B) -> Tensor:
    return torch.randn(samples, tokens, width, dtype=torch.float64)


def attention(core: str) -> nn.Module:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).unsqueeze(1)
            if core == "fused":
                return F.scaled_dot_product_attention(q, q, q)
            return (q @ q.mT).softmax(-1) @ q

    return Attending()


PHASES = [(0.5, 0.0), (0.0, 0.3), (0.5, 0.6)]


def test_no_base_is_older_than_an_exact_phase() -> None:
    training = Training(nn.Linear(D, D), Schedule(linear=Reuse(PHASES), total_steps=10))
    methods = [training.step(x())[0] for _ in range(8)]
    assert methods == ["exact", "reuse", "reuse", *["exact"] * 4, "reuse"]


@pytest.mark.usefixtures("reuse_however_little_it_saves")
@pytest.mark.parametrize("core", ["fused", "chain"])
def test_nor_are_the_means_of_an_attention(core: str) -> None:
    training = Training(attention(core), Schedule(attention=Reuse(PHASES), total_steps=10))
    methods = []
    for _ in range(8):
        training.step(x())
        methods += [site.method for site in training.backend.report().sites if site.kind == "attention"]
    assert methods == ["exact", "reuse", "reuse", *["exact"] * 4, "reuse"]


@pytest.mark.usefixtures("reuse_however_little_it_saves")
@pytest.mark.parametrize("core", ["fused", "chain"])
def test_one_batch_of_another_size_leaves_the_means_of_an_attention(core: str) -> None:
    training = Training(attention(core), Schedule(attention=Reuse(0.5)))
    methods = []
    for samples in (8, 8, 1, 8, 7, 1, 1, 1):
        training.step(x(samples=samples))
        methods += [site.method for site in training.backend.report().sites if site.kind == "attention"]
    reused = ["reuse" if method == "reuse" else "exact" for method in methods]
    assert reused == ["exact", "reuse", "exact", "reuse", "reuse", "exact", "exact", "reuse"]


class Sometimes(nn.Module):
    """A layer that not every step trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return self.other(torch.tanh(self.layer(x)) if both else x)


@pytest.mark.parametrize("every", [1, 3])
def test_no_base_is_of_long_ago(every: int) -> None:
    training = Training(Sometimes(), Schedule(linear=Reuse(0.5, refresh_every=every)))

    def methods(steps: list[bool]) -> list[str]:
        found = []
        for both in steps:
            training.optimizer.zero_grad()
            training.run(x(), both).square().sum().backward()
            training.optimizer.step()
            found += [site.method for site in training.backend.report().sites if site.name == "layer"]
        return found[-1:]

    assert methods([True, True]) == ["reuse"]
    assert methods([False, True]) == ["reuse"]
    assert methods([False] * (every + 1) + [True]) == ["exact"]
    assert methods([True]) == ["reuse"]


def test_two_graphs_with_a_layer_in_common_remember_one_gradient_each() -> None:
    """Both are in flight at once."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            one = torch.tanh(self.encoder(x))
            torch._dynamo.graph_break()
            return one + self.head(torch.tanh(self.encoder(x + 1)))

    training = Training(Siamese(), Schedule(linear=Reuse(0.5)))
    given = x()
    training.step(given)
    found = training.model.encoder.weight.grad.clone()
    training.model.zero_grad()
    training.model(given).square().sum().backward()
    torch.testing.assert_close(found, training.model.encoder.weight.grad)
    assert training.step(given).count("reuse") >= 2
    assert len(training.backend.state_dict()["sites"]["encoder"]["bases"]) == 2


def test_three_graphs_that_overlap_in_pairs() -> None:
    runtime = sparse_backend(Schedule.exact())._runtime
    firsts = [
        runtime._lanes_of(layers).first for layers in (("a", "b"), ("b", "c"), ("c", "d"), ("a", "b", "d"))
    ]
    assert firsts == [0, 16, 0, 32]


def test_norms_of_half_precision_do_not_overflow() -> None:
    """Of rows whose sum of norms does."""
    do = 40 * torch.randn(B, 2, 256, 16, dtype=torch.float16)
    rows = choose_rows(do, torch.zeros_like(do[0]), 0.5, None)
    expected = choose_rows(do.double(), torch.zeros_like(do[0]).double(), 0.5, None)
    assert torch.equal(rows.computed, expected.computed)
    torch.testing.assert_close(rows.share.double(), expected.share, rtol=1e-5, atol=0)
    assert float(rows.share.min()) > 0.1


def test_no_base_is_of_another_width() -> None:
    class Slimmable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x: Tensor, width: int) -> Tensor:
            return F.linear(x, self.layer.weight[:width], self.layer.bias[:width])

    training = Training(Slimmable(), Schedule(linear=Reuse(0.5)))
    training.run = torch.compile(training.model, backend=training.backend, dynamic=False)
    given = x()
    for width in (D, 5, D, 5):
        training.optimizer.zero_grad()
        training.run(given, width).square().sum().backward()
        found = training.model.layer.weight.grad.clone()
        training.model.zero_grad()
        training.model(given, width).square().sum().backward()
        torch.testing.assert_close(found, training.model.layer.weight.grad)


@pytest.mark.parametrize("how", ["checkpointed", "validated with a gradient"])
def test_forwards_without_a_backward_are_forgotten(how: str) -> None:
    """With an optimizer that is not PyTorch's no step ends, and each of them would be kept for ever."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            if how == "checkpointed":
                return checkpoint(compiled, x, use_reentrant=False)
            return self.layer(x)

    model = Checkpointed()
    training = Training(model, Schedule(linear=Reuse(0.5)))
    if how == "checkpointed":
        compiled, training.run = torch.compile(model.layer, backend=training.backend), model
    for _ in range(60):
        if how != "checkpointed":
            training.run(x())
        methods = training.step(x(), steps=False)
    assert methods[0] == "reuse"
    (site, *_) = training.backend.state_dict()["sites"].values()
    assert len(site["bases"]) <= 16


def test_what_is_said_of_a_layer_that_has_nothing_to_reuse_yet() -> None:
    """Only where lengths change again and again."""

    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(torch.tanh(self.layer(x)))))

    training = Training(Thrice(), Schedule(linear=Reuse(0.5)))
    training.step(x())
    assert training.backend.report().sites[0].reason == ""
    for _ in range(2):
        training.step(x() * torch.inf, steps=False)
    assert training.backend.report().sites[0].reason == ""
    for tokens in (T, T - 1, T, T - 1):
        training.step(x(tokens))
    assert "another size" in training.backend.report().sites[0].reason


@pytest.mark.usefixtures("reuse_however_little_it_saves")
@pytest.mark.parametrize("core", ["fused", "chain"])
def test_the_means_of_an_attention_survive_a_measurement(core: str) -> None:
    """Of adaptive sampling: that one step is exact, and the next goes on from what was there before."""
    schedule = Schedule(linear=Sample.adaptive(cal_var_freq=4), attention=Reuse(0.5))
    training = Training(attention(core), schedule)
    methods = []
    for _ in range(7):
        training.step(x())
        methods += [site.method for site in training.backend.report().sites if site.kind == "attention"]
    assert methods == ["exact", "exact", "reuse", "reuse", "exact", "reuse", "reuse"]
