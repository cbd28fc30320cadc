"""The ends of blocks: found in the models that people train, marked at the hidden state, and nowhere else."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from reference_vcas import Blocks, ToyBlock
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from tracing import Model, assert_close, differentiable, layer, step, value

from sparse_compile import Sample, Schedule, SparseBackend, passes, sparse_backend

OUR_OP = re.compile(r"= torch\.ops\.sparse_compile\.sample_weights\.default\(")
MARK = re.compile(r"= torch\.ops\.sparse_compile\.boundary\.default\(")
MARK_BACKWARD = re.compile(r"= torch\.ops\.sparse_compile\.boundary_gradient\.default\(")


def t5() -> tuple[nn.Module, dict[str, Any]]:
    """Two layers on each side: the first hands its position bias to the second."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "dropout_rate": 0.0}
    model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **special))
    return model, {"input_ids": torch.randint(3, 99, (3, 9)), "labels": torch.randint(3, 99, (3, 5))}


def encoder(norm_first: bool) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    options = {"dim_feedforward": 16, "dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, **options), 2, enable_nested_tensor=False)
    return layers, {"src": torch.randn(3, 5, 8, requires_grad=True)}


def module_list() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return Blocks().double(), {"x": torch.randn(4, 5, 6, dtype=torch.float64)}


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], list[str]]] = {
    "bert": (lambda: zoo.make("bert"), ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
    "gpt2": (lambda: zoo.make("gpt2"), ["transformer.h.0"]),
    "llama": (lambda: zoo.make("llama"), ["model.layers.0", "model.layers.1"]),
    "t5": (t5, ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
    "vit": (lambda: zoo.make("vit"), ["vit.layers.0"]),
    "mixtral": (lambda: zoo.make("mixtral"), ["model.layers.0"]),
    "encoder, norms last": (lambda: encoder(False), ["layers.0", "layers.1"]),
    "encoder, norms first": (lambda: encoder(True), ["layers.0", "layers.1"]),
    "list of blocks": (module_list, ["blocks.0", "blocks.1"]),
}


class Marker:
    """A backend that marks the blocks and runs the graph as it is, to see what stands at the marks."""

    def __init__(self, where: str | None = None) -> None:
        self.where = where
        self.paths: list[str] = []
        self.values: dict[str, Tensor] = {}

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        paths = passes.mark_blocks(gm, self.where)
        self.paths += paths
        gm.graph.lint()
        values = self.values

        class Run(Interpreter):
            def run_node(self, n: Node) -> Any:
                result = super().run_node(n)
                if n.target is torch.ops.sparse_compile.boundary.default:
                    values[paths[n.args[1]]] = result.detach()
                return result

        return lambda *args: Run(gm).run(*args)


def marked(run: nn.Module, inputs: dict[str, Any], where: str | None = None) -> list[str]:
    """The paths of the blocks that are marked, after a check that what is marked is what they return."""
    returned: dict[str, Tensor] = {}
    modules = dict(run.named_modules())
    marker = Marker(where)
    expected = run(**inputs)
    found = torch.compile(run, backend=marker)(**inputs)
    torch.testing.assert_close(_tensor(found), _tensor(expected))
    for path in marker.paths:
        modules[path].register_forward_hook(lambda _, __, out, p=path: returned.update({p: _tensor(out)}))
    run(**inputs)
    for path in marker.paths:
        torch.testing.assert_close(marker.values[path], returned[path].detach())
    return marker.paths


def _tensor(output: Any) -> Tensor:
    """A hidden state, alone or before other things; or a model's loss."""
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_hidden_state_of_every_block_is_marked_and_nothing_else(name: str) -> None:
    make, expected = MODELS[name]
    assert marked(*make()) == expected


def compiled(
    model: nn.Module, inputs: dict[str, Any], schedule: Schedule
) -> tuple[dict[str, Tensor | None], SparseBackend]:
    torch._dynamo.reset()
    backend = sparse_backend(schedule, compiler="aot_eager", debug=True)
    return zoo.gradients(model, inputs, torch.compile(model, backend=backend)), backend


@pytest.mark.parametrize("name", MODELS)
def test_one_op_for_each_block_and_exact_gradients_where_all_samples_are_kept(name: str) -> None:
    make, paths = MODELS[name]
    exact, _ = compiled(*make(), Schedule.exact())
    found, backend = compiled(*make(), Schedule(blocks=Sample(1.0)))
    (graph,) = backend.graphs
    assert len(MARK.findall(graph.before)) == len(MARK_BACKWARD.findall(graph.before)) == len(paths)
    assert len(OUR_OP.findall(graph.after)) == len(paths)
    assert "boundary" not in graph.after
    blocks = [site for site in backend.report().sites if site.kind == "block"]
    assert sorted(site.name for site in blocks) == sorted(paths)
    assert {(site.rewritten, site.calls, site.method) for site in blocks} == {(True, 1, "exact")}
    assert found.keys() == exact.keys()
    for key, expected in exact.items():
        assert (found[key] is None) == (expected is None)
        assert expected is None or torch.equal(found[key], expected), key


def test_weights_are_not_rounded_to_the_type_of_the_gradient():
    """16 / 15 would be 1.0625 in bfloat16, 0.4 % too little, and as much again at every block."""
    model = nn.ModuleList([ToyBlock()]).bfloat16()
    nn.init.zeros_(model[0].down.weight)
    run = torch.compile(
        lambda x: model[0](x), backend=sparse_backend(Schedule(blocks=Sample(15 / 16)), compiler="aot_eager")
    )
    x = torch.randn(16, 3, 6, dtype=torch.bfloat16, requires_grad=True)
    (15 * run(x)).sum().backward()
    assert x.grad.unique().tolist() == [0.0, 16.0]


# Which modules are the blocks


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("BertLayer", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        ("encoder.layer.1", ["bert.encoder.layer.1"]),
        ("encoder", ["bert.encoder"]),
        ("BertAttention", ["bert.encoder.layer.0.attention", "bert.encoder.layer.1.attention"]),
    ],
)
def test_blocks_by_class_name_and_by_path(where: str, expected: list[str]) -> None:
    assert marked(*zoo.make("bert"), where) == expected


def test_a_numbered_layer_is_a_block_if_it_is_asked_for() -> None:
    model = nn.Sequential(layer(), nn.Tanh(), layer(4, 3)).double()
    assert marked(model, {"input": value(5, 6)}, "Linear") == ["0", "2"]


def test_a_decorator_around_the_forward_is_not_in_a_path() -> None:
    """The compiled frame is the decorator's, where the model is ``args[0]``."""

    def unchanged(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        return wrapper

    class Decorated(nn.Sequential):
        forward = unchanged(nn.Sequential.forward)

    def model() -> nn.Module:
        return Decorated(toy_block(), toy_block()).double()

    inputs = {"input": value(5, 6)}
    assert marked(model(), inputs) == ["0", "1"]
    assert marked(model(), inputs, where="1") == ["1"]
    backend = sparse_backend(Schedule(exclude="1.lin"), compiler="aot_eager")
    torch.compile(model(), backend=backend)(**inputs).sum().backward()
    assert [(s.name, s.rewritten) for s in backend.report().sites] == [("0.lin", True), ("1.lin", False)]


def test_an_inner_list_of_layers_does_not_hide_its_block() -> None:
    """The outermost numbered module counts: the layers of a block's own Sequential are no blocks."""

    def block() -> nn.Module:
        return Model(lambda m, x: x + m.mlp(x), mlp=nn.Sequential(nn.Sequential(layer(6, 6), nn.Tanh())))

    model = Model(lambda m, x: m.blocks(x), blocks=nn.Sequential(block(), block()))
    assert marks_of(model, value(5, 6)) == ["blocks.0", "blocks.1"]


# Near misses


def marks_of(run: Callable[..., Any], *inputs: Any) -> list[str]:
    marker = Marker()
    torch.compile(run, backend=marker)(*inputs)
    return marker.paths


def toy_block() -> nn.Module:
    return Model(lambda m, x: x + torch.tanh(m.lin(x)), lin=layer(6, 6))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(layer(), nn.Tanh(), layer(4, 3)).double(),
        Model(lambda m, x: m.b(torch.tanh(m.a(x))), a=layer(), b=layer(4, 3)),
        Model(lambda m, x: m.inner(x), inner=toy_block()),
    ],
    ids=["Sequential of plain layers", "named layers", "one block without a number"],
)
def test_a_model_without_blocks_has_no_marks(model: nn.Module) -> None:
    assert marks_of(model, value(5, 6)) == []


def test_a_block_whose_output_is_not_used_is_not_marked() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.blocks[0](x)
        m.blocks[1](h)
        return h * 2

    model = Model(forward, blocks=nn.ModuleList([toy_block(), toy_block()]))
    assert marks_of(model, value(5, 6)) == ["blocks.0"]


def test_a_block_that_returns_one_number_is_not_marked() -> None:
    """Of a loss there are no samples to drop."""
    total = Model(lambda m, x: torch.tanh(m.lin(x)).sum(), lin=layer(6, 6))
    model = Model(lambda m, x: m.blocks[1](m.blocks[0](x)), blocks=nn.ModuleList([toy_block(), total]))
    assert marks_of(model, value(5, 6)) == ["blocks.0"]


def test_a_block_that_runs_twice_is_marked_at_its_end() -> None:
    """Layers with shared weights, as in ALBERT: the second run reads what the first returned."""
    model = Model(lambda m, x: m.blocks[0](m.blocks[0](x)), blocks=nn.ModuleList([toy_block()]))
    assert marks_of(model, value(5, 6)) == ["blocks.0"]


def ops_of(model: nn.Module, *inputs: Any) -> tuple[list[str], SparseBackend]:
    """The blocks in the report after a forward and, where there is a gradient, a backward."""
    backend = sparse_backend(Schedule(blocks=Sample(0.5)), compiler="aot_eager", debug=True)
    out = torch.compile(model, backend=backend)(*inputs)
    if out.requires_grad:
        out.sum().backward()
    return [site.name for site in backend.report().sites if site.kind == "block"], backend


def four_blocks() -> nn.Module:
    return Model(lambda m, x: m.blocks(x), blocks=nn.Sequential(*(toy_block() for _ in range(4))))


def test_blocks_below_the_last_trained_one_have_no_op() -> None:
    """No gradient goes there."""
    model = four_blocks()
    model.blocks[:2].requires_grad_(False)
    found, backend = ops_of(model, value(5, 6, grad=False))
    assert found == ["blocks.3", "blocks.2"]
    (graph,) = backend.graphs
    assert len(OUR_OP.findall(graph.after)) == 2
    assert "boundary" not in graph.after


def test_frozen_blocks_between_trained_ones_pass_the_gradient_on() -> None:
    model = four_blocks()
    model.blocks[1:3].requires_grad_(False)
    assert ops_of(model, value(5, 6, grad=False))[0] == ["blocks.3", "blocks.2", "blocks.1", "blocks.0"]


@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "no_grad"])
def test_a_graph_without_a_gradient_has_no_marks_left(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward holds no copy where a mark was."""
    model = four_blocks().requires_grad_(grad)
    graphs: list[GraphModule] = []
    monkeypatch.setattr(
        "sparse_compile.compilers.make_boxed_func",
        lambda run: graphs.append(run.__self__) or torch._functorch.aot_autograd.make_boxed_func(run),
    )
    x = value(5, 6, grad=False)
    with torch.no_grad():
        found, _ = ops_of(model, x)
        assert found == []
    (graph,) = graphs
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)) == 4
    assert "boundary" not in graph.code
    assert "clone" not in graph.code


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_are_summed_in_at_least_single_precision(dtype: torch.dtype) -> None:
    """Squares of half-precision gradients would overflow; the gradient itself keeps its type."""
    model = four_blocks().to(dtype)
    backend = sparse_backend(Schedule(blocks=Sample(0.5)), compiler="aot_eager", debug=True)
    x = torch.randn(8, 6, dtype=dtype, requires_grad=True)
    torch.compile(model, backend=backend)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    wide = "f64" if dtype == torch.float64 else "f32"
    weights = re.findall(r'sample_weights_default\w*: "(\w+)\[8\]"', backend.graphs[0].after)
    assert weights == [wide] * 4


def test_dynamic_batch_sizes() -> None:
    model = four_blocks()
    backend = sparse_backend(Schedule(blocks=Sample(0.5)), compiler="aot_eager", debug=True)
    run = torch.compile(model, backend=backend, dynamic=True)
    for batch in (8, 12, 6):
        run(value(batch, 6)).sum().backward()
        blocks = [site for site in backend.report().sites if site.kind == "block"]
        assert [site.shape for site in blocks] == [(batch,)] * 4
    assert len(backend.graphs) == 1


def test_a_block_that_returns_a_slice() -> None:
    """The mark copies it, so that the next layer's views are of a contiguous tensor; they must stay so."""

    def block() -> nn.Module:
        return Model(lambda m, x: torch.tanh(m.lin(x))[:, 1:], lin=layer(6, 6))

    model = Model(lambda m, x: m.head(m.blocks(x)), blocks=nn.Sequential(block(), block()), head=layer())
    x = value(4, 5, 6)
    wanted = differentiable(model, [x])
    backend = sparse_backend(Schedule(blocks=Sample(1.0)), compiler="aot_eager")
    assert_close(step(torch.compile(model, backend=backend), [x], wanted), step(model, [x], wanted))
