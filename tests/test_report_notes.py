"""What the report says below its title: why less is left out than the schedule says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparse_compile import PruneSaved, Reuse, Sample, Schedule, SparseBackend, sparse_backend
from sparse_compile.integrations.transformers import SparseCompileCallback

# Dynamo asks this of every tensor that crosses a graph break.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Net(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.b(x)[:, 0]


def trained(schedule: Schedule, model: nn.Module) -> SparseBackend:
    backend = sparse_backend(schedule, compiler="aot_eager")
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        compiled(torch.randn(8, 16, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return backend


def test_nothing_to_say() -> None:
    backend = trained(Schedule.exact(), Net())
    assert backend.report().note == ""
    assert "2 linears hand on needed rows only" in str(backend.report())


def test_where_the_graph_was_broken() -> None:
    report = trained(Schedule.exact(), Net(breaks=True)).report()
    source = Path(__file__).read_text().splitlines()
    line = next(i for i, text in enumerate(source, 1) if "graph_break()" in text)
    assert report.note.startswith(f"Dynamo broke the graph at {Path(__file__).name}:{line}. What one part")
    assert report.note in str(report)


def test_a_break_is_nothing_to_one_who_wants_all_rows() -> None:
    assert trained(Schedule.exact(skip_unneeded=False), Net(breaks=True)).report().note == ""


def test_breaks_of_what_has_no_linear_are_not_named() -> None:
    model = Net()
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager")

    @torch.compile(backend=backend)
    def prepare(x: Tensor) -> Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return x + 1

    torch.compile(model, backend=backend)(prepare(torch.randn(8, 16, 32))).sum().backward()
    assert backend.report().note == ""


def test_rows_that_are_left_out_and_not_handed_on() -> None:
    said = str(trained(Schedule(linear=Reuse(0.5)), Net()).report())
    assert "no linears hand on needed rows only" in said


def test_a_model_without_blocks() -> None:
    report = trained(Schedule(blocks=Sample(0.5)), Net()).report()
    assert report.note.startswith("No blocks were found")
    report = trained(Schedule(blocks=Sample(0.5, where="a")), Net()).report()
    assert report.note == ""


def test_a_break_of_what_runs_without_a_gradient_is_none_of_the_training() -> None:
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager")
    with torch.no_grad():
        torch.compile(Net(breaks=True), backend=backend)(torch.randn(8, 16, 32))
    assert backend.report().note == ""


@pytest.mark.parametrize(("ratio", "says"), [(0.5, True), (0, False)])
def test_pruned_gradients_are_not_exact(ratio: float, says: bool) -> None:
    report = trained(Schedule(saved_activations=PruneSaved(ratio)), Net()).report()
    assert report.note.startswith("What the backward reads of activations is pruned") is says


def test_a_callback_wants_a_backend() -> None:
    with pytest.raises(ValueError, match="backend"):
        SparseCompileCallback(Schedule.exact())  # type: ignore[arg-type]
