"""What an op launched, to be launched again without asking what to launch.

Where there are no CUDA graphs, a planned op (``plan.py``) is called at every step. What it launches is
decided by its plan; yet to find that out takes the host some ten times as long as to launch it. So the second
time an op runs under a plan, it is watched (:class:`Recorder`), and what comes of it is a :class:`Program`:
the kernels that it launched, the calls of ATen between them, and which of their operands is which input or
buffer. From then on the program runs in its place.

It is what a CUDA graph is, but of one op, and with addresses that may change. What holds for those holds
here: launches depend on the plan, and on sizes and strides of what an op is given, and on nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from sparse_compile.changes import changed
from sparse_compile.kernels.triton import launcher

# Runs of an op in which kernels were still built or timed, after which it is not watched any more.
_ATTEMPTS = 4
_ALIGNED = 512  # bytes, as PyTorch's allocator does it
_TIMED = 8  # runs of a program whose time is taken
_PROGRAMS = 16  # of this many programs, which launch several kernels
_SEVERAL = 4
# FLOPs of dense products in a second, by a large GPU.
_RATE = 5e14

_aten = torch.ops.aten
_EMPTY = (
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Traits:
    """What launches may depend on, of a tensor that an op is given. (Its dtype is that of the graph.)"""

    shape: torch.Size
    stride: tuple[int, ...]
    shift: int  # behind a multiple of 16 bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Operand:
    """A tensor as a part of another one, its root: so many bytes behind where that begins."""

    root: int
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    whole: bool

    def within(self, roots: Sequence[Tensor]) -> Tensor:
        """The tensor."""
        root = roots[self.root]
        if self.whole:
            return root
        if root.dtype != self.dtype:
            root = root.view(self.dtype)
        at = root.storage_offset() + self.offset // self.dtype.itemsize
        return root.as_strided(self.shape, self.stride, at)


def _operands(value: Any) -> Iterator[Operand]:
    """Those in an argument."""
    return (each for each in tree_flatten(value)[0] if isinstance(each, Operand))


def _within(value: Any, roots: Sequence[Tensor]) -> Any:
    """An argument, whose operands are tensors again."""
    if isinstance(value, Operand):
        return value.within(roots)
    return [_within(each, roots) for each in value] if isinstance(value, list | tuple) else value


@dataclasses.dataclass(slots=True)
class Call:
    """A call of ATen; its results become roots."""

    function: Any
    arguments: list[Any]  # with an Operand for each tensor
    named: dict[str, Any]
    results: list[tuple[int, int]]  # position among the results, root
    _places: list[int] = dataclasses.field(init=False)  # of arguments that hold operands
    _names: list[str] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self._places = [i for i, each in enumerate(self.arguments) if any(_operands(each))]
        self._names = [name for name, each in self.named.items() if any(_operands(each))]

    def run(self, roots: list[Any], addresses: list[int]) -> None:
        arguments, named = self.arguments.copy(), self.named.copy() if self._names else self.named
        for place in self._places:
            arguments[place] = _within(arguments[place], roots)
        for name in self._names:
            named[name] = _within(named[name], roots)
        out = self.function(*arguments, **named)
        for position, root in self.results:
            result = roots[root] = out[position] if isinstance(out, list | tuple) else out
            addresses[root] = result.data_ptr()


@dataclasses.dataclass(slots=True)
class Launch:
    """A launch of a kernel that is interpreted."""

    kernel: Any
    grid: Any
    arguments: list[Any]
    options: dict[str, Any]


@dataclasses.dataclass(slots=True)
class BuiltLaunch:
    """A launch of one that was built: with addresses in the place of tensors."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: list[Any]
    addresses: list[tuple[int, int, int]]  # of an argument: its position, root, bytes behind that

    def run(self, addresses: list[int], launch: launcher.Again) -> None:
        arguments = self.arguments.copy()
        for position, root, offset in self.addresses:
            arguments[position] = addresses[root] + offset
        launch(self.compiled, self.grid, arguments)


@dataclasses.dataclass(slots=True)
class Buffer:
    """A root that the op makes, with nothing in it."""

    root: int
    tensor: Tensor


class Recorder(TorchDispatchMode):
    """In which it is seen what an op calls and launches."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.roots: list[Tensor] = list(inputs)  # also held, so that no id is given away
        self.steps: list[Call | Launch | BuiltLaunch] = []
        self.buffers: list[Buffer] = []
        self.constants: list[int] = []  # roots that were there before: they lie where they lie
        self.complete = True
        self._operands: dict[int, Operand] = {}
        self._seen: list[Tensor] = []
        for root, tensor in enumerate(inputs):
            self._operands.setdefault(id(tensor), _whole(root, tensor))

    def __enter__(self) -> Recorder:
        launcher.watch(self)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        launcher.watch(None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = (args, kwargs)
        tensors = [each for each in tree_flatten(given)[0] if isinstance(each, Tensor)]
        operands = tree_map_only(Tensor, self.operand, given)
        out = func(*args, **kwargs)
        results = []
        for position, tensor in enumerate(out if isinstance(out, list | tuple) else [out]):
            if not isinstance(tensor, Tensor) or id(tensor) in self._operands:
                continue
            viewed = next((each for each in tensors if _share(each, tensor)), None)
            if viewed is not None:
                self._note(tensor, self.operand(viewed).root)
                continue
            results.append((position, self._new_root(tensor)))
        if func in _EMPTY:
            self.buffers.append(Buffer(results[0][1], out))
        elif results or func._schema.is_mutable:
            self.steps.append(Call(func, list(operands[0]), operands[1], results))
        return out

    def operand(self, tensor: Tensor) -> Operand:
        """A tensor of this op; one that was not made here is a constant."""
        if id(tensor) not in self._operands:
            self.constants.append(self._new_root(tensor))
        return self._operands[id(tensor)]

    def _new_root(self, tensor: Tensor) -> int:
        self.roots.append(tensor)
        self._operands[id(tensor)] = _whole(len(self.roots) - 1, tensor)
        return len(self.roots) - 1

    def _note(self, tensor: Tensor, root: int) -> None:
        base = self.roots[root]
        begin, of_base = tensor.storage_offset(), base.storage_offset()
        offset = int(begin * tensor.element_size() - of_base * base.element_size())
        self._seen.append(tensor)
        self._operands[id(tensor)] = Operand(
            root, offset, tensor.dtype, tensor.shape, tensor.stride(), whole=False
        )

    def launched(self, kernel: Any, grid: Any, arguments: Sequence[Any], options: dict[str, Any]) -> None:
        """Called by the launcher, of a kernel that is interpreted."""
        self.steps.append(Launch(kernel, grid, self._named(arguments), options))

    def launched_built(self, compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        """Called by the launcher, of a kernel that was built."""
        x, y, z = (*grid, 1, 1)[:3]
        self.steps.append(BuiltLaunch(compiled, (x, y, z), self._named(arguments), []))

    def aside(self) -> contextlib.AbstractContextManager[Any]:
        """In which nothing is seen: what interprets a kernel calls ATen, too."""
        return _disable_current_modes()

    def spoil(self) -> None:
        """Called when something was built or timed, which the next run does not do."""
        self.complete = False

    def _named(self, arguments: Sequence[Any]) -> list[Any]:
        return [self.operand(each) if isinstance(each, Tensor) else each for each in arguments]


def _whole(root: int, tensor: Tensor) -> Operand:
    return Operand(root, 0, tensor.dtype, tensor.shape, tensor.stride(), whole=True)


def _share(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


_seconds: list[float] = []  # of the host, to run the programs that were timed


def worth_launching(flops: float) -> bool:
    """Whether a GPU has dense products of so many FLOPs to do for as long as the host needs to launch several
    kernels in their place. Where it has not, to launch them would make a step longer, however little they
    have to do. (True until the host was timed; and a CUDA graph takes it no time.)"""
    return len(_seconds) < _PROGRAMS or flops > min(_seconds) * _RATE


class Program:
    """What an op launches under one plan.

    Args:
        recorder: that has seen it.
        inputs: what it was given.
        outputs: what it returned.

    Attributes:
        seconds: of the host, that a run takes; infinite until it ran.
    """

    def __init__(
        self, recorder: Recorder, inputs: Sequence[Tensor], outputs: Tensor | Sequence[Tensor]
    ) -> None:
        self.seconds = float("inf")
        self._timed = 0
        self._inputs = [Traits(each.shape, each.stride(), each.data_ptr() & 15) for each in inputs]
        self._device = inputs[0].device
        self._steps = recorder.steps
        self._single = isinstance(outputs, Tensor)
        each_output = [outputs] if isinstance(outputs, Tensor) else outputs
        self._outputs = [recorder.operand(each) for each in each_output]
        # Constants stay; all other places are filled at each run.
        kept = set(recorder.constants)
        self._roots: list[Any] = [tensor if i in kept else None for i, tensor in enumerate(recorder.roots)]
        self._addresses = [tensor.data_ptr() if i in kept else 0 for i, tensor in enumerate(recorder.roots)]
        needed = {operand.root for operand in self._tensors()}
        self._made = [
            (each.root, each.tensor.shape, each.tensor.stride(), each.tensor.dtype)
            for each in recorder.buffers
            if each.root in needed
        ]
        self._lay_out([each for each in recorder.buffers if each.root not in needed])
        for step in self._steps:
            if isinstance(step, BuiltLaunch):
                named = [(i, each) for i, each in enumerate(step.arguments) if isinstance(each, Operand)]
                step.addresses = [(i, each.root, each.offset) for i, each in named]

    def _tensors(self) -> Iterator[Operand]:
        """The operands that have to be tensors: an address does not do."""
        yield from self._outputs
        for step in self._steps:
            if isinstance(step, Call):
                yield from _operands((step.arguments, step.named))

    def _lay_out(self, buffers: Sequence[Buffer]) -> None:
        """Put buffers that kernels alone use into one, the last root."""
        workspace, offsets, end = len(self._roots), {}, 0
        for buffer in buffers:
            offsets[buffer.root] = end
            end += -(-buffer.tensor.untyped_storage().nbytes() // _ALIGNED) * _ALIGNED
        self._workspace = end
        self._roots.append(None)
        self._addresses.append(0)

        def moved(operand: Any) -> Any:
            if not isinstance(operand, Operand) or operand.root not in offsets:
                return operand
            offset = operand.offset + offsets[operand.root]
            return dataclasses.replace(operand, root=workspace, offset=offset, whole=False)

        for step in self._steps:
            if not isinstance(step, Call):
                step.arguments = [moved(each) for each in step.arguments]

    def run(self, inputs: Sequence[Tensor]) -> Tensor | list[Tensor] | None:
        """Launch it all for these inputs. Returns the outputs; or None, having done nothing, for inputs that
        are not like those that were seen."""
        start = time.perf_counter()
        addresses = self._addresses.copy()
        for i, (tensor, seen) in enumerate(zip(inputs, self._inputs, strict=True)):
            address = addresses[i] = tensor.data_ptr()
            if address & 15 != seen.shift or tensor.shape != seen.shape or tensor.stride() != seen.stride:
                return None
        with launcher.current(self._device):
            outputs = self._run(inputs, addresses)
        if self._timed < _TIMED:
            self._time(time.perf_counter() - start)
        return outputs[0] if self._single else outputs

    def _time(self, seconds: float) -> None:
        """Note what a run took. (One may wait for a GPU that is far behind; not the shortest of them all.)"""
        self._timed += 1
        self.seconds = min(self.seconds, seconds)
        several = len(self._steps) >= _SEVERAL and self._device.type == "cuda"
        if self._timed == _TIMED and several and len(_seconds) < _PROGRAMS:
            _seconds.append(self.seconds)
            changed()

    def _run(self, inputs: Sequence[Tensor], addresses: list[int]) -> list[Tensor]:
        roots, device = self._roots.copy(), self._device
        roots[: len(inputs)] = inputs
        for root, shape, stride, dtype in self._made:
            made = roots[root] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            addresses[root] = made.data_ptr()
        if self._workspace:
            workspace = roots[-1] = torch.empty(self._workspace, dtype=torch.uint8, device=device)
            addresses[-1] = workspace.data_ptr()
        launch = launcher.again(device)
        for step in self._steps:
            if isinstance(step, BuiltLaunch):
                step.run(addresses, launch)
            elif isinstance(step, Call):
                step.run(roots, addresses)
            else:
                given = [_within(each, roots) for each in step.arguments]
                launcher.launch(step.kernel, step.grid, *given, **step.options)
        return [each.within(roots) for each in self._outputs]


@dataclasses.dataclass(slots=True)
class Programs:
    """Those of one plan, by op and by what else an op is given."""

    found: dict[Any, Program] = dataclasses.field(default_factory=dict)
    _runs: dict[Any, int] = dataclasses.field(default_factory=dict)

    def run(
        self, key: Any, inputs: Sequence[Tensor], launch: Callable[[], Tensor | tuple[Tensor, ...]]
    ) -> Tensor | Sequence[Tensor]:
        """What ``launch`` returns, by the program for this op, as soon as there is one.

        Args:
            key: of the op, and of all that it is given beside tensors.
            inputs: the tensors that it is given.
            launch: runs it.
        """
        program = self.found.get(key)
        if program is not None and (outputs := program.run(inputs)) is not None:
            return outputs
        runs = self._runs[key] = self._runs.get(key, 0) + 1
        if runs == 1 or runs > 1 + _ATTEMPTS or _recorded(inputs[0].device):
            return launch()  # the first run builds and times
        with Recorder(inputs) as recorder:
            found = launch()
        # (Of a tensor that is given twice, nobody knows which of the two a kernel reads.)
        if recorder.complete and len({id(each) for each in inputs}) == len(inputs):
            self.found[key] = Program(recorder, inputs, found)
        return found


def _recorded(device: torch.device) -> bool:
    """Whether a CUDA graph is recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
