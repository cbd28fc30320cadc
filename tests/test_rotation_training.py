"""Training with sparse weight gradients in a rotated basis, against eager code."""

from __future__ import annotations

import gc

import pytest
import torch
from reference_rotation import Recipe, Reference
from torch import Tensor, nn

from sparse_compile import Reuse, RotatedTopK, Sample, Schedule, SparseBackend, sparse_backend
from sparse_compile.optim import SparseAdamW, freeze_unselected, sparse, state_bytes

H, F = 6, 16


class Block(nn.Module):
    """An MLP with a residual; ``packed`` has its weights as [I, O], as GPT-2's Conv1D does."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.packed = packed
        self.up = nn.Linear(F, H) if packed else nn.Linear(H, F)
        self.down = nn.Linear(H, F) if packed else nn.Linear(F, H)
        if packed:
            self.up.bias = self.down.bias = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            return x + torch.tanh(x @ self.up.weight) @ self.down.weight
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(packed) for _ in range(2))
        self.head = nn.Linear(H, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


CHOSEN = [f"layers.{i}.{name}.weight" for i in range(2) for name in ("up", "down")]


def batch(step: int, samples: int = 4) -> Tensor:
    return torch.randn(samples, 5, H, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def loss_of(y: Tensor) -> Tensor:
    return (y - torch.linspace(-1, 1, 3, dtype=y.dtype)).square().mean()


def compiled(
    model: nn.Module, schedule: Schedule, compiler: str = "aot_eager"
) -> tuple[nn.Module, SparseBackend]:
    backend = sparse_backend(schedule, compiler=compiler)
    return torch.compile(model, backend=backend), backend  # type: ignore[return-value]


class Run:
    """A model in training; settings are those of `RotatedTopK` and, in ``optimizer``, of the optimizer."""

    def __init__(
        self, density: float = 0.1, steps: int = 2, *, model=None, optimizer=None, make=SparseAdamW, **rest
    ):
        torch._dynamo.reset()
        self.model = Net() if model is None else model
        self.schedule = Schedule(weight_gradients=RotatedTopK(density, steps, **rest))
        self.compiled, self.backend = compiled(self.model, self.schedule)
        settings = {"lr": 0.01, "weight_decay": 0.0} | (optimizer or {})
        self.optimizer = make(self.model.parameters(), self.backend, **settings)

    def backward(self, x: Tensor) -> None:
        loss_of(self.compiled(x)).backward()

    def train(self, start: int, stop: int) -> Run:
        for step in range(start, stop):
            self.optimizer.zero_grad()
            self.backward(batch(step))
            self.optimizer.step()
        return self

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


RECIPES = {
    "AdamW": Recipe(0.1, 2),
    "both sides": Recipe(0.1, 2, sides="both"),
    "both sides, all": Recipe(0.3, 2, candidates=8.0, sides="both"),
    "decay and scale": Recipe(0.1, 2, decay=0.1, scale=3.0),
    "no other candidates": Recipe(0.2, 1, candidates=1.0),
    "all are candidates": Recipe(0.3, 2, candidates=8.0),
    "chosen every 2": Recipe(0.1, 2, every=2),
    "chosen over 1 step": Recipe(0.1, 4),
    "chosen over 2 steps": Recipe(0.1, 8),
    "chosen over 1 step, then every 2": Recipe(0.1, 4, every=2),
    "SGD": Recipe(0.1, 2, momentum=0.9, lr=0.1),
}


@pytest.mark.parametrize("packed", [False, True], ids=["O I", "I O"])
@pytest.mark.parametrize("name", RECIPES)
def test_training_is_that_of_the_formula(name, packed):
    recipe, model = RECIPES[name], Net(packed)
    reference = Reference(model, dict.fromkeys(CHOSEN, packed), recipe)
    settings = {"lr": recipe.lr, "weight_decay": recipe.decay, "kept_scale": recipe.scale}
    make = SparseAdamW
    if recipe.momentum is not None:
        make, settings["momentum"] = sparse(torch.optim.SGD), recipe.momentum
    run = Run(
        *(recipe.density, recipe.steps),
        model=model,
        optimizer=settings,
        make=make,
        candidates=recipe.candidates,
        sides=recipe.sides,
        choose_every=recipe.every,
    )
    for step in range(recipe.steps + 5):
        reference.model.zero_grad()
        loss_of(reference.model(batch(step))).backward()
        reference.step()
        run.train(step, step + 1)
        theirs = dict(reference.model.named_parameters())
        for parameter, value in model.named_parameters():
            torch.testing.assert_close(
                value, theirs[parameter], rtol=1e-7, atol=1e-9, msg=f"{parameter}, {step}"
            )
    assert not torch.allclose(model.layers[0].up.weight, Net(packed).layers[0].up.weight, atol=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_density_1_is_dense_adamw_exactly(decay):
    dense = Net()
    run = Run(1.0, 1, optimizer={"weight_decay": decay})
    plain = torch.compile(dense, backend="aot_eager")
    optimizer = torch.optim.AdamW(dense.parameters(), lr=0.01, weight_decay=decay)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(plain(batch(step))).backward()
        optimizer.step()
    run.train(0, 5)
    torch.testing.assert_close(
        run.weights(), torch.cat([p.flatten() for p in dense.parameters()]), rtol=1e-12, atol=0
    )
    assert state_bytes(run.optimizer) == state_bytes(optimizer)


def test_no_dense_gradient_exists_after_the_calibration():
    run = Run().train(0, 2)
    gradients = {name: p.grad for name, p in run.model.named_parameters()}
    assert all(gradients[name] is None for name in CHOSEN)
    run.optimizer.zero_grad()
    run.backward(batch(2))
    for name, parameter in run.model.named_parameters():
        assert (parameter.grad is None) == (name in CHOSEN)


def test_a_calibrated_weight_has_its_dense_gradient():
    run, eager = Run(), Net()
    run.backward(batch(0))
    loss_of(eager(batch(0))).backward()
    for (name, ours), theirs in zip(run.model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15, msg=name)


def test_the_phases_do_not_recompile():
    run = Run()
    with torch._dynamo.config.patch(error_on_recompile=True):
        run.train(0, 5)


def test_state_is_for_kept_entries_alone():
    density = 0.05
    run = Run(density).train(0, 4)
    dense = 2 * 8 * sum(dict(run.model.named_parameters())[name].numel() for name in CHOSEN)
    others = 2 * 8 * sum(p.numel() for n, p in run.model.named_parameters() if n not in CHOSEN)
    positions = sum(w["indices"].nbytes for w in run.backend.state_dict()["rotation"]["weights"].values())
    assert 0 < state_bytes(run.optimizer) - others + positions <= 2.5 * density * dense


@pytest.mark.parametrize("steps", [3, 8])
@pytest.mark.parametrize("start", [1, 2, 3, 4, 7], ids=lambda step: f"at step {step}")
@pytest.mark.parametrize("optimizer_first", [False, True])
def test_resumed_run_equals_the_uninterrupted_one(start, steps, optimizer_first, tmp_path):
    """At steps 1 and 2 a calibration of 3 steps is not done yet; at 3 no entries are chosen yet. One of 8
    steps knows the basis after 6, and at 7 half of what entries are chosen by."""
    whole = Run(steps=steps, choose_every=3).train(0, 10)
    first = Run(steps=steps, choose_every=3).train(0, start)
    parts = (first.model, first.backend, first.optimizer)
    torch.save([part.state_dict() for part in parts], tmp_path / "state.pt")
    second = Run(steps=steps, choose_every=3)
    parts = (second.model, second.backend, second.optimizer)
    loaded = list(zip(parts, torch.load(tmp_path / "state.pt", weights_only=True), strict=True))
    for part, state in loaded[::-1] if optimizer_first else loaded:
        part.load_state_dict(state)
    second.train(start, 10)
    assert torch.equal(second.weights(), whole.weights())


@pytest.mark.parametrize("optimizer_first", [False, True])
@pytest.mark.parametrize("start", [1, 4], ids=["calibrating", "rotated"])
def test_state_loaded_into_a_run_that_went_elsewhere(start, optimizer_first, tmp_path):
    whole = Run().train(0, 6)
    run = Run().train(0, start)
    parts = [run.model, run.backend, run.optimizer]
    torch.save([part.state_dict() for part in parts], tmp_path / "state.pt")
    run.train(10, 14)
    loaded = list(zip(parts, torch.load(tmp_path / "state.pt", weights_only=True), strict=True))
    for part, state in loaded[::-1] if optimizer_first else loaded:
        part.load_state_dict(state)
    assert torch.equal(run.train(start, 6).weights(), whole.weights())


@pytest.mark.parametrize("step", [0, 3], ids=["calibrating", "rotated"])
def test_micro_batches_add_up(step):
    whole, parts = Run().train(0, step), Run().train(0, step)
    assert torch.equal(whole.weights(), parts.weights())
    x = batch(step, samples=6)
    for run in (whole, parts):
        run.optimizer.zero_grad()
    loss_of(whole.compiled(x)).backward()
    for half in x.split(3):
        (loss_of(parts.compiled(half)) / 2).backward()
    for run in (whole, parts):
        run.optimizer.step()
    torch.testing.assert_close(whole.weights(), parts.weights(), rtol=1e-6, atol=1e-9)


def test_gradients_are_clipped_together():
    run = Run(optimizer={"max_grad_norm": 1e-3}, make=sparse(torch.optim.SGD)).train(0, 3)
    run.optimizer.zero_grad()
    before = run.weights()
    run.backward(batch(3))
    norms = [float(p.grad.norm()) for p in run.optimizer.gradients()]
    assert len(norms) == 4 + 4 + 2  # entries, biases, the head
    run.optimizer.step()
    assert float((run.weights() - before).norm()) == pytest.approx(0.01 * 1e-3, rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])  # which PyTorch would let skip a step by itself
def test_grad_scaler_unscales_kept_entries_and_skips_an_overflow(fused):
    settings = {"weight_decay": 0.1, "max_grad_norm": 0.1, "fused": fused}
    plain, scaled = (Run(optimizer=settings).train(0, 3) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain.train(3, 5)
    for step in (3, 99, 4):
        scaled.optimizer.zero_grad()
        loss = loss_of(scaled.compiled(batch(step)))
        scaler.scale(loss * (float("inf") if step == 99 else 1.0)).backward()
        scaler.step(scaled.optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    torch.testing.assert_close(scaled.weights(), plain.weights(), rtol=1e-9, atol=1e-12)


def test_another_optimizer_afterwards_is_refused():
    run = Run().train(0, 4)
    run.optimizer = None
    gc.collect()
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.01)
    with pytest.raises(RuntimeError, match=r"needs an optimizer of sparse_compile\.optim"):
        run.train(4, 5)


def test_what_an_overflow_left_behind_does_not_last():
    """`model.zero_grad()` knows nothing of the kept entries."""
    run = Run().train(0, 4)
    (loss_of(run.compiled(batch(4))) * float("inf")).backward()
    run.model.zero_grad()
    run.backward(batch(5))
    run.optimizer.step()
    assert bool(run.weights().isfinite().all())


def test_entries_are_not_chosen_by_an_overflow():
    """The first gradient after the calibration overflows; the entries are those of the next one."""
    whole, run = Run().train(0, 6), Run().train(0, 2)
    (loss_of(run.compiled(batch(9))) * float("inf")).backward()
    run.train(2, 6)
    assert torch.equal(run.weights(), whole.weights())


def test_gradient_by_another_way_is_rotated_too():
    """A penalty on a weight, outside of the graph, doubles what the backward gives."""
    run, twice = Run(make=sparse(torch.optim.SGD)).train(0, 4), Run(make=sparse(torch.optim.SGD)).train(0, 4)
    weight, other = (r.model.layers[0].up.weight for r in (run, twice))
    before = weight.detach().clone()
    for r in (run, twice):
        r.optimizer.zero_grad()
        r.backward(batch(4))
    eager = Net()
    eager.load_state_dict(twice.model.state_dict())
    loss_of(eager(batch(4))).backward()
    other.grad = eager.layers[0].up.weight.grad
    for r in (run, twice):
        r.optimizer.step()
    torch.testing.assert_close(other - before, 2 * (weight - before), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_everything_else_may_be_frozen(compiler):
    """The first chosen layer then asks for no input gradient, and nothing in its graph reads our op."""
    model = Net()
    method = RotatedTopK(0.1, 1)
    freeze_unselected(model, method, keep="head")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {*CHOSEN, "head.weight", "head.bias"}
    run, backend = compiled(model, Schedule(weight_gradients=method), compiler)
    optimizer = SparseAdamW(
        [p for p in model.parameters() if p.requires_grad], backend, lr=0.01, weight_decay=0.0
    )
    for step in range(4):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        loss_of(run(batch(step))).backward()
        optimizer.step()
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == trained, step


def test_merge_leaves_an_ordinary_model():
    run = Run().train(0, 4)
    state = run.model.state_dict()
    run.optimizer.merge()
    assert state.keys() == Net().state_dict().keys()
    run.train(4, 5)
    assert all(p.grad is not None for p in run.model.parameters())
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.model.parameters()}
    run.train(5, 8)
    assert all(p.grad is not None for p in run.model.parameters())


@pytest.mark.parametrize("linear", [Reuse(0.5), Sample(0.5), Sample(0.5, gradients="weight")])
def test_other_methods_estimate_the_rows_that_are_rotated(linear):
    """What is rotated is the dW of the estimate."""
    schedule = Schedule(linear=linear, weight_gradients=RotatedTopK(0.5, 1, candidates=2.0))
    torch.manual_seed(3)
    model, dense = Net(), Net()
    run, backend = compiled(model, schedule)
    other, _ = compiled(dense, Schedule(linear=linear))
    optimizer = SparseAdamW(model.parameters(), backend, lr=0.0)
    plain = torch.optim.AdamW(dense.parameters(), lr=0.0)
    for step in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        loss_of(run(batch(step))).backward()
        loss_of(other(batch(step))).backward()
        if step == 2:
            break
        optimizer.step()
        plain.step()
    for rotated in backend.rotation.among(p for g in optimizer.param_groups for p in g["params"]):
        name = f"{rotated.name}.weight"
        g = dict(dense.named_parameters())[name].grad
        u, v = rotated.basis.like(g)
        s = g @ v if u is None else u.t() @ g
        assert s.numel() == g.numel()
        torch.testing.assert_close(
            rotated.entries.grad, s.flatten()[rotated.indices.long()], rtol=1e-9, atol=1e-12
        )


def test_report_says_what_is_kept_and_what_it_costs():
    run = Run(0.02, 2, candidates=2.0)
    run.train(0, 1)
    sites = {site.name: site for site in run.backend.report().sites}
    assert sites["layers.0.up"].reason == "weight gradient recorded until step 2"
    assert sites["layers.0.up"].density == 1.0
    run.train(1, 2)
    calibration = {site.name: site.flops_backward for site in run.backend.report().sites}
    run.train(2, 4)
    report = run.backend.report()
    site = {site.name: site for site in report.sites}["layers.0.up"]
    assert site.density == 2 / 96
    assert site.reason == "2 entries of 16 x 1 of the rotated weight gradient"
    # There is no dX; dW goes by one direction of the inputs: X·v and dYᵀ·(X·v).
    n = 20
    assert calibration["layers.0.up"] == 2 * n * H * F
    rotated = 2 * n * 1 * (F + H)
    assert site.flops_backward == (2 * n * H * F + rotated) / 2
    assert "dW 2.08%" in str(report)
