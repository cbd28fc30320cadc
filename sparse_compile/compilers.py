"""What compiles a graph once the passes have rewritten it, and how they get to see the joint graph."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.source import ConstantSource
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from sparse_compile import lowerings as _lowerings  # noqa: F401  (registers them)
from sparse_compile.passes.random_rows import draw_few

Compiled = Callable[..., Any]
Rewrite = Callable[[Graph], None]

_SMALLEST_BUDGET = 1e-9


class JointPass(CustomGraphPass):
    """The passes, as Inductor runs them on a joint graph before anything of its own.

    Args:
        rewrite: changes the graph in place.
        key: of Inductor's and AOTAutograd's caches; everything that the result depends on beyond the graph
            itself. None keeps the graph out of the caches.
    """

    def __init__(self, rewrite: Rewrite, key: str | None) -> None:
        self._rewrite = rewrite
        self._key = key if key is not None else uuid.uuid4().hex

    def __call__(self, graph: Graph) -> None:
        self._rewrite(graph)

    def uuid(self) -> str:
        return self._key


def savable_token() -> contextlib.AbstractContextManager[Any]:
    """While a graph is compiled: an activation memory budget of 0 is taken as next to nothing.

    At 0 the partitioner saves the graph's inputs alone, and fails on our graphs, whose backward needs the
    token of its forward (24 bytes).
    """
    config = torch._functorch.config
    return config.patch(activation_memory_budget=config.activation_memory_budget or _SMALLEST_BUDGET)


@contextlib.contextmanager
def hints_are_heeded() -> Iterator[None]:
    """While Inductor compiles: sizes that a graph finds out when it runs are taken to be about as large as
    the passes say (``graph.unbacked_rows``).

    Of a size without a hint Inductor knows nothing: it then fuses little with what has it, and splits no sum
    over rows. PyTorch 2.11 keeps such hints, but does not look at them there.
    """
    allocator: Any = torch._inductor.sizevars.SizeVarAllocator
    lowering: Any = torch._inductor.graph.GraphLowering
    if hasattr(allocator, "all_unbacked_explicitly_hinted"):
        yield
        return
    symbolic_hint, size_hint = allocator.symbolic_hint, lowering.get_dep_size_hint

    def hinted(self: Any, expr: Any, *_: Any, **__: Any) -> Any:
        return symbolic_hint(self, expr, use_user_provided_hint_override=True)

    def hinted_size(self: Any, dep: Any, count_bytes: bool = True) -> int:
        with contextlib.suppress(KeyError):  # of what is no tensor
            return int(dep.numbytes_hint() if count_bytes else dep.numel_hint())
        return 0

    allocator.symbolic_hint, lowering.get_dep_size_hint = hinted, hinted_size
    try:
        yield
    finally:
        allocator.symbolic_hint, lowering.get_dep_size_hint = symbolic_hint, size_hint


def patches(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """``torch.compile``'s ``mode`` and ``options`` as settings of Inductor."""
    return {**(torch._inductor.list_mode_options(mode) if mode else {}), **(options or {})}


def records(patches: Mapping[str, Any]) -> bool:
    """Whether Inductor records CUDA graphs by these settings."""
    return bool(patches.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs))


@contextlib.contextmanager
def one_more_input(gm: GraphModule) -> Iterator[None]:
    """While a graph is compiled: it has one more input, the last one, a number. Dynamo's own graph is as
    before afterwards."""
    *_, last = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_after(last):
        number = gm.graph.placeholder("plan")
    number._dynamo_source = ConstantSource("plan")  # type: ignore[attr-defined]
    gm.recompile()
    try:
        yield
    finally:
        gm.graph.erase_node(number)
        gm.recompile()


def with_inductor(
    gm: GraphModule, inputs: Sequence[Any], rewrite: Rewrite, key: str | None, patches: dict[str, Any]
) -> Compiled:
    """Compile by Inductor, with these settings."""
    patches = {**patches, "joint_custom_pre_pass": JointPass(rewrite, key)}
    patches.setdefault("joint_custom_post_pass", JointPass(draw_few, key))
    with hints_are_heeded():
        return cast(Compiled, compile_fx(gm, inputs, config_patches=patches))


def with_aot_eager(gm: GraphModule, inputs: Sequence[Any], rewrite: Rewrite) -> Compiled:
    """Run the rewritten graphs as they are: quick to compile, for tests and for looking at graphs."""

    def partition(
        joint: GraphModule, joint_inputs: Sequence[Any], **options: Any
    ) -> tuple[GraphModule, GraphModule]:
        rewrite(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, joint_inputs, **options)

    def as_is(graph: GraphModule, _: Sequence[Any]) -> Compiled:
        return make_boxed_func(graph.forward)

    def without_gradient(graph: GraphModule, graph_inputs: Sequence[Any]) -> Compiled:
        rewrite(graph.graph)
        graph.recompile()
        return as_is(graph, graph_inputs)

    backend = aot_autograd(
        fw_compiler=as_is,
        bw_compiler=as_is,
        inference_compiler=without_gradient,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    return backend(gm, inputs)
