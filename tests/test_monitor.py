"""What a monitor measures while a model trains, against eager references; and that it changes nothing."""

from __future__ import annotations

from typing import Any

import attention_reference
import pytest
import torch
from attention_reference import chain, fused
from reference import MLP, Recipe, ReferenceLinear, Transformer, reference_of, sparse_residual, square_loss
from test_attention_training import Training
from test_attention_training import batch as attention_batch
from torch import Tensor, nn
from tracing import Model
from training import batch

from sparse_compile import Monitor, Reuse, Sample, Schedule, SparseBackend, sparse_backend
from sparse_compile.clock import Clock
from sparse_compile.linear_site import LinearSite
from sparse_compile.measurements import Measurement
from sparse_compile.methods import fidelity, sample
from sparse_compile.methods.rows import Rows
from sparse_compile.telemetry import Telemetry

REUSE = {
    "row": (Reuse(0.7), Recipe(0.7)),
    "element": (Reuse(0.7, granularity="element", refresh_every=2), Recipe(0.7, "element", 2)),
    "n:m": (Reuse("1:4"), Recipe((1, 4), "n:m")),
}
Values = tuple[float, float, float]  # cosine, relative error, energy kept

pytestmark = pytest.mark.usefixtures("reuse_however_little_it_saves")  # at sizes like these


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def measured(backend: SparseBackend) -> tuple[Measurement, ...]:
    return backend.report().measurements


def values_at(backend: SparseBackend, step: int) -> dict[tuple[str, str], Values]:
    rows = [row for row in measured(backend) if row.step == step]
    found = {(row.site, row.gradient): values_of(row) for row in rows}
    assert len(found) == len(rows)
    return found


def values_of(row: Measurement) -> Values:
    return row.cosine, row.relative_error, row.energy_kept


def compare(estimate: Tensor, exact: Tensor, kept: Tensor, dy: Tensor) -> Values:
    """The three formulas; ``kept`` says which entries of ``dy`` are."""
    cosine = (estimate * exact).sum() / (estimate.norm() * exact.norm())
    error = (estimate - exact).norm() / exact.norm()
    return float(cosine), float(error), float((dy * kept).square().sum() / dy.square().sum())


def train(
    model: nn.Module, schedule: Schedule, monitor: Monitor | None, steps: int = 5, micro_batches: int = 1
) -> SparseBackend:
    torch._dynamo.reset()
    backend = sparse_backend(schedule, compiler="aot_eager", monitor=monitor)
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        data = torch.Generator().manual_seed(step)
        for _ in range(micro_batches):
            square_loss(compiled(torch.randn(6, 5, 6, generator=data))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return backend


SCHEDULES = {
    **{f"linear, {name}": Schedule(linear=method) for name, (method, _) in REUSE.items()},
    "linear, sample": Schedule(linear=Reuse(0.5, source="sample")),
    **{f"attention, {name}": Schedule(attention=method) for name, (method, _) in REUSE.items()},
    "sampled rows": Schedule(linear=Sample(0.3)),
    "samples between blocks": Schedule(blocks=Sample(0.5), linear=Sample(0.5, clip=2.0)),
    "vcas": Schedule.vcas(cal_var_freq=2, update="solve", act_tau=0.5, weight_tau=0.5),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_is_the_same_with_and_without_bit_for_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where layers are as small as here, adaptive sampling would not pay, and not be done.
    monkeypatch.setattr("sparse_compile.methods.exact.fewest_to_skip", lambda *_, **__: 1)
    runs = []
    for monitor in (None, Monitor(every=1)):
        torch.manual_seed(7)
        model = Transformer()
        backend = train(model, SCHEDULES[name], monitor, micro_batches=2)
        runs.append((backend, model, torch.rand(3)))
    (without, expected, draws), (watched, found, as_many) = runs
    assert measured(watched)
    assert not measured(without)
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(draws, as_many)  # nothing is drawn from the global generator
    assert repr(watched.state_dict()) == repr(without.state_dict())


class Seen:
    """What goes through one layer of the eager reference."""

    def __init__(self, layer: ReferenceLinear) -> None:
        self.layer = layer
        layer.register_forward_hook(self._forward)
        layer.register_full_backward_hook(self._backward)

    def _forward(self, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.x, self.base = inputs[0].detach().flatten(0, 1), self.layer.memories[0].base

    def _backward(self, _: nn.Module, dx: tuple[Tensor, ...], dy: tuple[Tensor, ...]) -> None:
        self.dx, self.dy = dx[0].flatten(0, 1), dy[0].flatten(0, 1)

    def values(self) -> dict[str, Values]:
        """Of the last backward, which had a base."""
        weight, dy, base = self.layer.weight, self.dy, self.base
        assert base is not None
        residual = dy - base.repeat(len(dy) // len(base), 1)
        by_dx, by_dw = (
            sparse_residual(residual, [False] * len(dy), self.layer.recipe, d) != 0 for d in (1, 0)
        )
        return {
            "dX": compare(self.dx, dy @ weight.detach(), by_dx, dy),
            "dW": compare(weight.grad, dy.t() @ self.x, by_dw, dy),
        }


@pytest.mark.parametrize("name", REUSE)
def test_reuse_in_linears(name: str) -> None:
    """The reference gives dY, X and the estimates of each layer; the rest is the formulas."""
    method, recipe = REUSE[name]
    model = MLP().double()
    reference = reference_of(model, recipe)
    seen = {path: Seen(m) for path, m in reference.named_modules() if isinstance(m, ReferenceLinear)}
    backend = sparse_backend(Schedule(linear=method), compiler="aot_eager", monitor=Monitor(every=1))
    compiled = torch.compile(model, backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    for step in range(5):
        x = batch()
        for module, optimizer in zip((compiled, reference), optimizers, strict=True):
            optimizer.zero_grad()
            square_loss(module(x.clone().requires_grad_())).backward()
        found = values_at(backend, step)
        wanted = {}
        if step > 0:  # before, there is no base, and all is exact
            wanted = {(path, name): v for path in seen for name, v in seen[path].values().items()}
        assert found.keys() == wanted.keys()
        for key, values in found.items():
            assert values == pytest.approx(wanted[key], rel=1e-9), (step, key)
            assert values[1] > 0.01
        for optimizer in optimizers:
            optimizer.step()


def attention_values(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Values]]:
    """Of each backward of the eager reference of attention that had means, in its order."""
    found: list[dict[str, Values]] = []
    original = attention_reference._Attention.backward

    def backward(ctx: Any, do: Tensor) -> Any:
        (a, q, k, v), means = ctx.saved_tensors, dict(ctx.memory.means)
        estimates = original(ctx, do)
        if means:
            exact = attention_reference.dense(do, a, q, k, v, ctx.scale)
            for_da, for_dv = entries_kept(do, means["do"], ctx.recipe)
            kept = {"dq": for_da, "dk": for_da, "dv": for_dv}
            found.append(
                {
                    f"d{name[1].upper()}": compare(estimate, exact[name], kept[name], do)
                    for name, estimate in zip(kept, estimates, strict=False)
                }
            )
        return estimates

    monkeypatch.setattr(attention_reference._Attention, "backward", staticmethod(backward))
    return found


def entries_kept(do: Tensor, mean: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Which entries of dO [B, H, T, D] are taken, for dA and for dV."""
    alive = do.ne(0).any(-1).any(1)[:, None, :, None]
    residual = (do - mean) * alive
    if recipe.granularity != "row":
        for_da, for_dv = (attention_reference.sparse(residual, recipe, along) != 0 for along in (-1, -2))
        return for_da, for_dv
    distance = residual.square().sum((1, 3)).flatten()
    kept = torch.zeros_like(distance, dtype=torch.bool)
    kept[distance.argsort(descending=True)[: round((1 - recipe.ratio) * len(kept))]] = True
    rows = kept.view(len(do), 1, -1, 1)
    return rows, rows


@pytest.mark.parametrize("core", [fused, chain])
@pytest.mark.parametrize("name", REUSE)
def test_reuse_in_attention(core: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, recipe = REUSE[name]
    by_reference = attention_values(monkeypatch)
    training = Training(core, Schedule(attention=method), recipe, Monitor(every=1))
    for step in range(4):
        by_reference.clear()
        training.step(attention_batch())
        found = values_at(training.backend, step)
        wanted = {}
        for path, values in zip(("second", "first"), by_reference, strict=False):  # as a backward runs
            wanted |= {(path, name): v for name, v in values.items()}
        assert bool(wanted) == (step > 0)
        assert found.keys() == wanted.keys()
        for key, values in found.items():
            assert values == pytest.approx(wanted[key], rel=1e-9), (step, key)
            assert values[1] > 0.01


@pytest.mark.parametrize("gradients", ["both", "weight", "input"])
def test_sampled_rows_and_only_what_is_sampled(gradients: str) -> None:
    """The rows are drawn again with the seed of the site; the estimates are then one line each."""
    site = LinearSite("layer", seed=4, telemetry=Telemetry(every=1, clock=Clock(Schedule.exact())))
    dy, x, w = (torch.randn(shape, dtype=torch.float64) for shape in ((20, 5), (20, 6), (5, 6)))
    phase = Schedule(linear=Sample(0.3, gradients=gradients)).at(0)
    options: dict[str, Any] = {"tokens": 4, "dw_transposed": True, "phase": phase}
    site.linear_backward(dy, x, w, **options)
    assert site.telemetry is not None
    draw = sample.Draw(f"4/layer/{(0, 0)}/0")
    wanted = {}
    if gradients != "weight":
        rows = sample.rows(dy.norm(dim=1), 6, None, draw)
        estimate, kept = written_out(rows, dy)
        wanted["dX"] = compare(estimate @ w, dy @ w, kept, dy)
    if gradients != "input":
        rows = sample.rows(dy.norm(dim=1) * x.norm(dim=1), 6, None, draw)
        estimate, kept = written_out(rows, dy)
        wanted["dW"] = compare(estimate.t() @ x, dy.t() @ x, kept, dy)
    rows = site.telemetry.measurements()
    assert {row.gradient: values_of(row) for row in rows} == {
        name: pytest.approx(values, rel=1e-9) for name, values in wanted.items()
    }
    assert {(row.site, row.method) for row in rows} == {("layer", "sample")}


def written_out(rows: Rows, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Ŷ [N, O], and which rows are kept, [N, 1]."""
    weights = torch.zeros(len(dy), 1, dtype=dy.dtype)
    weights[rows.kept, 0] = rows.scale
    return dy * weights, weights != 0


def test_every_nth_step_whatever_the_number_of_backwards() -> None:
    backend = train(MLP(), Schedule(linear=Reuse(0.5)), Monitor(every=3), steps=9, micro_batches=3)
    assert [(row.step, row.site) for row in measured(backend) if row.gradient == "dW"] == [
        (step, site) for step in (2, 5, 8) for site in ("head", "second", "first")
    ]


def test_the_first_micro_batch_is_the_one_that_is_measured() -> None:
    model = MLP().double()
    backend = sparse_backend(Schedule(linear=Reuse(0.5)), compiler="aot_eager", monitor=Monitor(every=1))
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    square_loss(compiled(batch())).backward()
    optimizer.step()
    square_loss(compiled(batch())).backward()
    first = measured(backend)
    square_loss(compiled(batch())).backward()
    assert first
    assert measured(backend) == first


def test_a_layer_that_is_used_twice_is_measured_once_a_step() -> None:
    layer = nn.Linear(6, 6)
    model = Model(lambda m, x: m.layer(torch.tanh(m.layer(x))), layer=layer).float()
    backend = train(model, Schedule(linear=Reuse(0.5)), Monitor(every=2), steps=4)
    # Of the two uses the later has a dX, and is the first of the backward.
    assert [(row.step, row.gradient) for row in measured(backend)] == [
        (step, name) for step in (1, 3) for name in ("dX", "dW")
    ]


@pytest.mark.parametrize(
    ("schedule", "sites"),
    [
        (Schedule.exact(), set()),
        (Schedule(linear=Reuse(0.0)), set()),
        (Schedule(linear=Reuse(0.5), exclude="second"), {"first", "head"}),
        (Schedule(linear=Reuse([(0.0, 0.0), (0.5, 0.5)]), total_steps=20), set()),
    ],
)
def test_what_is_exact_is_left_out(schedule: Schedule, sites: set[str]) -> None:
    backend = train(MLP(), schedule, Monitor(every=1), steps=3)
    assert {row.site for row in measured(backend)} == sites


def test_what_is_exact_costs_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    original = fidelity.compare

    def count(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal compared
        compared += 1
        return original(*tensors)

    monkeypatch.setattr(fidelity, "compare", count)
    train(MLP(), Schedule(linear=Reuse(0.5)), None, steps=3)
    train(MLP(), Schedule.exact(), Monitor(every=1), steps=3)
    train(MLP(), Schedule(linear=Reuse(0.5)), Monitor(every=4), steps=3)
    assert compared == 0
    train(MLP(), Schedule(linear=Reuse(0.5)), Monitor(every=3), steps=3)
    assert compared == 5  # three dW, and two dX: the first layer has none


@pytest.mark.parametrize("factor", [0.0, torch.inf])
def test_without_a_gradient_or_with_an_overflow_nothing_is_kept(factor: float) -> None:
    model = MLP()
    backend = sparse_backend(Schedule(linear=Reuse(0.5)), compiler="aot_eager", monitor=Monitor(every=2))
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        loss = square_loss(compiled(torch.randn(6, 5, 6)))
        (loss * (factor if step == 1 else 1.0)).backward()
        optimizer.zero_grad()
        optimizer.step()
    assert {row.step for row in measured(backend)} == {3}


def test_graphs_know_nothing_of_it() -> None:
    graphs = []
    for monitor in (None, Monitor(every=1)):
        torch._dynamo.reset()
        backend = sparse_backend(
            Schedule(linear=Reuse(0.5), attention=Reuse(0.5)),
            compiler="aot_eager",
            debug=True,
            monitor=monitor,
        )
        square_loss(torch.compile(Transformer(), backend=backend)(torch.randn(6, 5, 6))).backward()
        graphs.append([graph.after for graph in backend.graphs])
    assert graphs[0] == graphs[1] != []


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "250", None])
def test_wrong_intervals_are_refused(every: Any) -> None:
    with pytest.raises(ValueError, match=rf"Monitor\.every is {every!r}; allowed is an int >= 1\."):
        Monitor(every=every)


def test_what_is_no_monitor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"monitor is 250; allowed is None or a sparse_compile\.Monitor"):
        sparse_backend(Schedule.exact(), monitor=250)  # type: ignore[arg-type]
    assert Monitor().every == 250
