"""Readable joint graphs, before and after the passes: kept, written to a folder, sent to TORCH_TRACE."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from torch._logging import trace_structured
from torch.fx import Graph


@dataclasses.dataclass(frozen=True, slots=True)
class GraphDump:
    """The readable code of one joint graph.

    Attributes:
        index: which graph of the backend it is, in order of compilation.
        before: as AOTAutograd traced it.
        after: as the passes left it.
    """

    index: int
    before: str
    after: str

    def publish(self, folder: str | os.PathLike[str] | bool | None) -> None:
        """Write ``graph_<index>_before.py`` and ``…_after.py`` into ``folder`` (if one is given), and emit
        both as structured-trace artifacts, which tlparse lists beside PyTorch's own graphs."""
        for when, code in (("before", self.before), ("after", self.after)):
            name = f"graph_{self.index}_{when}"
            if isinstance(folder, str | os.PathLike):
                Path(folder).mkdir(parents=True, exist_ok=True)
                (Path(folder) / f"{name}.py").write_text(code)
            emit(f"sparse_compile_{name}", code)


def emit(name: str, text: str) -> None:
    """One artifact of the structured trace."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: text,
        expect_trace_id=False,
    )


def dump(graph: Graph) -> str:
    """A graph as code, with the shape and the origin of every value."""
    module = graph.owning_module
    if module is None:
        return str(graph)
    module.recompile()
    return module.print_readable(print_output=False)
