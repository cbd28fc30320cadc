"""Rows of the forward that nothing needs, as a backend leaves them out: what is counted, and what is left as
it is. Which rows those are is a matter of passes/test_needed.py."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from sparse_compile.passes import random_rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_compile import PruneSaved, Reuse, Sample, Schedule, SparseBackend, sparse_backend
from sparse_compile.methods import exact

SAMPLES, TOKENS, WIDTH, LENGTH = 4, 16, 64, 5  # LENGTH tokens of each sample are real
ROWS, PRODUCT = SAMPLES * TOKENS, 2 * SAMPLES * TOKENS * WIDTH * WIDTH
UNNEEDED = SAMPLES * (TOKENS - LENGTH)


class Net(nn.Module):
    """Two layers, and a head that takes the mean of the tokens that a mask shows."""

    def __init__(self, *, checkpointed: bool = False, calls: int = 1) -> None:
        super().__init__()
        self.up, self.down, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.checkpointed, self.calls = checkpointed, calls

    def body(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = self.down(torch.tanh(self.up(x)))
        return x

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        h = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head((h * shown.unsqueeze(-1)).sum(1) / LENGTH).square().mean()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(SAMPLES, TOKENS, WIDTH), (torch.arange(TOKENS) < LENGTH).expand(SAMPLES, -1)


def train(
    schedule: Schedule | None, model: nn.Module, *, compiler: str = "aot_eager", forwards: int = 1
) -> tuple[dict[str, Tensor], SparseBackend]:
    """The gradients of one step, with all forwards before the first backward, and the backend."""
    backend = sparse_backend(schedule or Schedule.exact(), compiler=compiler, debug=compiler == "aot_eager")
    compiled = torch.compile(model, backend=backend)
    model.zero_grad()
    losses = [compiled(*batch()) for _ in range(forwards)]
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, backend


def eager(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(*batch()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def sites(backend: SparseBackend) -> dict[str, Any]:
    return {site.name: site for site in backend.report().sites}


def ops(backend: SparseBackend) -> int:
    return backend.graphs[0].after.count("sparse_compile.linear_forward.default(")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(17)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("forwards", [1, 2])
def test_the_report_counts_each_row_once(forwards, calls, checkpointed):
    """A layer may run twice in a forward, a forward twice before a backward, and again in that."""
    model = Net(checkpointed=checkpointed, calls=calls)
    gradients, backend = train(None, model, forwards=forwards)
    expected = {name: forwards * gradient for name, gradient in eager(model).items()}
    torch.testing.assert_close(gradients, expected)
    found = sites(backend)
    for name in ("up", "down"):
        assert found[name].rows == forwards * calls * ROWS
        assert found[name].rows_unneeded == forwards * calls * UNNEEDED
        assert found[name].flops_forward_dense == calls * PRODUCT
        assert found[name].flops_forward == calls * PRODUCT * LENGTH / TOKENS
    assert found["head"].rows_unneeded == 0
    totals = backend.report().totals
    assert totals["flops"] == totals["flops_forward"] + totals["flops_backward"]
    assert totals["flops_forward"] < 0.4 * totals["flops_forward_dense"]
    assert "69%" in str(backend.report())


def test_the_backward_does_not_look_for_what_the_forward_has_left_out(monkeypatch):
    """Nor does it compute it: no output depends on those rows, so there is no gradient in them."""
    looked = []
    look = exact.live_rows
    monkeypatch.setattr(exact, "live_rows", lambda dy, *rest: looked.append(len(dy)) or look(dy, *rest))
    model = Net()
    gradients, backend = train(None, model)
    torch.testing.assert_close(gradients, eager(model))
    assert looked == [SAMPLES, ROWS - UNNEEDED, ROWS - UNNEEDED]
    assert [sites(backend)[name].rows_skipped for name in ("up", "down")] == [UNNEEDED] * 2


def test_rows_that_the_forward_needs_and_that_have_no_gradient_are_still_skipped():
    """As those of a sample whose loss has weight zero."""

    class Weighted(Net):
        def forward(self, x: Tensor, shown: Tensor) -> Tensor:
            h = (self.body(x) * shown.unsqueeze(-1)).sum(1)
            return (self.head(h).square().mean(1) * torch.tensor([0.0, 1.0, 0.0, 0.0])).sum()

    model = Weighted()
    gradients, backend = train(None, model)
    torch.testing.assert_close(gradients, eager(model))
    for name in ("up", "down"):
        assert sites(backend)[name].rows_unneeded == UNNEEDED
        assert sites(backend)[name].rows_skipped == UNNEEDED + 3 * LENGTH


def test_a_second_backward_of_one_forward_looks_for_itself():
    model = Net()
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager")
    loss = torch.compile(model, backend=backend)(*batch())
    with torch._functorch.config.patch(donated_buffer=False):
        loss.backward(retain_graph=True)
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    torch.testing.assert_close(found, {name: 2 * gradient for name, gradient in eager(model).items()})


def test_a_second_backward_does_not_take_the_rows_of_a_newer_forward():
    """The first has given its place back, and the newer forward needs other rows."""
    model, (x, shown) = Net(), batch()
    x.requires_grad_()  # so that rows are left out within each linear
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager", debug=True)
    compiled = torch.compile(model, backend=backend)
    expected, found = eager(model), []
    with torch._functorch.config.patch(donated_buffer=False):
        loss = compiled(x, shown)
        loss.backward(retain_graph=True)
        newer = compiled(x, shown.flip(1))
        model.zero_grad()
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
        newer.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert ops(backend) == 2
    torch.testing.assert_close(found[0], expected)
    model.zero_grad()
    model(x, shown.flip(1)).backward()
    torch.testing.assert_close(found[1], {name: p.grad.clone() for name, p in model.named_parameters()})


def test_without_a_backward_nothing_is_counted():
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager")
    compiled = torch.compile(Net(), backend=backend)
    for _ in range(3):
        compiled(*batch())
    assert [site.rows_unneeded for site in backend.report().sites] == [0, 0, 0]
    compiled(*batch()).backward()
    assert sites(backend)["up"].rows_unneeded == UNNEEDED


@pytest.mark.parametrize("method", [None, Reuse(0.0)], ids=["carried", "not carried"])
def test_what_is_excluded_gets_the_rows_that_are_carried(method):
    """It skips nothing of its own: without layers that carry the needed rows alone it is computed whole."""
    gradients, backend = train(Schedule(linear=method, exclude="up"), model := Net())
    torch.testing.assert_close(gradients, eager(model))
    found = sites(backend)
    assert found["down"].rows_unneeded == UNNEEDED
    assert found["up"].rows_unneeded == (UNNEEDED if method is None else 0)
    assert [found[name].carried for name in ("up", "down")] == [method is None] * 2
    assert ("2 linears hand on needed rows only" in str(backend.report())) == (method is None)


@pytest.mark.parametrize("keep", [0.1, 0.2, 0.5])
def test_a_fixed_share_is_of_all_rows_whatever_is_carried(keep):
    _, backend = train(Schedule(linear=Sample(keep), exclude="head"), Net())
    for name in ("up", "down"):
        assert sites(backend)[name].rows == ROWS
        assert sites(backend)[name].rows_computed == min(round(keep * ROWS), ROWS - UNNEEDED)


def test_what_is_measured_of_samples_is_measured_on_all_rows(monkeypatch):
    """A measured step is exact, so the same with and without rows that are carried."""
    found = []
    for skip in (True, False):
        torch._dynamo.reset()
        model = Net()
        torch.nn.init.constant_(model.head.bias, 0.3)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        backend = sparse_backend(Schedule.vcas(skip_unneeded=skip), compiler="aot_eager")
        compiled, optimizer = (
            torch.compile(model, backend=backend),
            torch.optim.SGD(model.parameters(), lr=0.1),
        )
        for _ in range(2):
            compiled(*batch()).backward()
            optimizer.step()
            optimizer.zero_grad()
        (entry,) = backend.report().history
        assert all(site.carried == skip for site in backend.report().sites if site.name in ("up", "down"))
        found.append(entry)
    assert found[0]["sgd_variance"] == pytest.approx(found[1]["sgd_variance"], rel=1e-4)
    assert found[0]["weight_variance"] == pytest.approx(found[1]["weight_variance"], rel=1e-4)
    assert found[0]["row_shares"] == pytest.approx(found[1]["row_shares"], rel=1e-3)


class Dropping(Net):
    def body(self, x: Tensor) -> Tensor:
        h = super().body(x)
        return torch.nn.functional.layer_norm(x + torch.nn.functional.dropout(h, 0.3), (WIDTH,))


def test_a_smaller_batch_at_the_end_of_an_epoch():
    """There Dynamo goes over to dynamic shapes, and uses that graph for all that follows."""
    model = Net()
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager", debug=True)
    compiled = torch.compile(model, backend=backend)
    for samples in (SAMPLES, SAMPLES, SAMPLES - 2, SAMPLES, SAMPLES + 3):
        x = torch.randn(samples, TOKENS, WIDTH)
        shown = (torch.arange(TOKENS) < LENGTH).expand(samples, -1).contiguous()
        found = []
        for run in (compiled, model):
            model.zero_grad()
            run(x, shown).backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        torch.testing.assert_close(*found)
    assert len(backend.graphs) == 2
    assert all(sites(backend)[name].carried for name in ("up", "down"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_draws_the_random_numbers_of_few_rows(monkeypatch, dynamic):
    """Under dropout, and with another number of rows in each step, a step is plain torch.compile's; so it is
    with batches of any size."""
    shortened = []
    monkeypatch.setattr(
        random_rows,
        "_is_uniform",
        lambda node, ask=random_rows._is_uniform: ask(node) and not shortened.append(node),
    )
    model, found = Dropping(), []
    backend = sparse_backend(Schedule.exact(), debug=True)  # without caches: the passes run
    for compiler in ("inductor", backend):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=compiler, dynamic=dynamic)
        for step, length in enumerate((LENGTH, TOKENS, 2, 0)):
            torch.manual_seed(9)
            x = torch.randn(SAMPLES - dynamic * (step % 3), TOKENS - dynamic * (step == 2), WIDTH)
            shown = (torch.arange(x.shape[1]) < length).expand(len(x), -1).contiguous()
            model.zero_grad()
            compiled(x, shown).backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert len(shortened) == 1
    torch.testing.assert_close(found[4:], found[:4], rtol=1e-4, atol=1e-6)
    site = sites(backend)["up"]
    assert site.carried
    if not dynamic:
        assert site.rows_unneeded == 4 * ROWS - SAMPLES * (LENGTH + TOKENS + 2)


@pytest.mark.parametrize(
    ("schedule", "linears"),
    [
        (Schedule(), 2),
        (Schedule(linear=Reuse(0.5, granularity="element")), 2),
        (Schedule(attention=Reuse(0.5)), 2),
        (Schedule(skip_unneeded=False), 0),
        # For these formulas every row of a sample, or of a head, counts.
        (Schedule(saved_activations=PruneSaved(0.5)), 0),
        (Schedule(attention=Reuse(0.5, granularity="element")), 0),
        (Schedule(attention=Reuse("2:4")), 0),
    ],
    ids=str,
)
def test_when_rows_are_left_out(schedule, linears):
    _, backend = train(schedule, Net())
    assert ops(backend) == linears


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(linear=Reuse(0.5)),
        Schedule(linear=Sample(0.5), blocks=Sample(0.5)),
        Schedule(linear=Reuse(0.5, granularity="element")),
        Schedule(linear=Reuse("2:4")),
    ],
    ids=str,
)
def test_methods_find_the_same_gradients(schedule):
    """Whatever a method does with the rows of dY, it does nothing with those that are zero."""
    model, whole = Net(), {"skip_unneeded": False}
    found, expected = (
        steps(Schedule.from_dict({**schedule.to_dict(), **other}), model) for other in ({}, whole)
    )
    torch.testing.assert_close(found, expected)


def steps(schedule: Schedule, model: nn.Module) -> list[dict[str, Tensor]]:
    """Of three steps: a reuse has its base in the second."""
    torch._dynamo.reset()
    torch.manual_seed(5)
    compiled = torch.compile(model, backend=sparse_backend(schedule, compiler="aot_eager"))
    found = []
    for _ in range(3):
        model.zero_grad()
        compiled(*batch()).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return found


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_under_inductor(autocast):
    model = Net()
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        found, backend = train(None, model, compiler="inductor")
        assert sites(backend)["down"].rows_unneeded == UNNEEDED
        expected = eager(model)
    tolerance = {"rtol": 0.05, "atol": 1e-5} if autocast else {}  # bf16 has 8 bits
    torch.testing.assert_close(found, expected, **tolerance)


class Labelled(nn.Module):
    """Logits and the loss of those that have a label, as a language model returns them."""

    def __init__(self, *, with_loss: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.with_loss = with_loss

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        hidden = torch.tanh(self.up(x))
        logits = self.down(hidden)
        if not self.with_loss:
            return logits, hidden
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def labelled() -> tuple[Tensor, Tensor]:
    x, shown = batch()
    return x, torch.where(shown, torch.arange(TOKENS) % 3, -100)


@pytest.mark.parametrize(("skip", "linears"), [(True, 0), ("loss", 2)])
def test_the_loss_may_be_all_that_is_needed_of_what_is_returned(skip, linears):
    model = Labelled()
    backend = sparse_backend(Schedule.exact(skip_unneeded=skip), compiler="aot_eager", debug=True)
    found = []
    for run in (torch.compile(model, backend=backend), model):
        model.zero_grad()
        loss, logits = run(*labelled())
        loss.backward()
        found.append(({name: p.grad for name, p in model.named_parameters()}, loss, logits[:, :LENGTH]))
    torch.testing.assert_close(*found)
    assert ops(backend) == linears
    assert sites(backend)["up"].rows_unneeded == (UNNEEDED if linears else 0)


def test_without_a_loss_all_that_is_returned_is_needed():
    model = Labelled(with_loss=False)
    backend = sparse_backend(Schedule.exact(skip_unneeded="loss"), compiler="aot_eager", debug=True)
    logits, _ = torch.compile(model, backend=backend)(*labelled())
    nn.functional.cross_entropy(logits.flatten(0, 1), labelled()[1].flatten()).backward()
    assert ops(backend) == 0


def test_bad_values_are_refused():
    with pytest.raises(
        ValueError, match=r'^Schedule\.skip_unneeded is 1; allowed is True, False or "loss"\.$'
    ):
        Schedule(skip_unneeded=1)  # type: ignore[arg-type]
