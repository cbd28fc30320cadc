"""The passes together: what they leave in the graph, and how the package is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from tracing import Model, layer, trace, value

import sparse_compile
from sparse_compile import passes
from sparse_compile.sites import from_manifest

REPOSITORY = Path(sparse_compile.__file__).parent.parent


def test_records_are_in_the_graph_as_they_are_returned() -> None:
    """A graph from an on-disk cache runs without any pass; the runtime learns of it from `begin`."""

    def forward(m: Model, x: Tensor) -> Tensor:
        return m.b(torch.softmax(x @ x.transpose(1, 2), -1) @ m.a(x))

    found = trace(Model(forward, a=layer(), b=layer(4, 3)), value(2, 5, 6))
    (begin,) = found.graph.find_nodes(op="call_function", target=torch.ops.sparse_compile.begin.default)
    assert from_manifest(begin.args[1]) == (found.records, [])
    assert [record.kind for record in found.records] == ["attention", "linear", "linear"]
    assert [linear.name for linear in found.linears] == ["a", "b"]


def test_graph_without_a_linear_says_so_itself() -> None:
    found = trace(Model(lambda m, x: torch.tanh(x) * m.w, w=value(6)), value(5, 6))
    assert found.records == found.ops == []
    (begin,) = found.graph.find_nodes(op="call_function", target=torch.ops.sparse_compile.begin.default)
    assert begin.args[1] == "[[],[]]"


def test_source_hash_covers_every_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed pass must not meet a compiled graph of the old one."""
    assert passes.source_hash() == passes.source_hash()
    for source in Path(passes.__file__).parent.glob("*.py"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    original = passes.source_hash()
    monkeypatch.setattr(passes, "__file__", str(tmp_path / "__init__.py"))
    assert passes.source_hash() == original
    for source in tmp_path.glob("*.py"):
        before = source.read_bytes()
        source.write_bytes(before + b"#")
        assert passes.source_hash() != original, source.name
        source.write_bytes(before)


@pytest.mark.parametrize("folder", [REPOSITORY, Path("/")], ids=["in the repository", "elsewhere"])
def test_passes_are_imported_under_one_name(folder: Path) -> None:
    """`passes` stands at the top of the repository, and is only ever `sparse_compile.passes`."""
    code = (
        "import sys, sparse_compile, sparse_compile.passes.linear as linear\n"
        "assert 'passes' not in sys.modules, sys.modules['passes']\n"
        "print(linear.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == REPOSITORY / "passes" / "linear.py"
