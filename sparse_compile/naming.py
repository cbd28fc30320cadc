"""Which model a compiled graph belongs to, and under which path.

Dynamo names things relative to the module whose frame it compiled. After a graph break, or when only the
layers of a model are compiled, that is some inner module, and one compiled graph then serves many layers.
The parameters that a graph is called with tell them apart: what they are in the outermost module that is
running says what every name in the graph is there, for that call.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import sys
import types
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

# With one first parameter, that is: layers that share it.
_MOST_OWNERS = 1024

# Of the name of a block's end, where something else has the block's own name.
END_OF_BLOCK = " (end)"

# What wrappers add to a path: torch.compile, FSDP, activation checkpointing. DDP's "module" is a name that a
# model may use too: it counts as a wrapper's only at the top, where it is the only child (`unwrap`).
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What Dynamo adds, where it says how a wrapper or a module gets at what it holds.
_ATTRIBUTES = {"__dict__", "__self__", "_modules", "_parameters"}


@dataclasses.dataclass(frozen=True, slots=True)
class NamedInput:
    """A parameter among a graph's inputs: its position, and its name relative to the compiled frame."""

    position: int
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Owner:
    """Whose forward it is, and how names in the frame become names in that model.

    Attributes:
        root: the outermost module, if one was found.
        moved: paths in the frame, and the paths of the same modules in the root, the longest first. Usually
            that is one pair: ``("", "encoder.layers.0")`` in a frame of a layer, ``("model", "")`` in a
            function that has the model in a variable.
    """

    root: weakref.ref[nn.Module] | None = None
    moved: tuple[tuple[str, str], ...] = ()

    @property
    def path(self) -> str:
        """Of the frame's own module in the root."""
        return dict(self.moved).get("", "")

    def layer(self, name: str) -> str:
        """The name in the root of a layer. In the frame of a linear itself that is its weight's."""
        return layer_of(self.full_name(name))

    def full_name(self, name: str) -> str:
        """The name in the root of what is called ``name`` in the frame."""
        return move(name, self.moved)


def move(path: str, moved: Iterable[tuple[str, str]]) -> str:
    """A path, with the first of the old starts that it has replaced by the new one; itself if it has none."""
    for old, new in moved:
        if not old or f"{path}.".startswith(f"{old}."):
            return ".".join(filter(None, (new, path.removeprefix(old).removeprefix("."))))
    return path


def split_variable(source: str) -> tuple[str, str]:
    """What Dynamo calls a module or a parameter, as the variable of the frame and the rest of the path.

    Around a forward with a decorator the frame is ``def wrapper(*args, **kwargs)``, and ``args[0]`` is what
    the forward calls ``self``.
    """
    found = re.match(r"[LG]\['([^']*)'\]", source)
    if found is None:
        return "", source
    variable, rest = found[1], source[found.end() :]
    return variable, rest.removeprefix("[0]") if variable == "args" else rest


def clean(path: str) -> str:
    """A module path without the components that wrappers and Dynamo add."""
    return ".".join(part for part in path.split(".") if part and part not in _WRAPPERS | _ATTRIBUTES)


def class_name(kind: type | str) -> str:
    """The name of a module's class as its author gave it: FSDP2 puts a class of its own before that. (Dynamo
    gives some as text.)"""
    if isinstance(kind, str):
        return kind.rpartition(".")[2]
    return kind.__mro__[2 if _is_sharded(kind) else 0].__name__


def is_sharded(root: nn.Module) -> bool:
    """Whether FSDP2 has sharded any module of a model."""
    return any(_is_sharded(type(module)) for module in root.modules())


def _is_sharded(kind: type) -> bool:
    return kind.__mro__[1].__name__ == "FSDPModule"  # by name: not every PyTorch is built with FSDP


def layer_of(parameter: str) -> str:
    """The name of the layer that a parameter belongs to: its module's, or its own where it is not called
    ``weight`` or ``bias``."""
    owner, _, leaf = parameter.rpartition(".")
    return owner if owner and leaf in ("weight", "bias") else parameter


def find_parameters(gm: torch.fx.GraphModule, example_inputs: Sequence[object]) -> list[NamedInput]:
    """The inputs of a Dynamo graph that are a module's parameters.

    Dynamo says where each comes from: ``L['self']._modules['encoder']._parameters['weight']``. The variable
    is left out of the name, unless there are several; ``self`` is always.
    """
    found = []
    for position, (node, value) in enumerate(
        zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False)
    ):
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is None or not isinstance(value, torch.Tensor):
            continue
        text = source.name if isinstance(source.name, str) else source.name()
        if "_parameters" in text:
            variable, rest = split_variable(text)
            found.append((position, variable, clean(".".join(re.findall(r"[\w-]+", rest)))))
    several = len({variable for _, variable, _ in found}) > 1
    return [
        NamedInput(p, f"{variable}.{name}" if several and variable != "self" else name)
        for p, variable, name in found
    ]


def graph_break(gm: torch.fx.GraphModule) -> str | None:
    """Where Dynamo broke the frame whose first part this graph is, as in "file.py:12"; empty if it did not.
    None where it is not known: of the parts that DDP makes of a graph."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None if reason is None else ""
    place = reason.user_stack[-1] if reason.user_stack else None
    return "a place unknown" if place is None else f"{Path(place.filename).name}:{place.lineno}"


def _frames() -> Iterator[types.FrameType]:
    """The call stack, outermost frame first."""
    frames = []
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return reversed(frames)


def running_modules() -> Iterator[nn.Module]:
    """The modules whose methods are on the call stack, outermost first."""
    for frame in _frames():
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            yield owner


def find_root(parameters: Sequence[object]) -> nn.Module | None:
    """The outermost running module that has all of the ``parameters``, or else some. Where a plain function
    was compiled no module may be running, and one that a variable on the call stack refers to is taken."""
    running = list(running_modules())
    variables = (value for frame in _frames() for value in frame.f_locals.values())
    wanted = {id(parameter) for parameter in parameters}
    some = None
    for module in itertools.chain(running, (v for v in variables if isinstance(v, nn.Module))):
        missing = wanted.difference(map(id, module.parameters()))
        if wanted and not missing:
            return unwrap(module)
        if some is None and len(missing) < len(wanted):
            some = module
    if some is not None:
        return unwrap(some)
    return unwrap(running[0]) if running else None  # DDP compiles with stand-ins for the parameters


def find_owner(parameters: Sequence[tuple[object, str]]) -> Owner:
    """Who runs a graph with these parameters, each with its name in the compiled frame."""
    root = find_root([parameter for parameter, _ in parameters])
    if root is None:
        return Owner()
    names: dict[int, list[str]] = {}
    for full, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(clean(full))
    found = [(name, names[id(parameter)]) for parameter, name in parameters if id(parameter) in names]
    return Owner(weakref.ref(root), _moved(found))


def _moved(found: Sequence[tuple[str, list[str]]]) -> tuple[tuple[str, str], ...]:
    """``Owner.moved``.

    Args:
        found: names of parameters in the frame, each with all that it has in the root: one that is tied, or
            whose module is held twice, has several. The one is meant that agrees with most of the others.
    """
    votes = Counter(p for name, known in found for p in {without_common_end(name, full) for full in known})

    def weight(name: str, full: str) -> tuple[int, bool]:
        pair = without_common_end(name, full)
        return votes[pair], not pair[0]

    meant = [(name, max(known, key=functools.partial(weight, name))) for name, known in found]
    meant.sort(key=lambda each: weight(*each), reverse=True)
    moved: dict[str, str] = {}
    for name, full in meant:
        moved.setdefault(*without_common_end(name, full))
    if moved:
        moved.setdefault("", _common_start(list(moved.values())))

    def in_order() -> tuple[tuple[str, str], ...]:
        return tuple(sorted(moved.items(), key=lambda pair: len(pair[0]), reverse=True))

    owner = Owner(None, in_order())
    moved |= {layer_of(name): layer_of(full) for name, full in meant if owner.full_name(name) != full}
    return in_order()


def without_common_end(a: str, b: str) -> tuple[str, str]:
    """``layers.0.mlp.weight`` and ``layers.1.mlp.weight`` differ by ``layers.0`` and ``layers.1``."""
    left, right = a.split("."), b.split(".")
    while left and right and left[-1] == right[-1]:
        left.pop()
        right.pop()
    return ".".join(left), ".".join(right)


def _common_start(paths: Sequence[str]) -> str:
    columns = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, columns))


class Owners:
    """Whose parameters one graph is called with, found out once for every set of them."""

    def __init__(self, parameters: Sequence[NamedInput]) -> None:
        self.parameters = parameters
        self._found: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def known(self, inputs: Sequence[object]) -> Owner | None:
        """Who it was when the graph was called with these inputs before."""
        if not self.parameters:
            return Owner()
        return self._found.get(inputs[self.parameters[0].position], {}).get(self._key(inputs))

    def find(self, inputs: Sequence[object]) -> Owner:
        """Look for the one who is calling the graph now."""
        owner = find_owner([(inputs[each.position], each.name) for each in self.parameters])
        if owner.root is not None:  # it is not known while a function is compiled, but when it runs
            found = self._found.setdefault(inputs[self.parameters[0].position], {})
            if len(found) >= _MOST_OWNERS:
                found.clear()
            found[self._key(inputs)] = owner
        return owner

    def _key(self, inputs: Sequence[object]) -> tuple[int, ...]:
        return tuple([id(inputs[each.position]) for each in self.parameters])


def unwrap(module: nn.Module) -> nn.Module:
    """The user's own module inside torch.compile's, DDP's or FSDP's."""
    while len(children := dict(module.named_children())) == 1 and children.keys() <= {*_WRAPPERS, "module"}:
        (module,) = children.values()
    return module


def module_paths(root: nn.Module) -> list[str]:
    """Every module path of a model, and the paths of weights that are parameters of their own."""
    weights = {clean(name) for name, _ in root.named_parameters()}
    paths = {clean(name) for name, _ in root.named_modules()}
    paths |= {name for name in weights if name.rpartition(".")[2] not in ("weight", "bias")}
    return sorted(paths - {""})


def block_of(path: str, root: nn.Module | None, seen: Sequence[str] = ()) -> tuple[int, int] | None:
    """(index, count) of the repeated block that a module path is in: the outermost component that is a
    number, among its siblings; None if the path has none.

    Without the model itself (``root``), the siblings are those of the paths ``seen`` in the graph.
    """
    parts = path.removesuffix(END_OF_BLOCK).split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return None
    container = ".".join(parts[:at])
    if root is not None:
        try:
            children = root.get_submodule(container).named_children()
        except AttributeError:
            children = iter(())
        numbers = [int(name) for name, _ in children if name.isdigit()]
    else:
        numbers = []
    if not numbers:
        start = f"{container}." if container else ""
        rest = [other[len(start) :].split(".")[0] for other in seen if other.startswith(start)]
        numbers = [int(part) for part in rest if part.isdigit()]
    index = int(parts[at])
    return index, max([index, *numbers]) + 1


def block_counts(root: nn.Module) -> list[int]:
    """The number of blocks in each outermost list of repeated modules."""
    counts = []
    for name, module in root.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not any(
            p.isdigit() for p in clean(name).split(".")
        ):
            counts.append(len(module))
    return counts
