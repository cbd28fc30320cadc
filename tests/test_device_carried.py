"""Rows that are carried on a GPU, as a backend does it: what it counts, when it carries, and when it computes
all rows. Without a GPU the CPU is taken for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from padded import CASES
from sparse_compile.passes import forward, layouts
from test_unneeded import LENGTH, PRODUCT, ROWS, SAMPLES, TOKENS, UNNEEDED, WIDTH, Net, batch, sites
from torch import Tensor, nn

pytest.importorskip("triton")

from sparse_compile import Reuse, Sample, Schedule, SparseBackend, sparse_backend, variants
from sparse_compile.kernels import choice, on_device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_CPU", ())
    monkeypatch.setattr(forward, "_GPU", ("cpu", "cuda"))
    monkeypatch.setattr(layouts, "_FEWEST_ROWS", 2)
    monkeypatch.setattr(on_device, "available", lambda device: True)
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: list(candidates)[-1])


class Run:
    """A model in training; no weight changes."""

    def __init__(self, model: nn.Module, schedule: Schedule | None = None, **options: Any) -> None:
        self.model = model.to(DEVICE)
        mode = options.pop("mode", None)
        # Debugging keeps it out of caches.
        self.backend = sparse_backend(
            schedule or Schedule.exact(), **{"compiler": "aot_eager", "debug": True, **options}
        )
        self.compiled = torch.compile(self.model, backend=self.backend, mode=mode)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0)

    def __call__(self, *inputs: Tensor, forwards: int = 1, compiled: bool = True) -> list[Tensor]:
        """The gradients of one step."""
        self.optimizer.zero_grad()
        run = self.compiled if compiled else self.model
        torch.manual_seed(2)
        sum(run(*inputs) for _ in range(forwards)).backward()  # type: ignore[union-attr]
        if compiled:
            self.optimizer.step()
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    @property
    def carried(self) -> int:
        """Of how many linears the graph that ran last carries the rows."""
        return sum(site.carried for site in self.backend.report().sites)


def tokens(real: int) -> tuple[Tensor, Tensor]:
    """A batch of so many real tokens in each sample."""
    x, _ = batch()
    return x.to(DEVICE), (torch.arange(TOKENS) < real).expand(SAMPLES, -1).to(DEVICE)


PADDED, FULL = LENGTH, TOKENS


@pytest.mark.parametrize("name", ["first token, dropout", "some tokens", "last token, gpt2", "two sequences"])
def test_models(name: str) -> None:
    build, make_batch = CASES[name]
    model = build().to(DEVICE)
    inputs = {key: value.to(DEVICE) for key, value in make_batch().items()}
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager", debug=True)

    def gradients(run: Any) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(2)
        loss = run(**inputs)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    found, wanted = gradients(torch.compile(model, backend=backend)), gradients(model)
    largest = max(float(each.abs().max()) for each in wanted)
    for ours, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-14 * largest)
    totals = backend.report().totals
    assert totals["flops_forward"] < 0.65 * totals["flops_forward_dense"]
    assert totals["flops_backward"] < 0.65 * totals["flops_backward_dense"]
    assert sum(site.carried for site in backend.report().sites) >= 9


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("forwards", [1, 2])
def test_the_report_counts_each_row_once(forwards: int, calls: int, checkpointed: bool) -> None:
    torch.manual_seed(17)
    run = Run(Net(checkpointed=checkpointed, calls=calls))
    found = run(*tokens(PADDED), forwards=forwards)
    for ours, truth in zip(found, run(*tokens(PADDED), forwards=forwards, compiled=False), strict=True):
        torch.testing.assert_close(ours, truth)
    by_name = sites(run.backend)
    for name in ("up", "down"):
        site = by_name[name]
        assert (site.method, site.shape) == ("exact", (ROWS, WIDTH, WIDTH))
        assert site.rows == forwards * calls * ROWS
        assert site.rows_unneeded == site.rows_skipped == forwards * calls * UNNEEDED
        assert site.flops_forward_dense == calls * PRODUCT
        assert site.flops_forward == calls * PRODUCT * LENGTH / TOKENS
        assert site.flops_backward == site.flops_backward_dense * LENGTH / TOKENS
    # The input of the first layer wants no gradient.
    assert by_name["up"].flops_backward_dense == (2 * calls - 1) * PRODUCT
    assert by_name["down"].flops_backward_dense == 2 * calls * PRODUCT
    assert "2 linears hand on needed rows only" in str(run.backend.report())


def test_batches_without_padding_are_computed_whole_and_looked_at_now_and_then() -> None:
    """All of both graphs' gradients are right, and the report is of the one that ran last."""
    run, carried = Run(Net()), []
    for _ in range(40):
        found = run(*tokens(FULL))
        carried.append(run.carried)
        assert len(run.backend.graphs) == (1 if len(carried) == 1 else 2), "the other one is compiled once"
    torch.testing.assert_close(found, run(*tokens(FULL), compiled=False))
    assert set(carried) == {0, 2}
    looks = [step for step, n in enumerate(carried) if n]
    assert looks == [0, 2, 6, 14, 30]
    assert sites(run.backend)["up"].rows == 40 * ROWS


def test_padding_that_comes_later_is_carried() -> None:
    run = Run(Net())
    for _ in range(4):
        run(*tokens(FULL))
    assert run.carried == 0
    for _ in range(5):
        found = run(*tokens(PADDED))
    assert run.carried == 2
    torch.testing.assert_close(found, run(*tokens(PADDED), compiled=False))


def test_a_full_batch_among_padded_ones_changes_nothing() -> None:
    run = Run(Net())
    for real in (PADDED, PADDED, FULL, PADDED, FULL, FULL, PADDED):
        torch.testing.assert_close(run(*tokens(real)), run(*tokens(real), compiled=False))
        assert run.carried == 2
    assert len(run.backend.graphs) == 1


def test_nothing_changes_within_a_step() -> None:
    """Under activation checkpointing a forward runs twice, the second time in the backward."""
    run = Run(Net(checkpointed=True))
    for _ in range(3):  # micro-batches of one step
        run.compiled(*tokens(FULL)).backward()
        assert run.carried == 2
    run.optimizer.step()
    for _ in range(3):
        run.compiled(*tokens(FULL)).backward()
        assert run.carried == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_through_inductor(dynamic: bool) -> None:
    """Both graphs, compiled as they are for training."""
    torch.manual_seed(17)
    model = Net().to(DEVICE)
    backend = sparse_backend(Schedule.exact(), debug=True)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    for real in (FULL, FULL, PADDED, PADDED):
        found = []
        for run in (compiled, model):
            optimizer.zero_grad()
            run(*tokens(real)).backward()
            found.append([p.grad.clone() for p in model.parameters()])
            if run is compiled:
                optimizer.step()
        torch.testing.assert_close(*found)
    assert len(backend.graphs) == 2
    assert sites(backend)["up"].rows_unneeded == 2 * UNNEEDED, "the third step looked, the fourth carried"


def test_a_graph_that_cannot_be_compiled_again_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Net())
    run(*tokens(FULL))

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(SparseBackend, "_compile", fails)
    with pytest.warns(UserWarning, match="could not be compiled again"):
        found = run(*tokens(FULL))
    torch.testing.assert_close(found, run(*tokens(FULL), compiled=False))
    for _ in range(3):
        run(*tokens(FULL))
    assert run.carried == 2


def test_guards_that_dynamo_does_not_know_of_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second compilation that holds for some sizes only would be called with all."""
    counts = iter([3, 4])
    monkeypatch.setattr(variants, "_guards", lambda shapes: next(counts))
    run = Run(Net())
    for _ in range(3):
        run(*tokens(FULL))
    assert run.carried == 2


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(linear=Sample(0.5)),
        Schedule(linear=Reuse(0.5)),
        Schedule(attention=Sample(0.5)),
        Schedule(blocks=Sample(0.5, where="*")),
        Schedule(skip_unneeded=False),
    ],
    ids=["linear", "reuse", "attention", "blocks", "all rows"],
)
def test_where_more_is_left_out_ops_leave_it_out(schedule: Schedule) -> None:
    run = Run(Net(), schedule)
    run(*tokens(PADDED))
    assert run.carried == 0
    assert "needed_rows" not in run.backend.graphs[0].after


def test_cuda_graphs_hold_no_number_of_rows() -> None:
    run = Run(Net(), mode="reduce-overhead")
    run(*tokens(PADDED))
    assert "needed_rows" not in run.backend.graphs[0].after


def test_without_a_gradient_nothing_is_rewritten() -> None:
    run = Run(Net())
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(run.compiled(*tokens(PADDED)), run.model(*tokens(PADDED)))
    (graph,) = run.backend.graphs
    assert "sparse_compile" not in graph.after


def test_a_resumed_run_continues() -> None:
    run, other = Run(Net()), Run(Net())
    other.model.load_state_dict(run.model.state_dict())
    for _ in range(2):
        run(*tokens(PADDED))
    other.backend.load_state_dict(run.backend.state_dict())
    torch.testing.assert_close(other(*tokens(PADDED)), run(*tokens(PADDED)))
    assert sites(other.backend)["up"].rows == sites(run.backend)["up"].rows == 3 * ROWS
