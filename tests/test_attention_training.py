"""Training with reuse in attention, step by step beside the eager reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from attention_reference import FEATURES, TOKENS, Model, chain, fused, reference_of
from reference import Recipe, assert_same_gradients, same
from torch import Tensor

from sparse_compile import Monitor, Reuse, Schedule, SparseBackend, sparse_backend
from sparse_compile.memory import Memories

# One padded sample, with three keys. With two, both entries of a row of dS are of one size; where a key is
# padding in two samples, R is the base's in both: the largest entries would then be a matter of choice.
LENGTHS = (6, 6, 3, 6, 6)

pytestmark = pytest.mark.usefixtures("reuse_however_little_it_saves")  # at sizes like these


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def batch(tokens: int = TOKENS, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, the keys that are no padding, and the queries that count in the loss: others have a gradient of
    zero."""
    real = torch.arange(tokens) < torch.tensor(lengths).unsqueeze(1)
    mask = real[:, None, None, :].expand(-1, 1, tokens, -1)
    return torch.randn(len(lengths), tokens, FEATURES, dtype=torch.float64), mask, real


def gradients(model: torch.nn.Module, run: Any, data: tuple[Tensor, Tensor, Tensor]) -> None:
    x, mask, real = data
    model.zero_grad()
    ((run(x, mask) - 1.0).square() * real.unsqueeze(-1)).mean().backward()


class Training:
    """A compiled model and its reference, each with its optimizer."""

    def __init__(self, core: Any, schedule: Schedule, recipe: Recipe, monitor: Monitor | None = None) -> None:
        self.model = Model(core).double()
        self.reference = reference_of(self.model, recipe)
        self.backend = sparse_backend(schedule, compiler="aot_eager", monitor=monitor)
        self.compiled = torch.compile(self.model, backend=self.backend)
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=0.02) for m in (self.model, self.reference)]

    def step(self, data: tuple[Tensor, Tensor, Tensor]) -> bool:
        """One step of both; whether the gradients, which must be the same, are the true ones."""
        gradients(self.model, self.compiled, data)
        gradients(self.reference, self.reference, data)
        assert_same_gradients(self.model, self.reference, self.backend.step)
        exact = copy.deepcopy(self.model)
        gradients(exact, exact, data)
        found = [[p.grad for p in m.parameters()] for m in (self.model, exact)]
        for optimizer in self.optimizers:
            optimizer.step()
        return same(*found)  # type: ignore[arg-type]


def attentions(backend: SparseBackend) -> list[Any]:
    return [site for site in backend.report().sites if site.kind == "attention"]


@pytest.mark.parametrize("core", [fused, chain])
@pytest.mark.parametrize(
    ("ratio", "granularity", "refresh_every"),
    [(0.7, "row", 1), (0.7, "row", 3), (0.7, "element", 3), ("1:4", "n:m", 1), ("2:3", "n:m", 3)],
)
def test_reuse(core: Any, refresh_every: int, ratio: float | str, granularity: str) -> None:
    schedule = Schedule(attention=Reuse(ratio, granularity=granularity, refresh_every=refresh_every))
    n_m = tuple(map(int, ratio.split(":"))) if isinstance(ratio, str) else ratio
    training = Training(core, schedule, Recipe(n_m, granularity, refresh_every))
    assert [training.step(batch()) for _ in range(6)] == [True] + [False] * 5
    for site in attentions(training.backend):
        assert (site.method, site.rewritten) == ("reuse", True)
    if granularity == "row":
        padding = TOKENS * len(LENGTHS) - sum(LENGTHS)
        assert site.rows_skipped == 5 * padding  # at the first step skipping so few does not pay
        assert site.rows_computed < 0.6 * 6 * TOKENS * len(LENGTHS)
    # Other lengths: nothing to reuse in that step.
    assert [training.step(batch(tokens=4, lengths=(4, 3, 4, 4))) for _ in range(2)] == [True, False]


@pytest.mark.parametrize("core", [fused, chain])
@pytest.mark.parametrize("refresh_every", [1, 2])
@pytest.mark.parametrize(("ratio", "granularity"), [(0.7, "row"), (0.7, "element"), ("1:4", "n:m")])
def test_one_sample_stands_in_for_all(
    core: Any, refresh_every: int, ratio: float | str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draw is the reference's choice here: another sample in each step, the padded one among them."""
    reuse = Reuse(ratio, granularity=granularity, source="sample", refresh_every=refresh_every)
    recipe = Recipe((1, 4) if isinstance(ratio, str) else ratio, granularity, refresh_every)
    monkeypatch.setattr(Memories, "draw", lambda self, samples, seed: recipe.sample)
    training = Training(core, Schedule(attention=reuse), recipe)
    for step, recipe.sample in enumerate((3, 2, 0, 4, 1, 2)):
        assert training.step(batch()) == (step == 0)


def test_every_sample_is_drawn_and_sites_draw_for_themselves() -> None:
    memories = [Memories(), Memories()]
    draws = [[memory.draw(5, seed) for _ in range(40)] for memory, seed in zip(memories, "ab", strict=True)]
    assert [set(each) for each in draws] == [{0, 1, 2, 3, 4}] * 2
    assert draws[0] != draws[1]
    resumed = Memories()
    again = [resumed.draw(5, "a") for _ in range(7)]
    resumed.load_state_dict(resumed.state_dict())
    assert again + [resumed.draw(5, "a") for _ in range(33)] == draws[0]


@pytest.mark.parametrize("core", [fused, chain])
@pytest.mark.parametrize("granularity", ["row", "element"])
def test_ratio_zero_is_dense_and_phases_are_the_attentions_own(core: Any, granularity: str) -> None:
    recipe = Recipe(0.0, granularity)
    schedule = Schedule(
        linear=Reuse(0.0), attention=Reuse([(0.0, 0.0), (0.5, 0.5)], granularity=granularity), total_steps=6
    )
    training = Training(core, schedule, recipe)
    assert all(training.step(batch()) for _ in range(3))
    recipe.ratio = 0.5
    assert [training.step(batch()) for _ in range(3)] == [True, False, False]
    assert {site.keep for site in attentions(training.backend)} == {0.5}


@pytest.mark.parametrize("source", ["mean", "sample"])
@pytest.mark.parametrize("granularity", ["row", "element"])
def test_a_resumed_run_continues_the_interrupted_one(granularity: str, source: str) -> None:
    schedule = Schedule(attention=Reuse(0.7, granularity=granularity, source=source, refresh_every=2))
    data = [batch() for _ in range(7)]
    model = Model(fused).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    backend = sparse_backend(schedule, compiler="aot_eager")

    def train(run: Any, batches: list[Any]) -> None:
        for each in batches:
            gradients(model, run, each)
            optimizer.step()

    compiled = torch.compile(model, backend=backend)
    train(compiled, data[:4])
    saved, weights = copy.deepcopy(backend.state_dict()), copy.deepcopy(model.state_dict())
    train(compiled, data[4:])
    expected = [p.detach().clone() for p in model.parameters()]
    torch._dynamo.reset()
    model.load_state_dict(weights)
    resumed = sparse_backend(schedule, compiler="aot_eager")
    resumed.load_state_dict(saved)
    train(torch.compile(model, backend=resumed), data[4:])
    assert all(torch.equal(p, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_a_gradient_that_is_not_finite_is_not_remembered() -> None:
    training = Training(fused, Schedule(attention=Reuse(0.7)), Recipe(0.7, "row"))
    x, mask, real = batch()
    assert [training.step(batch()) for _ in range(2)] == [True, False]
    (training.compiled(x, mask) * torch.inf).sum().backward()
    for module in (training.reference.first, training.reference.second):
        module.core.__defaults__[0].means.clear()
    assert [training.step((x, mask, real)) for _ in range(2)] == [True, False]


def test_attentions_that_are_excluded_are_dense_and_those_in_skipped_blocks_exact() -> None:
    schedule = Schedule(attention=Reuse(0.7), exclude="first")
    model = Model(fused).double()
    backend = sparse_backend(schedule, compiler="aot_eager")
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        gradients(model, compiled, batch())
    first, second = attentions(backend)
    assert (first.method, first.keep, first.rows_skipped) == ("dense", 1.0, 0)
    assert first.reason == "matches the exclude pattern 'first'"
    assert (second.method, round(second.keep, 9)) == ("reuse", 0.3)
