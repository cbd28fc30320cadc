"""Every use of a layer has its base, whatever happens between its backwards."""

import pytest
import torch
from reference import MLP, Recipe, assert_same_gradients, grads_of, reference_of, square_loss
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import Pair, backend_for, batch, is_dense, together

from sparse_compile import Schedule

# Dynamo asks the tensors that enter a graph for their `.grad`, and PyTorch warns of it.
SEVERAL_GRAPHS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(13)


def test_gradient_accumulation_reuses_from_one_backward_to_the_next():
    pair = Pair()
    for step in range(3):
        pair.model.zero_grad()
        pair.reference.zero_grad()
        for _ in range(4):
            x = batch()
            square_loss(pair.compiled(x)).backward()
            square_loss(pair.reference(x)).backward()
            assert_same_gradients(pair.model, pair.reference, step)
        pair.step()
        assert pair.backend.step == step + 1


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 1e308])
def test_overflow_does_not_poison_the_base(factor):
    """A GradScaler would see the overflow and skip the optimizer's step; the next backward starts anew."""
    pair = Pair()
    assert [pair.train(batch()) for _ in range(2)] == [True, False]
    pair.model.zero_grad()
    (square_loss(pair.compiled(batch())) * factor * 1e10).backward()
    assert not torch.stack([grad.isfinite().all() for grad in grads_of(pair.model)]).all()
    assert pair.backend.step == 2
    pair.forget()
    assert [pair.train(batch()) for _ in range(2)] == [True, False]


def test_large_gradients_that_are_finite_are_remembered():
    """In float16 their sum is beyond the largest number, as it may well be under a loss scale of 65536."""
    model = nn.Sequential(nn.Linear(6, 64)).half()
    backend = backend_for()
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        compiled(torch.randn(4, 32, 6).half()).backward(100 + torch.rand(4, 32, 64).half())
    (site,) = backend.report().sites
    assert site.rows_computed == 128 + round(0.3 * 128) + 32


@pytest.mark.parametrize("samples", [(6, 6), (6, 4), (4, 6)])
def test_two_forwards_before_one_backward_have_a_base_each(samples):
    """Also where the two are different graphs of one layer, as the first batches of two sizes are."""
    pair = Pair()
    for step in range(4):
        inputs = [batch(each) for each in samples]

        def siamese(module, inputs=inputs):
            losses = []
            for lane, x in enumerate(inputs):
                pair.lane(lane)
                losses.append(square_loss(module(x)))
            return losses[0] * losses[1]

        together(pair.compiled, pair.reference, run=siamese)
        assert_same_gradients(pair.model, pair.reference, step)
        pair.step()
        assert pair.backend.step == step + 1


def test_a_layer_used_twice_has_a_base_for_each_use():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    model = Twice().double()
    backend = backend_for()
    compiled = torch.compile(model, backend=backend)
    reference = reference_of(model, Recipe(0.7))

    def by_use(x):
        reference.layer.lane = 0
        hidden = torch.tanh(reference.layer(x))
        reference.layer.lane = 1
        return reference.layer(hidden)

    for step in range(4):
        x = batch()
        together(compiled, run=lambda module, x=x: square_loss(module(x)))
        together(reference, run=lambda _, x=x: square_loss(by_use(x)))
        assert_same_gradients(model, reference, step)
        assert is_dense(model, x) == (step == 0)
    (site,) = backend.report().sites
    assert (site.name, site.calls) == ("layer", 2)


def test_second_backward_of_a_retained_graph_is_one_more_backward():
    pair = Pair()
    for _ in range(3):
        x = batch()
        losses = [square_loss(module(x)) for module in (pair.compiled, pair.reference)]
        for repeat in range(2):
            for module, loss in zip((pair.model, pair.reference), losses, strict=True):
                module.zero_grad()
                loss.backward(retain_graph=repeat == 0)
            assert_same_gradients(pair.model, pair.reference, f"{pair.backend.step}, backward {repeat}")
        pair.step()
    assert pair.backend.step == 3


@pytest.mark.parametrize("how", ["no_grad", "eval", "inference_mode"])
def test_forwards_between_steps_change_nothing(how):
    pair = Pair(nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.0), nn.Linear(9, 4)))
    dense = []
    for _ in range(4):
        dense.append(pair.train(batch()))
        if how == "no_grad":
            with torch.no_grad():
                pair.compiled(batch())
        elif how == "inference_mode":
            with torch.inference_mode():
                pair.compiled(batch())
        else:
            pair.compiled.eval()
            with torch.no_grad():
                pair.compiled(batch(samples=3))
            pair.compiled.train()
    assert dense == [True, False, False, False]
    assert pair.backend.step == 4
    assert {site.rows for site in pair.backend.report().sites} == {4 * 30}


def test_forward_without_a_backward_takes_a_lane_until_the_next_step():
    """Nothing tells it from the first half of a siamese pass; so a step that begins with one has, like the
    second forward of a pair, a base of its own, and the first of such steps is dense."""
    pair = Pair()
    dense = []
    for _ in range(5):
        dense.append(pair.train(batch()))
        pair.lane(1)
        pair.compiled(batch().requires_grad_())  # as in `train`, so that it is the same graph
    assert dense == [True, True, False, False, False]


def test_activation_checkpointing_inside_the_model():
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = MLP()

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    pair = Pair(Checkpointed())
    assert [pair.train(batch()) for _ in range(4)] == [True, False, False, False]
    assert pair.backend.step == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_around_the_compiled_model(reentrant):
    pair = Pair()
    for step in range(4):
        x = batch().requires_grad_()
        together(
            pair.compiled,
            pair.reference,
            run=lambda m, x=x: square_loss(checkpoint(m, x, use_reentrant=reentrant)),
        )
        assert_same_gradients(pair.model, pair.reference, step)
        assert is_dense(pair.model, x.detach()) == (step == 0)
        pair.step()
    assert pair.backend.step == 4


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
def test_graph_breaks():
    pair = Pair(Broken())
    assert [pair.train(batch()) for _ in range(4)] == [True, False, False, False]
    assert pair.backend.step == 4
    assert [site.name for site in pair.backend.report().sites] == ["first", "second", "third"]


def test_backward_after_its_backend_is_gone_is_exact():
    model = MLP().double()
    x = batch()
    loss = square_loss(torch.compile(model, backend=backend_for())(x))
    torch._dynamo.reset()
    loss.backward()
    assert is_dense(model, x)


def test_same_seed_same_run_and_another_seed_another():
    def run(seed):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = MLP()
        torch.manual_seed(seed)
        backend = backend_for(Schedule.resprop(0.9))
        compiled = torch.compile(model, backend=backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            square_loss(compiled(torch.randn(6, 5, 6, generator=generator))).backward()
            optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    first, again, other = run(0), run(0), run(1)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))
