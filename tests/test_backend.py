"""The public entry: what it refuses, what it warns of, and what it leaves alone."""

import warnings

import pytest
import torch
from reference import MLP, Recipe, assert_same_gradients, reference_of, square_loss
from torch import nn

import sparse_compile
from sparse_compile import Reuse, Schedule, sparse_backend

NOTHING = (
    "sparse_backend has nothing to rewrite in this model: no linear layer with a gradient was found, and it "
    "trains as under plain torch.compile. backend.report() lists what was seen."
)
SEVERAL_GRAPHS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(19)


def backend_for(schedule=None):
    return sparse_backend(schedule or Schedule.exact(), compiler="aot_eager")


def warnings_of(model, backend, x, backwards=2):
    compiled = torch.compile(model, backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(backwards):
            compiled(x).sum().backward()
    return [str(each.message) for each in caught if each.category is UserWarning]


# Arguments


@pytest.mark.parametrize("schedule", [None, 0.9, "exact", {"linear": 0.9}, Reuse(0.9), Schedule])
def test_schedule_that_is_none_is_refused(schedule):
    with pytest.raises(
        ValueError, match=r"^schedule is .*; allowed is a sparse_compile\.Schedule, e\.g\. "
    ) as e:
        sparse_backend(schedule)
    assert repr(schedule) in str(e.value)


@pytest.mark.parametrize("compiler", ["eager", "Inductor", None, "", 3])
def test_unknown_compiler_is_refused(compiler):
    with pytest.raises(ValueError, match=r"^compiler is .*; allowed is 'inductor' or 'aot_eager'\.$") as e:
        sparse_backend(Schedule.exact(), compiler=compiler)
    assert repr(compiler) in str(e.value)


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        sparse_backend(Schedule.exact(), True)


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_pattern_that_matches_no_module_is_refused_when_the_model_is_compiled(field):
    schedule = Schedule(**{field: ["second", "frist"]})
    message = rf"^Schedule\.{field} has the pattern 'frist', which matches none of \d+ .*near names: 'first'"
    with pytest.raises(ValueError, match=message):
        torch.compile(MLP(), backend=backend_for(schedule))(torch.randn(4, 6))


@pytest.mark.parametrize("index", [3, -4])
def test_block_that_the_model_lacks_is_refused_when_it_is_compiled(index):
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    message = rf"^An index in Schedule\.skip_layers is {index}; allowed is an int in \[-3, 3\) for 3 blocks"
    with pytest.raises(ValueError, match=message):
        torch.compile(Blocks(), backend=backend_for(Schedule(skip_layers=index)))(torch.randn(4, 6))


# Nothing to rewrite


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, x):
        return torch.tanh(self.table(x))


def test_model_without_a_linear_warns_once_and_trains():
    model, backend = Embeddings(), backend_for(Schedule(linear=Reuse(0.9)))
    x = torch.arange(6).view(2, 3)
    assert warnings_of(model, backend, x) == [NOTHING]
    torch.tanh(model.table(x)).sum().backward()  # a third of the gradient, by eager autograd
    third = torch.autograd.grad(torch.tanh(model.table(x)).sum(), model.table.weight)[0]
    torch.testing.assert_close(model.table.weight.grad, 3 * third)
    assert not any(site.rewritten for site in backend.report().sites)


def test_model_with_a_linear_does_not_warn():
    assert warnings_of(MLP(), backend_for(), torch.randn(4, 6)) == []


def test_inference_does_not_warn():
    compiled = torch.compile(MLP(), backend=backend_for())
    with torch.no_grad():
        compiled(torch.randn(4, 6))  # any warning is an error here


class LateLinear(nn.Module):
    """Its first graph has no linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.table(x))
        torch._dynamo.graph_break()
        return self.head(x)


@SEVERAL_GRAPHS
def test_graph_without_a_linear_does_not_warn_where_another_has_one():
    backend = backend_for()
    caught = warnings_of(LateLinear(), backend, torch.arange(6).view(2, 3))
    assert [text for text in caught if "nothing to rewrite" in text] == []
    assert [site.name for site in backend.report().sites if site.rewritten] == ["head"]


@SEVERAL_GRAPHS
def test_graphs_without_any_linear_warn_once_for_all():
    class Two(LateLinear):
        def forward(self, x):
            x = torch.tanh(self.table(x))
            torch._dynamo.graph_break()
            return torch.sin(x * self.head.bias[0])

    caught = warnings_of(Two(), backend_for(), torch.arange(6).view(2, 3))
    assert [text for text in caught if "nothing to rewrite" in text] == [NOTHING]


# Left alone


def test_unsupported_dtype_is_left_alone_with_its_reason():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wave = nn.Linear(6, 5, dtype=torch.complex64)
            self.plain = nn.Linear(5, 4)

        def forward(self, x):
            return self.plain(self.wave(x).abs())

    model, backend = Mixed(), backend_for(Schedule(linear=Reuse(0.5)))
    x = torch.randn(4, 6, dtype=torch.complex64)
    torch.compile(model, backend=backend)(x).sum().backward()
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    sites = {site.name: site for site in backend.report().sites}
    assert sites.keys() == {"wave", "plain"}
    assert sites["plain"].rewritten
    assert not sites["wave"].rewritten
    assert sites["wave"].reason == "dtype torch.complex64 is not supported"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_supported_dtypes_keep_theirs(dtype):
    model, backend = MLP().to(dtype), backend_for(Schedule(linear=Reuse(0.5)))
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        square_loss(compiled(torch.randn(4, 3, 6).to(dtype))).backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {dtype}
    assert all(site.rewritten for site in backend.report().sites)


# How torch.compile calls it


def test_one_graph_when_asked_for_it():
    backend = backend_for()
    torch.compile(MLP(), backend=backend, fullgraph=True, dynamic=True)(torch.randn(4, 6)).sum().backward()
    assert all(site.rewritten for site in backend.report().sites)


@pytest.mark.parametrize("how", [{"mode": "reduce-overhead"}, {"options": {"epilogue_fusion": False}}])
def test_mode_and_options_are_taken(how):
    """They are Inductor's; see the next test for a mode and tests/test_cache.py for options."""
    compiled = torch.compile(MLP(), backend=backend_for(), **how)
    compiled(torch.randn(4, 6)).sum().backward()


def test_reuse_under_inductor_with_a_mode():
    model = MLP()
    reference = reference_of(model, Recipe(0.6))
    backend = sparse_backend(Schedule(linear=Reuse(0.6)))
    compiled = torch.compile(model, backend=backend, mode="reduce-overhead")
    for step in range(3):
        x = torch.randn(6, 5, 6)
        for module in (compiled, reference):
            module.zero_grad()
            square_loss(module(x)).backward()
        assert_same_gradients(model, reference, step, rtol=1e-5)
    assert {site.method for site in backend.report().sites} == {"reuse"}


def test_public_names():
    assert set(sparse_compile.__all__) <= set(dir(sparse_compile))
    assert {"Reuse", "Schedule", "SparseBackend", "sparse_backend"} <= set(sparse_compile.__all__)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_an_activation_memory_budget_of_zero_recomputes_what_it_can(compiler: str) -> None:
    """PyTorch's partitioner fails there on any graph whose backward needs what only its forward can know."""
    model = MLP().double()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with torch._functorch.config.patch(activation_memory_budget=0.0):
        backend = sparse_backend(Schedule.exact(), compiler=compiler)
        loss = torch.compile(model, backend=backend)(x).square().sum()
        found = torch.autograd.grad(loss, list(model.parameters()))
        assert torch._functorch.config.activation_memory_budget == 0.0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert [site.rewritten for site in backend.report().sites] == [True] * 3
