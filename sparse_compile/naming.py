"""Which model a compiled graph belongs to, and under which path.

Dynamo names things relative to the module whose frame it compiled. After a graph break, or when only the
layers of a model are compiled, that is some inner module, and one compiled graph then serves many layers.
The parameter that a graph is called with tells them apart: its full name in the outermost module that is
running gives the prefix of every name in the graph, for that call.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import nn

# What wrappers add to a path: torch.compile, DDP and DataParallel, FSDP, activation checkpointing.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclasses.dataclass(frozen=True, slots=True)
class NamedInput:
    """A parameter among a graph's inputs: its position, and its name relative to the compiled frame."""

    position: int
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Owner:
    """Whose forward it is: the outermost module (if one was found) and the path from it to the frame's
    own module, ending in a dot unless empty."""

    root: weakref.ref[nn.Module] | None = None
    prefix: str = ""


def clean(path: str) -> str:
    """A module path without the components that wrappers add."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def source_name(placeholder: torch.fx.Node) -> str | None:
    """The dotted name of a Dynamo graph's input that is a module's parameter, else None.

    Dynamo's source is ``L['self']._modules['encoder']._parameters['weight']``.
    """
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    if source is None:
        return None
    text = source.name if isinstance(source.name, str) else source.name()
    if "_parameters" not in text:
        return None
    text = re.sub(r"^[LG]\['[^']*'\]", "", text)
    parts = re.findall(r"[\w-]+", text)
    return clean(".".join(part for part in parts if part not in ("_modules", "_parameters", "_buffers")))


def find_parameters(gm: torch.fx.GraphModule, example_inputs: Sequence[object]) -> list[NamedInput]:
    """The inputs of a Dynamo graph that are a module's parameters. The first is the graph's *anchor*, the
    one by which it recognises its owner."""
    inputs = zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False)
    return [
        NamedInput(position, name)
        for position, (node, value) in enumerate(inputs)
        if isinstance(value, torch.Tensor) and (name := source_name(node))
    ]


def running_modules() -> Iterator[nn.Module]:
    """The modules whose methods are on the call stack, outermost first, wrappers taken off."""
    frame = sys._getframe()
    modules: list[nn.Module] = []
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            modules.append(owner)
    return reversed(modules)


def find_root(parameter: object) -> nn.Module | None:
    """The outermost running module that has ``parameter``, or the outermost one if none has."""
    modules = list(running_modules())
    holders = (module for module in modules if any(p is parameter for p in module.parameters()))
    root = next(holders, modules[0] if modules else None)
    return None if root is None else unwrap(root)


def find_owner(parameter: object, name: str) -> Owner:
    """Who runs a graph whose anchor is ``parameter``, called ``name`` in the compiled frame."""
    root = find_root(parameter)
    if root is None:
        return Owner()
    for full, candidate in root.named_parameters(remove_duplicate=False):
        if candidate is parameter and f".{clean(full)}".endswith(f".{name}"):
            return Owner(weakref.ref(root), clean(full)[: -len(name)])
    return Owner(weakref.ref(root))


def unwrap(module: nn.Module) -> nn.Module:
    """The user's own module inside torch.compile's, DDP's or FSDP's."""
    while len(children := dict(module.named_children())) == 1 and children.keys() <= _WRAPPERS:
        (module,) = children.values()
    return module


def module_paths(root: nn.Module) -> list[str]:
    """Every module path of a model, and the paths of weights that are parameters of their own."""
    paths = {clean(name) for name, _ in root.named_modules()} | {
        clean(name) for name, _ in root.named_parameters()
    }
    return sorted(paths - {""})


def block_of(path: str, root: nn.Module | None, seen: Sequence[str] = ()) -> tuple[int, int] | None:
    """(index, count) of the repeated block that a module path is in: the outermost component that is a
    number, among its siblings; None if the path has none.

    Without the model itself (``root``), the siblings are those of the paths ``seen`` in the graph.
    """
    parts = path.split(".")
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
