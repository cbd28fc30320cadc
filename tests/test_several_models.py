"""Bases belong to one layer of one model under one backend, however many there are."""

import copy

import pytest
import torch
from reference import (
    MLP,
    Recipe,
    assert_same_gradients,
    dense_gradients,
    grads_of,
    reference_linears,
    reference_of,
    same,
    square_loss,
)
from torch import nn
from training import Pair, backend_for, batch, is_dense, together

from sparse_compile import Reuse, Schedule

# Dynamo asks the tensors that enter a graph for their `.grad`, and PyTorch warns of it.
SEVERAL_GRAPHS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(23)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.dense(x))


@SEVERAL_GRAPHS
def test_layers_that_share_one_compiled_graph_have_a_base_each():
    """Compiled one by one, equal layers run the same code."""
    pair = Pair(nn.Sequential(Layer(), Layer(), Layer(), Layer()))
    eager = copy.deepcopy(pair.model)
    for layer in pair.model:
        layer.compile(backend=pair.backend)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(4):
        x = batch()
        together(pair.model, pair.reference, run=lambda module, x=x: square_loss(module(x)))
        assert_same_gradients(pair.model, pair.reference, step)
        eager.load_state_dict(pair.model.state_dict())
        assert same(grads_of(pair.model), dense_gradients(eager, x)) == (step == 0)
        pair.step()
    assert pair.backend.step == 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 2  # the first has no dX
    assert [site.name for site in pair.backend.report().sites] == [f"{i}.dense" for i in range(4)]


def test_deep_copy_starts_without_a_base_and_leaves_the_original_alone():
    pair = Pair()
    pair.train(batch())
    pair.train(batch())
    twin = copy.deepcopy(pair.compiled)
    twin_reference = copy.deepcopy(pair.reference)
    for linear in reference_linears(twin_reference):
        linear.forget()
    for step in range(3):
        x = batch()
        together(twin, twin_reference, run=lambda module, x=x: square_loss(module(x)))
        assert_same_gradients(twin, twin_reference, f"of the copy, {step}")
        assert is_dense(twin._orig_mod, x) == (step == 0)
        assert not pair.train(batch())
    names = [site.name for site in pair.backend.report().sites]
    assert names == ["first", "second", "head", "first@1", "second@1", "head@1"]


def test_two_models_of_one_backend_do_not_mix():
    backend = backend_for()
    first, second = Pair(backend=backend), Pair(backend=backend)
    for step in range(3):
        assert first.train(batch()) == (step == 0)
        assert second.train(batch()) == (step == 0)
    assert backend.step == 6


def test_two_models_through_one_compiled_function_do_not_mix():
    """No module is running there that could tell whose forward it is; the parameters can."""
    first, second = Pair(), Pair()
    backend = backend_for()
    compiled = torch.compile(lambda module, x: square_loss(module(x)), backend=backend)
    for step in range(3):
        for pair in (first, second):
            x = batch()
            together(pair.model, run=lambda module, x=x: compiled(module, x))
            together(pair.reference, run=lambda module, x=x: square_loss(module(x)))
            assert_same_gradients(pair.model, pair.reference, step)
            assert is_dense(pair.model, x) == (step == 0)
            pair.step()
    assert backend.step == 6


def test_two_backends_do_not_mix():
    rows = Pair()
    elements = Pair(
        backend=backend_for(Schedule(linear=Reuse(0.4, granularity="element", refresh_every=2))),
        recipe=Recipe(0.4, "element", refresh_every=2),
    )
    exact = Pair(backend=backend_for(Schedule.exact()), recipe=Recipe(0.0))
    for step in range(4):
        x = batch()
        assert rows.train(x) == (step == 0)
        assert elements.train(x) == (step == 0)
        assert exact.train(x)
    assert [pair.backend.step for pair in (rows, elements, exact)] == [4, 4, 4]


def test_backward_after_another_backend_has_run_is_still_its_own():
    rows, exact = Pair(), Pair(backend=backend_for(Schedule.exact()), recipe=Recipe(0.0))
    rows.train(batch())
    x = batch()
    losses = [square_loss(pair.compiled(x)) for pair in (rows, exact)]
    for pair, loss in zip((rows, exact), losses, strict=True):
        pair.model.zero_grad()
        loss.backward()
    assert not is_dense(rows.model, x)
    assert is_dense(exact.model, x)


def test_another_schedule_for_the_same_model_compiles_it_again():
    model = MLP().double()
    backends = backend_for(), backend_for(Schedule(linear=Reuse("2:4")))
    compiled = [torch.compile(model, backend=backend) for backend in backends]
    references = reference_of(model, Recipe(0.7)), reference_of(model, Recipe((2, 4), "n:m"))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(3):
        x = batch()
        for ours, reference in zip(compiled, references, strict=True):
            together(ours, reference, run=lambda module, x=x: square_loss(module(x)))
            assert_same_gradients(model, reference, step)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 2
