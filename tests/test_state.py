"""A saved backend continues the run it was taken from, bit for bit."""

import re

import pytest
import torch
from reference import MLP, square_loss

from sparse_compile import Reuse, Sample, Schedule, sparse_backend

SCHEDULES = {
    "row": Schedule(linear=Reuse(0.7)),
    "sampled elements": Schedule.resprop(0.8),
    "refreshed every 4": Schedule(linear=Reuse(0.7, source="sample", refresh_every=4)),
    "phases": Schedule(linear=Reuse([(0.5, 0.0), (0.9, 0.5)]), total_steps=6),
    "exact": Schedule.exact(),
    "drawn rows": Schedule(linear=Sample(0.5)),
}


def batch(step):
    return torch.randn(6, 5, 6, generator=torch.Generator().manual_seed(step))


class Run:
    """A model in training; ``seed`` is what the backend's random choices start from."""

    def __init__(self, schedule, seed=0) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = MLP()
        torch.manual_seed(seed)
        self.backend = sparse_backend(schedule, compiler="aot_eager")
        self.compiled = torch.compile(self.model, backend=self.backend)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def train(self, start, stop):
        for step in range(start, stop):
            self.optimizer.zero_grad()
            square_loss(self.compiled(batch(step))).backward()
            self.optimizer.step()
        return self

    def save(self, path):
        parts = self.model, self.backend, self.optimizer
        torch.save([part.state_dict() for part in parts], path)

    def load(self, path):
        states = torch.load(path, weights_only=True)
        for part, state in zip((self.model, self.backend, self.optimizer), states, strict=True):
            part.load_state_dict(state)
        return self

    def weights(self):
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("used", [False, True], ids=["into a fresh run", "into a run that went elsewhere"])
def test_resumed_run_equals_the_uninterrupted_one(name, used, tmp_path):
    whole = Run(SCHEDULES[name]).train(0, 6)
    Run(SCHEDULES[name]).train(0, 3).save(tmp_path / "state.pt")
    resumed = Run(SCHEDULES[name], seed=5)
    if used:
        resumed.train(20, 22)
    resumed.load(tmp_path / "state.pt")
    assert resumed.backend.step == 3
    resumed.train(3, 6)
    assert torch.equal(resumed.weights(), whole.weights())
    assert resumed.backend.step == 6
    assert resumed.backend.report().totals == whole.backend.report().totals  # since the start


@pytest.mark.parametrize("name", ["row", "sampled elements"])
def test_without_the_backends_state_the_run_is_another(name, tmp_path):
    """So the test above sees that it is loaded."""
    whole = Run(SCHEDULES[name]).train(0, 6)
    half = Run(SCHEDULES[name]).train(0, 3)
    half.save(tmp_path / "state.pt")
    resumed = Run(SCHEDULES[name])
    fresh = resumed.backend.state_dict()
    resumed.load(tmp_path / "state.pt")
    resumed.backend.load_state_dict(fresh)
    resumed.train(3, 6)
    assert not torch.equal(resumed.weights(), whole.weights())


def test_a_compiled_model_that_is_saved_whole_goes_on_with_its_schedule(tmp_path):
    whole = Run(SCHEDULES["sampled elements"]).train(0, 6)
    half = Run(SCHEDULES["sampled elements"]).train(0, 3)
    torch.save((half.compiled, half.backend, half.optimizer.state_dict()), tmp_path / "model.pt")
    resumed = Run(Schedule.exact(), seed=5)
    resumed.compiled, resumed.backend, optimizer = torch.load(tmp_path / "model.pt", weights_only=False)
    resumed.model = resumed.compiled._orig_mod
    resumed.optimizer = torch.optim.AdamW(resumed.model.parameters(), lr=0.01)
    resumed.optimizer.load_state_dict(optimizer)
    assert resumed.backend.step == 3
    assert torch.equal(resumed.train(3, 6).weights(), whole.weights())
    assert resumed.backend.report().totals == whole.backend.report().totals


def test_what_was_measured_before_a_state_is_taken_is_forgotten(tmp_path):
    """By a backward that compiles the model, say."""
    schedule = Schedule.vcas(cal_var_freq=4, update="solve")
    whole = Run(schedule).train(0, 10)
    Run(schedule).train(0, 6).save(tmp_path / "state.pt")
    resumed = Run(schedule)
    square_loss(resumed.compiled(batch(20))).backward()
    resumed.load(tmp_path / "state.pt").train(6, 10)
    assert len(whole.backend.report().history) == 3
    assert resumed.backend.report().history == whole.backend.report().history
    assert torch.equal(resumed.weights(), whole.weights())


def test_the_state_of_an_untrained_backend_makes_a_trained_one_forget(tmp_path):
    run = Run(SCHEDULES["row"])
    run.save(tmp_path / "state.pt")
    first = run.train(0, 3).weights()
    again = run.load(tmp_path / "state.pt").train(0, 3).weights()
    assert torch.equal(first, again)


def test_state_that_was_taken_does_not_move_on():
    run = Run(SCHEDULES["row"]).train(0, 2)
    state = run.backend.state_dict()
    before = {name: value.clone() for name, value in tensors(state).items()}
    assert len(before) == 3
    run.train(2, 4)
    assert all(torch.equal(value, before[name]) for name, value in tensors(state).items())


def tensors(value, path=""):
    """Every tensor inside a state, by where it is."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    return {name: tensor for key, part in parts for name, tensor in tensors(part, f"{path}/{key}").items()}


def test_state_may_be_saved_again_before_the_model_has_run(tmp_path):
    """A run that is interrupted twice, the second time before its first step."""
    whole = Run(SCHEDULES["sampled elements"]).train(0, 6)
    Run(SCHEDULES["sampled elements"]).train(0, 3).save(tmp_path / "first.pt")
    Run(SCHEDULES["sampled elements"], seed=1).load(tmp_path / "first.pt").save(tmp_path / "second.pt")
    resumed = Run(SCHEDULES["sampled elements"], seed=2).load(tmp_path / "second.pt").train(3, 6)
    assert torch.equal(resumed.weights(), whole.weights())


def test_state_of_another_schedule_is_refused():
    state = Run(Schedule(linear=Reuse(0.5))).train(0, 2).backend.state_dict()
    backend = Run(SCHEDULES["row"]).backend
    with pytest.raises(ValueError, match=r"^state is of another schedule, .*ratio=0\.5.*own, .*ratio=0\.7"):
        backend.load_state_dict(state)
    assert backend.step == 0


@pytest.mark.parametrize(
    ("junk", "lacks"),
    [
        ({}, "controller, schedule, seed, sites, step"),
        ({"seed": 1, "step": 2, "model": 3}, "controller, schedule, sites"),
        (
            {"seed": 1, "step": 2, "schedule": 3, "sites": {}, "controller": {"s": 0.0}},
            "controller.history, controller.row_shares, controller.sample_shares",
        ),
    ],
)
def test_state_of_something_else_is_refused(junk, lacks):
    message = f"state is no SparseBackend.state_dict(): it lacks {lacks}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Run(SCHEDULES["row"]).backend.load_state_dict(junk)


def test_state_with_an_impossible_step_is_refused():
    backend = Run(SCHEDULES["row"]).backend
    with pytest.raises(ValueError, match="is -1; allowed is an int >= 0"):
        backend.load_state_dict({**backend.state_dict(), "step": -1})
    assert backend.step == 0


def test_what_is_no_state_is_refused():
    with pytest.raises(ValueError, match="state is None; allowed is a SparseBackend"):
        Run(SCHEDULES["row"]).backend.load_state_dict(None)


class Stack(torch.nn.Sequential):
    def __init__(self, layers, width):
        super().__init__(*(torch.nn.Linear(width, width) for _ in range(layers)))


@pytest.mark.parametrize("when", ["before it runs", "after"])
@pytest.mark.parametrize(
    ("layers", "width", "said"),
    [
        (2, 4, "it has a layer '2', which this one lacks"),
        (3, 8, r"sizes of '\d' are \(4, 4\) there, and \(8, 8\) here"),
    ],
)
def test_state_of_another_model_is_refused(layers, width, said, when):
    def run(model, backend, x):
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            square_loss(compiled(x)).backward()

    first, second = (sparse_backend(SCHEDULES["row"], compiler="aot_eager") for _ in range(2))
    run(Stack(3, 4), first, torch.randn(2, 5, 4))
    model, x = Stack(layers, width), torch.randn(2, 5, width)
    state = first.state_dict()
    refused = pytest.raises(ValueError, match=f"^state is of another model: {said}")
    if when == "after":
        run(model, second, x)
        before = second.state_dict()
        with refused:
            second.load_state_dict({**state, "step": 7})
        assert (second.step, second.state_dict()["seed"]) == (0, before["seed"])
    else:
        second.load_state_dict(state)
        with refused:
            run(model, second, x)


class Parts(torch.nn.Module):
    """One weight that is used in parts of unlike size, as a cross attention uses that of its q, k and v."""

    def __init__(self):
        super().__init__()
        self.weight_of_all = torch.nn.Parameter(torch.randn(9, 4))

    def forward(self, x):
        q = torch.nn.functional.linear(x, self.weight_of_all[:3])
        return torch.nn.functional.linear(torch.tanh(x), self.weight_of_all[3:]).sum(-1) + q.sum(-1)


def test_a_weight_that_is_used_in_parts_is_of_this_model():
    backends = [sparse_backend(SCHEDULES["row"], compiler="aot_eager") for _ in range(2)]
    model, x = Parts(), torch.randn(2, 5, 4)
    for backend in backends:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            square_loss(compiled(x)).backward()
        assert len({site.name for site in backend.report().sites}) == 1
        backends[1].load_state_dict(backends[0].state_dict())
        square_loss(compiled(x)).backward()


def test_a_function_of_several_modules_has_its_own_state():
    body, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)
    backend = sparse_backend(SCHEDULES["row"], compiler="aot_eager")
    compiled = torch.compile(lambda x: head(torch.tanh(body(x))), backend=backend)
    for _ in range(2):
        square_loss(compiled(torch.randn(2, 5, 4))).backward()
    backend.load_state_dict(backend.state_dict())
    square_loss(compiled(torch.randn(2, 5, 4))).backward()
