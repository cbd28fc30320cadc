"""The sizes of the batches in a graph whose rows may be carried from op to op (``passes/compact.py``)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from sparse_compile.passes import graph as g
from torch.fx import Node

_FEWEST_ROWS = 64  # of batches of one size; with fewer there is nothing to gain
_SMALLEST_SHARE = 0.1  # of the FLOPs of the first kind: a head of one row a sample has less


def layouts_of(linears: Iterable[Node]) -> list[tuple[Any, Any]]:
    """Samples and tokens of the batch, each a number or a symbol, for every kind of sequence that linears are
    given (an encoder's and a decoder's); those with more FLOPs first, and one for each number of rows."""
    layouts: dict[str, tuple[Any, Any]] = {}
    weight: dict[str, int] = {}
    for op in linears:
        x: Any = op.args[1]
        shape = g.shape_of(x)
        if x.target in g.VIEWS and len(g.shape_of(x.args[0])) == 3:
            shape = g.shape_of(x.args[0])
        layout = (shape[0], shape[1]) if len(shape) == 3 else (shape[0], 1)
        if g.same_size(math.prod(layout), g.shape_of(op)[0]):
            name = str(layout)
            layouts[name] = layout
            weight[name] = weight.get(name, 0) + g.numel(op) * g.sizes(g.shape_of(x))[-1]
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(layouts, key=lambda name: -weight[name]):
        rows = math.prod(layouts[name])
        if weight[name] < _SMALLEST_SHARE * max(weight.values()):
            break
        if not isinstance(rows, int) or rows >= _FEWEST_ROWS:
            found.setdefault(str(rows), layouts[name])
    return list(found.values())
