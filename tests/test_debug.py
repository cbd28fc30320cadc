"""What `debug` keeps, writes and sends to tlparse."""

import json
import os
import subprocess
import sys

import pytest
import torch
from reference import MLP, square_loss

from sparse_compile import Reuse, Sample, Schedule, sparse_backend

SCHEDULE = Schedule(linear=Reuse(0.5))


def run(**options):
    backend = sparse_backend(SCHEDULE, compiler="aot_eager", **options)
    compiled = torch.compile(MLP(), backend=backend)
    for tokens in (3, 5):  # the second shape is a second graph
        square_loss(compiled(torch.randn(4, tokens, 6))).backward()
    return backend


def test_graphs_are_kept_before_and_after():
    backend = run(debug=True)
    assert [graph.index for graph in backend.graphs] == [0, 1]
    for graph in backend.graphs:
        assert "aten.mm" in graph.before
        assert "sparse_compile" not in graph.before
        assert graph.after.count("torch.ops.sparse_compile.begin.default(") == 1
        assert graph.after.count("torch.ops.sparse_compile.linear_backward.default(") == 3
        # The backward products are gone: two of every layer, one of the first.
        assert graph.before.count("aten.mm.default(") - graph.after.count("aten.mm.default(") == 5
    assert "f32[12, 6]" in backend.graphs[0].before  # 4 samples of 3 tokens, of 6 features


@pytest.mark.parametrize(
    ("schedule", "gathered"),
    [
        (Schedule.exact(), 0),
        (Schedule.exact(exclude=("second",)), 0),
        (Schedule.resprop(0.5), 2),
        (Schedule(blocks=Sample(0.5, where="second")), 2),
        (Schedule(attention=Reuse(0.5)), 0),
    ],
    ids=["exact", "exact, one left out", "reuse", "samples dropped", "attention"],
)
def test_input_gradients_are_gathered_only_where_a_method_leaves_few_rows(schedule, gathered):
    """All three layers but the first have one."""
    backend = sparse_backend(schedule, compiler="aot_eager", debug=True)
    torch.compile(MLP(), backend=backend)(torch.randn(4, 3, 6)).sum().backward()
    (graph,) = backend.graphs
    assert graph.after.count("torch.ops.sparse_compile.linear_backward.default(") == 3
    assert graph.after.count("aten._unsafe_index.Tensor(") == gathered


def test_graphs_that_serve_inference_are_left_as_they_are():
    backend = sparse_backend(SCHEDULE, compiler="aot_eager", debug=True)
    with torch.no_grad():
        torch.compile(MLP(), backend=backend)(torch.randn(4, 3, 6))
    assert all(graph.before == graph.after for graph in backend.graphs)


def test_nothing_is_kept_without_debug():
    assert run().graphs == []


@pytest.mark.parametrize("convert", [str, lambda path: path])
def test_graphs_are_written_to_a_folder(tmp_path, convert):
    folder = tmp_path / "new" / "graphs"
    backend = run(debug=convert(folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "graph_0_after.py",
        "graph_0_before.py",
        "graph_1_after.py",
        "graph_1_before.py",
    ]
    for graph in backend.graphs:
        assert (folder / f"graph_{graph.index}_before.py").read_text() == graph.before
        assert (folder / f"graph_{graph.index}_after.py").read_text() == graph.after


SCRIPT = """
import torch
from sparse_compile import Schedule, sparse_backend
backend = sparse_backend(Schedule.exact(), debug=True, compiler="aot_eager")
torch.compile(torch.nn.Sequential(torch.nn.Linear(6, 5)), backend=backend)(torch.randn(4, 6)).sum().backward()
"""


def test_graphs_are_artifacts_of_the_structured_trace(tmp_path):
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, env=environment, timeout=300)
    artifacts = artifacts_of("\n".join(path.read_text() for path in tmp_path.iterdir()))
    assert "sparse_compile" not in artifacts["sparse_compile_graph_0_before"]
    assert "aten.mm" in artifacts["sparse_compile_graph_0_before"]
    assert "sparse_compile.linear_backward" in artifacts["sparse_compile_graph_0_after"]


def artifacts_of(log):
    """The artifacts of a TORCH_TRACE log by name. A line of JSON is followed by its payload, indented."""
    found, name = {}, None
    for line in log.splitlines():
        if line.startswith("\t"):
            if name:
                found[name] += line[1:] + "\n"
        elif "{" in line:
            name = json.loads(line[line.index("{") :]).get("artifact", {}).get("name")
            if name:
                found[name] = ""
    return found
