"""What a checkpoint holds of each site, and whether it is of this model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from sparse_compile import naming
from sparse_compile.checks import near
from sparse_compile.site import Counters, Site


def check_names(state: Iterable[str], root: nn.Module, seen: Iterable[str]) -> None:
    """Refuse a state of layers that the model lacks; those of a second model (``@1``) are not looked at, nor
    any where layers that were ``seen`` are none of this model (of a function over several modules, say)."""
    paths = [path for path, _ in (*root.named_modules(), *root.named_parameters())]
    known = {naming.clean(path) for path in paths}
    lacked, strange = (
        [name for name in names if "@" not in name and name.removesuffix(naming.END_OF_BLOCK) not in known]
        for names in (state, seen)
    )
    if lacked and not strange:
        raise ValueError(
            f"state is of another model: it has a layer '{lacked[0]}', which this one lacks; near names: "
            f"{near(lacked[0], known) or 'none'}."
        )


def state_of(site: Site) -> dict[str, Any]:
    site.settle()
    own = {"counters": dataclasses.asdict(site.counters), "layer": list(site.layer(site.shape))}
    return {**site.state_dict(), **own}


def check_sizes(site: Site, state: dict[str, Any], shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuse a state of a layer of other sizes; ``shapes`` are those with which the site occurs in graphs.
    (One weight may be used in parts.)"""
    there, here = tuple(state.get("layer", ())), [found for shape in shapes if (found := site.layer(shape))]
    if there and here and there not in here:
        raise ValueError(
            f"state is of another model: sizes of '{site.name}' are {there} there, and {here[0]} here."
        )


def load(site: Site, state: dict[str, Any]) -> None:
    site.settle()
    site.counters = Counters(**state.get("counters", {}))
    site.load_state_dict({key: value for key, value in state.items() if key not in ("counters", "layer")})
