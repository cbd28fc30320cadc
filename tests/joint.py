"""The joint graph of a padded model, traced once for all that is tried with it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from carried import INDUCTORS
from functorch.compile import aot_module_simplified, default_partition, make_boxed_func
from padded import CASES
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from sparse_compile import naming, passes
from sparse_compile.sites import SiteRecord


@dataclasses.dataclass
class Joint:
    """A joint forward and backward graph, as AOTAutograd traced it.

    Attributes:
        model: what was traced.
        module: the graph.
        names: position among the graph's inputs -> name of the parameter there.
        called: the linears of the model.
        inputs: what the graph is called with: parameters, the batch, and under dynamic shapes sizes.
    """

    model: nn.Module
    module: GraphModule
    names: dict[int, str]
    called: list[str]
    inputs: Sequence[Any] = ()

    def gradients(self, module: GraphModule | None = None) -> dict[str, Tensor]:
        """Loss and gradients, of the graph or of one that was made of it."""
        torch.manual_seed(2)
        run = module or self.module
        tangent = next(node for node in run.graph.find_nodes(op="placeholder") if "tangents" in node.name)
        (loss,), gradients = run(self.inputs, [torch.ones((), dtype=tangent.meta["val"].dtype)])
        found = {self.names[i]: grad for i, grad in enumerate(gradients) if grad is not None}
        return {"loss": loss.detach(), **found}

    def rewritten(self, **options: Any) -> tuple[GraphModule, list[SiteRecord]]:
        """A copy that the passes have been over, and their records."""
        module = _copied(self.module)
        records, _ = passes.rewrite(module.graph, parameters=self.names, linears=self.called, **options)
        module.recompile()
        return module, records


@functools.cache
def joint(case: str, decomposed: bool, dynamic: bool | None = None) -> Joint:
    """Of one of :data:`padded.CASES`, with Inductor's decompositions or as it is traced."""
    return trace(*CASES[case], decomposed=decomposed, dynamic=dynamic)


def trace(
    build: Callable[[], nn.Module],
    batch: Callable[[], dict[str, Tensor]],
    *,
    decomposed: bool,
    dynamic: bool | None = None,
) -> Joint:
    traced: list[Joint] = []
    torch.manual_seed(0)
    model = build()

    def compiler(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        names = {parameter.position: parameter.name for parameter in naming.find_parameters(gm, inputs)}
        called = list(passes.linears_called(gm, names))

        def partition(module: GraphModule, joint_inputs: Sequence[Any], **options: Any) -> Any:
            traced.append(Joint(model, _copied(module), names, called))
            return default_partition(module, joint_inputs, **options)

        def forward(module: GraphModule, _: Sequence[Any]) -> Any:
            def run(*given: Any) -> Any:
                traced[0].inputs = [x.detach() if isinstance(x, Tensor) else x for x in given]
                return module.forward(*given)

            return make_boxed_func(run)

        decompositions = INDUCTORS() if decomposed else None
        return aot_module_simplified(
            gm, inputs, fw_compiler=forward, partition_fn=partition, decompositions=decompositions
        )

    torch.compile(model, backend=compiler, fullgraph=True, dynamic=dynamic)(**batch())
    torch._dynamo.reset()
    (only,) = traced
    return only


def _copied(module: GraphModule) -> GraphModule:
    graph = Graph()
    result, output = graph.graph_copy(module.graph, {}, return_output_node=True)  # type: ignore[misc]
    graph.output(result).meta = dict(output.meta)
    graph.set_codegen(module.graph._codegen)
    return GraphModule(module, graph)


def calls(module: GraphModule, op: Any) -> list[Node]:
    """Of one op of ours, in the order of the graph."""
    return module.graph.find_nodes(op="call_function", target=op.default, sort=True)
