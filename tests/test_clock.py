"""What counts as a training step, and what does not."""

import json
import warnings

import numpy as np
import pytest
import torch
from reference import MLP, square_loss
from torch import nn

from sparse_compile import Reuse, Sample, Schedule, sparse_backend

PHASED = Schedule(linear=Reuse([(0.0, 0.0), (0.5, 0.5)]), total_steps=10)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(11)


class Training:
    def __init__(self, schedule=PHASED, optimizer=torch.optim.SGD, **options) -> None:
        self.backend = sparse_backend(schedule, compiler="aot_eager")
        self.model = MLP()
        self.compiled = torch.compile(self.model, backend=self.backend)
        self.optimizer = optimizer(self.model.parameters(), lr=0.01, **options)

    def loss(self):
        return square_loss(self.compiled(torch.randn(4, 3, 6)))

    def backward(self):
        self.loss().backward()

    @property
    def method(self):
        return {site.method for site in self.backend.report().sites}


def test_one_backward_one_step():
    run = Training()
    for step in range(1, 4):
        run.backward()
        assert run.backend.step == step - 1
        run.optimizer.step()
        assert run.backend.step == step


def test_gradient_accumulation_is_one_step():
    run = Training()
    for step in range(1, 4):
        for _ in range(4):
            run.backward()
        run.optimizer.step()
        assert run.backend.step == step


def test_forwards_alone_are_no_step():
    run = Training()
    run.loss()
    run.optimizer.step()
    assert run.backend.step == 0


def test_two_optimizers_for_one_model_make_one_step():
    run = Training()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in run.model.children()]
    for step in range(1, 4):
        run.backward()
        for optimizer in optimizers:
            optimizer.step()
        assert run.backend.step == step


def test_optimizer_of_another_model_does_not_tick():
    run = Training()
    other = nn.Linear(3, 3)
    stranger = torch.optim.SGD(other.parameters(), lr=0.01)
    for step in range(1, 4):
        for _ in range(4):
            run.backward()
            other(torch.randn(2, 3)).sum().backward()
            # Before its own optimizer has ever stepped, a backend cannot tell a stranger from an
            # optimizer that holds shards of its parameters, as FSDP's does.
            if step > 1:
                stranger.step()
        assert run.backend.step == step - 1
        run.optimizer.step()
        assert run.backend.step == step


def test_optimizer_that_holds_shards_ticks():
    """FSDP's optimizer holds tensors that are no input of any compiled graph."""
    run = Training()
    shards = torch.optim.SGD([p.detach().clone().requires_grad_() for p in run.model.parameters()], lr=0.01)
    for step in range(1, 4):
        run.backward()
        shards.step()
        assert run.backend.step == step


def test_two_backends_count_their_own_steps():
    first, second = Training(), Training()
    first.backward()
    second.backward()
    first.optimizer.step()
    assert (first.backend.step, second.backend.step) == (1, 0)
    second.optimizer.step()
    for _ in range(2):
        second.backward()
        second.optimizer.step()
    assert (first.backend.step, second.backend.step) == (1, 3)


@pytest.mark.parametrize("fused", [False, True])
def test_step_that_a_grad_scaler_skips_does_not_count(fused):
    """A fused optimizer is called in spite of the overflow, and skips the update by itself."""
    run = Training(optimizer=torch.optim.AdamW, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    counted = []
    for step in range(4):
        run.optimizer.zero_grad()
        loss = run.loss() * (float("inf") if step == 1 else 1.0)
        scaler.scale(loss).backward()
        before = [parameter.clone() for parameter in run.model.parameters()]
        scaler.step(run.optimizer)
        scaler.update()
        moved = any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
        assert moved == (step != 1)
        counted.append(run.backend.step)
    assert counted == [1, 1, 2, 3]


def test_closure_with_many_backwards_is_one_step():
    run = Training(optimizer=torch.optim.LBFGS, max_iter=4)
    x = torch.randn(4, 3, 6)

    def closure():
        run.optimizer.zero_grad()
        loss = square_loss(run.compiled(x))
        loss.backward()
        return loss

    for step in range(1, 3):
        run.optimizer.step(closure)
        assert run.backend.step == step


# Dynamo asks the tensors that enter a graph for their `.grad`, and PyTorch warns of it.
SEVERAL_GRAPHS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        x = torch.tanh(self.second(x))
        torch._dynamo.graph_break()
        return self.third(x)


@SEVERAL_GRAPHS
def test_several_graphs_are_one_step():
    backend = sparse_backend(PHASED, compiler="aot_eager")
    model = Broken()
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(1, 4):
        square_loss(compiled(torch.randn(4, 3, 6))).backward()
        optimizer.step()
        assert backend.step == step
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 3
    assert [site.name for site in backend.report().sites] == ["first", "second", "third"]


@SEVERAL_GRAPHS
@pytest.mark.parametrize("each", ["each layer", "a graph break"])
def test_optimizers_that_step_within_the_backward_make_one_step(each):
    """As soon as a parameter has its gradient: its memory is free then."""
    backend = sparse_backend(PHASED, compiler="aot_eager")
    if each == "each layer":
        model = nn.ModuleList([MLP(), MLP()])
        for layer in model:
            layer.compile(backend=backend)

        def compiled(x):
            return model[0](x) + model[1](x)
    else:
        model = Broken()
        compiled = torch.compile(model, backend=backend)
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.01)
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    for step in range(1, 4):
        square_loss(compiled(torch.randn(4, 3, 6))).backward()
        assert backend.step == step


def test_step_may_be_set():
    run = Training()
    run.backward()
    assert run.method == {"exact"}
    run.backend.step = 5
    for _ in range(2):  # the first of them leaves something to reuse
        run.backward()
    assert run.backend.step == 5
    assert run.method == {"reuse"}
    run.optimizer.step()
    assert run.backend.step == 6


def test_step_that_is_set_becomes_a_plain_int():
    """NumPy's would neither be JSON nor pass torch.load(weights_only=True)."""
    backend = sparse_backend(PHASED)
    backend.step = np.int64(3)
    assert type(backend.step) is int
    assert json.dumps(backend.report().to_dict()["step"]) == "3"


@pytest.mark.parametrize("step", [-1, 0.5, "3", None, True])
def test_wrong_step_is_refused(step):
    run = Training()
    run.backend.step = 4
    with pytest.raises(ValueError, match=r"step.*is.*; allowed is an int >= 0"):
        run.backend.step = step
    assert run.backend.step == 4


def test_phases_change_without_a_recompile():
    run = Training(Schedule(linear=Reuse([(0.0, 0.0), (0.5, 0.3), (0.9, 0.6)]), total_steps=10))
    run.backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    keeps = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(10):
            run.backward()
            keeps.append(run.backend.report().sites[0].keep)
            run.optimizer.step()
    assert keeps == [1.0] * 3 + [0.5] * 3 + [0.1] * 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_many_backwards_without_a_step_warn_once():
    run = Training()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(250):
            run.backward()
    assert [str(warning.message) for warning in caught] == [
        "100 backwards and no step of a torch.optim optimizer: the schedule stays at step 0. With an "
        "optimizer of another kind, set `backend.step` after each step."
    ]


def test_a_step_that_is_set_ends_the_one_before():
    """With an optimizer of another kind the adaptive controller decides just as often."""
    run = Training(Schedule(linear=Sample.adaptive(cal_var_freq=2)))
    for done in range(5):
        for _ in range(2):
            run.backward()
        run.backend.step = done + 1
        run.backend.step = done + 1
    assert [entry["step"] for entry in run.backend.report().history] == [0, 2, 4]
    run.backend.step = 9  # no backward belongs to these
    assert len(run.backend.report().history) == 3


def test_an_adaptive_schedule_waits_for_steps():
    run = Training(Schedule(linear=Sample.adaptive()))
    for _ in range(99):
        run.backward()
    with pytest.warns(UserWarning, match="set `backend.step` after each step"):
        run.backward()


@pytest.mark.parametrize("how", ["no phases", "step set", "optimizer steps"])
def test_no_warning_where_the_schedule_does_not_wait(how):
    run = Training(Schedule(linear=Reuse(0.5)) if how == "no phases" else PHASED)
    for done in range(120):  # any warning is an error here
        run.backward()
        if how == "step set":
            run.backend.step = done + 1
        elif how == "optimizer steps" and done % 60 == 59:
            run.optimizer.step()
