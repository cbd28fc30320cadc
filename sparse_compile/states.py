"""What a checkpoint holds of each site, and whether it is of this model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from sparse_compile import naming
from sparse_compile.checks import near
from sparse_compile.site import Counters, Site


def check_names(state: Iterable[str], root: nn.Module) -> None:
    """Refuse a state of layers that the model lacks; those of a second model (``@1``) are not looked at."""
    paths = [path for path, _ in (*root.named_modules(), *root.named_parameters())]
    known = {naming.clean(path) for path in paths}
    for name in state:
        if "@" not in name and name.removesuffix(naming.END_OF_BLOCK) not in known:
            raise ValueError(
                f"state is of another model: it has a layer '{name}', which this one lacks; near names: "
                f"{near(name, known) or 'none'}."
            )


def state_of(site: Site) -> dict[str, Any]:
    site.settle()
    return {**site.state_dict(), "counters": dataclasses.asdict(site.counters), "layer": list(site.layer)}


def load(site: Site, state: dict[str, Any], shape: tuple[int, ...]) -> None:
    """``shape``: of the site, in a graph or at its last backward."""
    site.settle()
    site.shape, before = shape, site.shape
    there, here = tuple(state.get("layer", ())), site.layer
    site.shape = before
    if there and here and there != here:
        raise ValueError(
            f"state is of another model: sizes of '{site.name}' are {there} there, and {here} here."
        )
    site.counters = Counters(**state.get("counters", {}))
    site.load_state_dict({key: value for key, value in state.items() if key not in ("counters", "layer")})
