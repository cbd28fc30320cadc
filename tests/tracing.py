"""Joint graphs of small functions and modules, before any compiler, as the passes see and leave them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from functorch.compile import aot_module_simplified, make_boxed_func, min_cut_rematerialization_partition
from sparse_compile.passes import graph as g
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from sparse_compile import PruneSaved, naming, passes
from sparse_compile.sites import SavedRecord, SiteRecord

Run = Callable[..., Any]
DOUBLE = torch.float64


class Model(nn.Module):
    """A module made of parts and one line of forward: ``Model(lambda m, x: m.a(x), a=layer())``."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.to(DOUBLE)

    def forward(self, *inputs: Any) -> Tensor:
        return self._forward(self, *inputs)


def value(*shape: int, grad: bool = True) -> Tensor:
    """A float64 input."""
    return torch.randn(*shape, dtype=DOUBLE, requires_grad=grad)


def layer(inputs: int = 6, outputs: int = 4, bias: bool = True) -> nn.Linear:
    """A linear; a :class:`Model` makes it float64."""
    return nn.Linear(inputs, outputs, bias=bias)


@dataclasses.dataclass(frozen=True)
class Linear:
    """One rewritten linear, as its record and its op describe it.

    Attributes:
        gradients: ``"dX dW"``, ``"dX"`` or ``"dW"``.
        dw: ``"O I"`` or ``"I O"``, the layout that the graph wants dW in.
    """

    name: str
    shape: tuple[int, ...]
    tokens: int = 1
    gradients: str = "dX dW"
    dw: str = "O I"
    call: int = 0


@dataclasses.dataclass
class Trace:
    """What the passes did to one joint graph.

    Attributes:
        graph: as they left it.
        products_before: how many matrix products its backward had when AOTAutograd traced it.
        records: what they returned of the sites.
        saved: what they returned of the tensors packed for backward.
    """

    graph: Graph
    products_before: int
    records: list[SiteRecord]
    saved: list[SavedRecord]

    @property
    def ops(self) -> list[Node]:
        """The ops inserted for linears, in graph order."""
        target = torch.ops.sparse_compile.linear_backward.default
        return self.graph.find_nodes(op="call_function", target=target)

    @property
    def attention_ops(self) -> dict[int, Node]:
        """The ops inserted for attentions, by site number; every rewritten attention has one."""
        ours = torch.ops.sparse_compile
        targets = (
            ours.attention_backward.default,
            ours.fused_attention_backward.default,
            ours.cuda_attention_backward.default,
        )
        ops = [node for node in self.graph.nodes if node.target in targets]
        assert sorted(op.args[1] for op in ops) == [
            i for i, r in enumerate(self.records) if r.rewritten and r.kind == "attention"
        ]
        return {op.args[1]: op for op in ops}

    @property
    def linears(self) -> list[Linear]:
        """The rewritten linears, in the order of their records; every record has one op, and no op none."""
        ops = {op.args[4]: op for op in self.ops}
        assert len(ops) == len(self.ops)
        assert sorted(ops) == [
            i for i, record in enumerate(self.records) if record.rewritten and record.kind == "linear"
        ]
        return [_linear(self.records[i], ops[i]) for i in sorted(ops)]

    @property
    def backward_products(self) -> int:
        """How many matrix products the backward still has."""
        return len(list(g.products(self.graph, backward=True)))

    @property
    def left_alone(self) -> dict[str, str]:
        """The reasons, by name."""
        return {record.name: record.reason for record in self.records if not record.rewritten}


def _linear(record: SiteRecord, op: Node) -> Linear:
    _, dy, x, w, _, tokens, dw_transposed, *_ = op.args
    rows, inputs, outputs = record.shape
    assert g.sizes(g.shape_of(dy)) == (rows, outputs)
    assert x is None or g.sizes(g.shape_of(x)) == (rows, inputs)
    assert w is None or g.sizes(g.shape_of(w)) == (outputs, inputs)
    return Linear(
        name=record.name,
        shape=record.shape,
        tokens=tokens if isinstance(tokens, int) else tokens.meta["val"].node.hint,
        gradients=" ".join(["dX"] * (w is not None) + ["dW"] * (x is not None)),
        dw="I O" if dw_transposed else "O I",
        call=record.call,
    )


class Tracer:
    """A backend that runs the passes and nothing of the runtime: the ops then skip zero rows only.

    Args:
        decompositions: of AOTAutograd; None for none, as ``compiler="aot_eager"`` has it.
        compact: carry the needed rows only.
        gpu_carries: on a GPU, too.
    """

    def __init__(
        self,
        decompositions: Mapping[Any, Any] | None = None,
        *,
        compact: bool = False,
        gpu_carries: bool = False,
    ) -> None:
        self._passes = {"compact": compact, "gpu_carries": gpu_carries}
        self.traces: list[Trace] = []
        self.inference_graphs: list[Graph] = []
        # The passes, as the last graph asked for them.
        self.rewrite: Callable[[Graph], tuple[list[SiteRecord], list[SavedRecord]]]
        self._decompositions = decompositions

    @property
    def trace(self) -> Trace:
        """The only graph's."""
        (trace,) = self.traces
        return trace

    def __call__(self, gm: GraphModule, inputs: Sequence[Any], saved: PruneSaved | None = None) -> Run:
        names = {parameter.position: parameter.name for parameter in naming.find_parameters(gm, inputs)}
        called = list(passes.linears_called(gm, names))
        self.rewrite = functools.partial(
            passes.rewrite, parameters=names, linears=called, saved=saved, **self._passes
        )

        def partition(joint: GraphModule, joint_inputs: Sequence[Any], **options: Any) -> Any:
            before = len(list(g.products(joint.graph, backward=True)))
            self.traces.append(Trace(joint.graph, before, *self.rewrite(joint.graph)))
            joint.recompile()
            return min_cut_rematerialization_partition(joint, joint_inputs, **options)

        def as_is(graph: GraphModule, _: Sequence[Any]) -> Run:
            return make_boxed_func(graph.forward)

        def inference(graph: GraphModule, _: Sequence[Any]) -> Run:
            self.inference_graphs.append(graph.graph)
            return make_boxed_func(graph.forward)

        return aot_module_simplified(
            gm,
            inputs,
            fw_compiler=as_is,
            bw_compiler=as_is,
            inference_compiler=inference,
            partition_fn=partition,
            decompositions=self._decompositions,
        )


def step(run: Run, inputs: Sequence[Any], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the `wanted` tensors in one forward and backward; every entry of the output weighs
    differently."""
    for tensor in wanted.values():
        tensor.grad = None
    output = run(*inputs)
    weights = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view_as(output)
    (output * weights.to(output)).sum().backward()
    return {name: tensor.grad.clone() for name, tensor in wanted.items() if tensor.grad is not None}


def differentiable(run: Run, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """The inputs and, of a module, the parameters that want a gradient."""
    wanted = {f"input {i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad}
    if isinstance(run, nn.Module):
        wanted |= {name: p for name, p in run.named_parameters() if p.requires_grad}
    return wanted


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-12) -> None:
    """The same gradients, to `rtol` of the largest entry of each."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        error, largest = ((found[name] - value).abs().max().item(), value.abs().max().item())
        assert error <= rtol * largest, f"{name}: off by {error:.1e} of {largest:.1e}"


def trace(
    run: Run,
    *inputs: Any,
    decompositions: Mapping[Any, Any] | None = None,
    dynamic: bool | None = None,
    rtol: float = 1e-12,
) -> Trace:
    """Trace `run` (a function, or a module whose parameters count) for the inputs, rewrite it, and check
    that all gradients are those of the uncompiled `run`."""
    wanted = differentiable(run, inputs)
    expected = step(run, inputs, wanted)
    tracer = Tracer(decompositions)
    compiled = torch.compile(run, backend=tracer, dynamic=dynamic, fullgraph=True)
    assert_close(step(compiled, inputs, wanted), expected, rtol)
    return tracer.trace
