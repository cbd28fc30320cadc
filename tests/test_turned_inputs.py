"""Linears that are given [T, B, …], as those of `nn.MultiheadAttention` are even where its inputs are
[B, T, C]: what is remembered is of tokens, and what is measured of samples, as on [B, T, C]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planned import as_on_a_gpu  # noqa: F401
from torch import Tensor, nn

from sparse_compile import Reuse, Schedule, SparseBackend, sparse_backend

B, T, D = 4, 6, 8


class Layers(nn.Module):
    """Two linears; the first reads [B, T, D] or, ``turned``, [T, B, D], the second heads, [B, T, H · D] or
    [T · B, H · D]."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turned, self.first, self.second = turned, nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor, alive: int = T) -> Tensor:
        x = torch.tanh(x)
        h = self.first(x.transpose(0, 1)).transpose(0, 1) if self.turned else self.first(x)
        heads = torch.tanh(h).unflatten(2, (2, D)).transpose(1, 2)  # [B, H, T, D]
        if self.turned:
            y = self.second(heads.permute(2, 0, 1, 3).reshape(T * len(x), 2 * D))
            y = y.view(T, len(x), D).transpose(0, 1)
        else:
            y = self.second(heads.transpose(1, 2).flatten(2))
        return (x + y)[:, :alive].square().sum()


def gradients(
    model: nn.Module, schedule: Schedule, steps: int = 4, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[list[Tensor], SparseBackend]:
    """Those of several steps, in which no weight changes; and of the inputs."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    backend = sparse_backend(schedule, compiler="aot_eager", debug=True)
    model = model.to(dtype)
    run, optimizer = (
        torch.compile(model, backend=backend, **options),
        torch.optim.SGD(model.parameters(), lr=0),
    )
    generator, found = torch.Generator().manual_seed(2), []
    for step in range(steps):
        x = torch.randn(
            B + (step if options else 0), T, D, generator=generator, dtype=dtype, requires_grad=True
        )
        optimizer.zero_grad()
        run(x, alive=T - step % 2).backward()
        optimizer.step()
        found += [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    return [gradient.clone() for gradient in found], backend


SCHEDULES = {
    "mean": Schedule(linear=Reuse(0.5)),
    "sample, every 2nd": Schedule(linear=Reuse(0.5, source="sample", refresh_every=2)),
    "elements": Schedule(linear=Reuse(0.5, granularity="element")),
    "2:4": Schedule(linear=Reuse("2:4")),
    "phases": Schedule(linear=Reuse([(0.0, 0.0), (0.5, 0.5)]), total_steps=4),
    "all rows of the forward": Schedule(linear=Reuse(0.5), skip_unneeded=False),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_reuse_is_of_the_same_tokens(name: str) -> None:
    expected, _ = gradients(Layers(turned=False), SCHEDULES[name])
    found, backend = gradients(Layers(turned=True), SCHEDULES[name])
    torch.testing.assert_close(found, expected)
    assert [site.method for site in backend.report().sites] == [SCHEDULES[name].linear.method] * 2


def test_batches_of_several_sizes() -> None:
    expected, _ = gradients(Layers(turned=False), SCHEDULES["mean"], dynamic=True)
    found, backend = gradients(Layers(turned=True), SCHEDULES["mean"], dynamic=True)
    torch.testing.assert_close(found, expected)
    assert len(backend.graphs) <= 2


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("planned", [False, True], ids=["called", "planned"])
@pytest.mark.parametrize("name", ["mean", "sample, every 2nd", "phases"])
def test_so_it_is_on_a_gpu(name: str, planned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if not planned:
        monkeypatch.setattr(SparseBackend, "_planned_calls", lambda *_: None)
    expected, straight = gradients(Layers(turned=False), SCHEDULES[name], dtype=torch.float32, steps=6)
    found, backend = gradients(Layers(turned=True), SCHEDULES[name], dtype=torch.float32, steps=6)
    torch.testing.assert_close(found, expected)
    assert [site.method for site in backend.report().sites] == ["reuse"] * 2
    counted, wanted = backend.report().totals, straight.report().totals
    assert counted == wanted


def test_what_is_measured_is_of_samples() -> None:
    schedule = Schedule.vcas(cal_var_freq=1, update="solve")
    _, straight = gradients(Layers(turned=False), schedule, steps=1)
    _, turned = gradients(Layers(turned=True), schedule, steps=1)
    (expected,), (found,) = straight.report().history, turned.report().history
    assert found["sgd_variance"] == pytest.approx(expected["sgd_variance"], rel=1e-9)
    assert expected["sgd_variance"] > 0


def tokens_of(model: nn.Module, *inputs: Tensor) -> list[int]:
    """The argument of each op that says how rows are ordered, in the order of the backward."""
    torch._dynamo.reset()
    backend = sparse_backend(Schedule(linear=Reuse(0.5)), compiler="aot_eager", debug=True)
    torch.compile(model, backend=backend)(*inputs).sum().backward()
    (graph,) = backend.graphs
    calls = [
        line for line in graph.after.splitlines() if "ops.sparse_compile.linear_backward.default(" in line
    ]
    return [int(line.split("linear_backward.default(")[1].split(",")[5]) for line in calls]


def test_an_attention_in_batches_of_several_sizes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

        def forward(self, x: Tensor, alive: int) -> Tensor:
            return self.attention(x, x, x)[0][:, :alive].square().sum()

    expected, backend = gradients(Net(), SCHEDULES["mean"], dynamic=False)
    linears = [site.method for site in backend.report().sites if site.kind == "linear"]
    assert linears == ["reuse"] * 2
    found, _ = gradients(Net(), SCHEDULES["mean"], dynamic=True)
    torch.testing.assert_close(found, expected)


class Attending(nn.Module):
    """A layer with an attention, in a model that turns its input as it likes."""

    def __init__(self, layer: nn.Module, turns: bool) -> None:
        super().__init__()
        self.layer, self.turns, self.head = layer, turns, nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :1], x], 1)
        h = self.layer(x.transpose(0, 1)) if self.turns else self.layer(x)
        return self.head(h)


def encoder(batch_first: bool, **options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, 16, 0.0, batch_first=batch_first, **options)


@pytest.mark.parametrize("scores", [False, True], ids=["fused", "written out"])
@pytest.mark.parametrize(
    ("batch_first", "expected"), [(True, [T + 1, T + 1, T + 1, -B, -B]), (False, [-B] * 5)]
)
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_layers_of_an_encoder(
    batch_first: bool, norm_first: bool, scores: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = encoder(batch_first, norm_first=norm_first)
    attend = layer.self_attn.forward
    monkeypatch.setattr(
        layer.self_attn, "forward", lambda *a, **k: attend(*a, **{**k, "need_weights": scores})
    )
    model = Attending(layer, turns=not batch_first)
    assert tokens_of(model, torch.randn(B, T, D)) == expected


@pytest.mark.parametrize("turned", [False, True])
def test_a_model_of_numbered_tokens(turned: bool) -> None:
    """Turned before they are embedded; and a cls token is put in front."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Embedding(10, D), encoder(not turned)
            self.cls, self.head = nn.Parameter(torch.randn(1, 1, D)), nn.Linear(D, 3)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids.t() if turned else ids)
            cls = self.cls.expand(1, B, D) if turned else self.cls.expand(B, 1, D)
            return self.head(self.layer(torch.cat([cls, x], 0 if turned else 1)))

    expected = [-B] * 5 if turned else [T + 1] * 3 + [-B] * 2
    assert tokens_of(Model(), torch.randint(10, (B, T))) == expected


def test_states_of_a_recurrent_layer_are_no_samples() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.Linear(D, D), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            h, states = x[:, 0], []
            for t in range(T):
                h = torch.tanh(self.cell(h) + x[:, t])
                states.append(h)
            return self.head(torch.stack(states).transpose(0, 1))

    assert tokens_of(Recurrent(), torch.randn(B, T, D))[0] == T


def linear(turn: Callable[[Tensor], Tensor], width: int = D) -> nn.Module:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(turn(x))

    return Turning()


@pytest.mark.parametrize(
    ("turn", "width", "expected"),
    [
        (lambda x: x, D, T),
        (lambda x: x.transpose(0, 1), D, -B),
        (lambda x: x.permute(1, 0, 2).contiguous().double().float(), D, -B),
        (lambda x: x.transpose(1, 2), T, D),  # tokens are mixed, as in an MLP-Mixer
        (lambda x: x.permute(2, 1, 0), B, T),  # the samples are what is contracted
        (lambda x: x.transpose(0, 1).transpose(0, 1), D, T),
        (lambda x: F.layer_norm(x.transpose(0, 1), [D]).softmax(-1), D, -B),
        (lambda x: F.pad(x.transpose(0, 1), (0, 1, 0, 0, 1, 0)), D + 1, -B),
        (lambda x: torch.ones(T, 1, D) + x.transpose(0, 1), D, -B),
        (lambda x: (x @ x.mT).transpose(0, 1), T, -B),
        (lambda x: x.transpose(0, 1).reshape(-1, D), D, -B),
        (lambda x: x.transpose(0, 1).reshape(T, B // 2, 2 * D), 2 * D, B // 2),  # two samples in a row
        (lambda x: x[:, 0], D, 1),
    ],
)
def test_which_inputs_are_turned(turn: Callable[[Tensor], Tensor], width: int, expected: int) -> None:
    assert tokens_of(linear(turn, width), torch.randn(B, T, D)) == [expected]
