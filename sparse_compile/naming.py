"""Which model a compiled graph belongs to, and under which path.

Dynamo names things relative to the module whose frame it compiled. After a graph break, or when only the
layers of a model are compiled, that is some inner module, and one compiled graph then serves many layers.
The parameter that a graph is called with tells them apart: its full name in the outermost module that is
running gives the prefix of every name in the graph, for that call.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
import types
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import nn

# Of the name of a block's end, where something else has the block's own name.
END_OF_BLOCK = " (end)"

# What wrappers add to a path: torch.compile, FSDP, activation checkpointing. DDP's "module" is a name that a
# model may use too: it counts as a wrapper's only at the top, where it is the only child (`unwrap`).
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What Dynamo adds, where it says how a wrapper or a module gets at what it holds.
_ATTRIBUTES = {"__dict__", "_modules", "_parameters"}


@dataclasses.dataclass(frozen=True, slots=True)
class NamedInput:
    """A parameter among a graph's inputs: its position, and its name relative to the compiled frame."""

    position: int
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Owner:
    """Whose forward it is: the outermost module, if one was found, and how names in the frame become names
    in it. ``prefix`` is the path from the outermost module to the frame's own, ``surplus`` the path the other
    way round (a wrapper was compiled, or a function that has the module in a variable). Both end in a dot
    unless empty."""

    root: weakref.ref[nn.Module] | None = None
    prefix: str = ""
    surplus: str = ""

    def full_name(self, name: str) -> str:
        return f"{self.prefix}{name.removeprefix(self.surplus)}".rstrip(".")


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
    is left out of the name, unless a function uses modules of several variables. The first input found is
    the graph's *anchor*, the one by which it recognises its owner.
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
    variables = {variable for _, variable, _ in found}
    qualify = len(variables) > 1 and "self" not in variables
    return [NamedInput(p, f"{variable}.{name}" if qualify else name) for p, variable, name in found]


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


def find_root(parameter: object) -> nn.Module | None:
    """The outermost running module that has ``parameter``. Where a plain function was compiled no module
    may be running, and one that a variable on the call stack refers to is taken."""
    running = list(running_modules())
    variables = (value for frame in _frames() for value in frame.f_locals.values())
    for module in itertools.chain(running, (v for v in variables if isinstance(v, nn.Module))):
        if any(candidate is parameter for candidate in module.parameters()):
            return unwrap(module)
    return unwrap(running[0]) if running else None  # DDP compiles with stand-ins for the parameters


def find_owner(parameter: object, name: str) -> Owner:
    """Who runs a graph whose anchor is ``parameter``, called ``name`` in the compiled frame."""
    root = find_root(parameter)
    if root is None:
        return Owner()
    for full, candidate in root.named_parameters(remove_duplicate=False):
        if candidate is parameter and f".{clean(full)}".endswith(f".{name}"):
            return Owner(weakref.ref(root), prefix=clean(full)[: -len(name)])
        if candidate is parameter and name.endswith(f".{clean(full)}"):
            return Owner(weakref.ref(root), surplus=name[: -len(clean(full))])
    return Owner(weakref.ref(root))


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
