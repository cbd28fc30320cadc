"""Ops that are recorded into CUDA graphs against those that are called, on the same batches. Without a GPU
the kernels are interpreted, and every step runs as the one that would be recorded."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from cuda_attention import cuda_attention_on_cpu  # noqa: F401
from cuda_linear import nothing_waits
from planned import (  # noqa: F401
    DEVICE,
    LINEARS,
    SAMPLES,
    SCHEDULES,
    STEPS,
    TOKENS,
    Net,
    Run,
    as_on_a_gpu,
    batch,
    close,
    replaying,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from sparse_compile import (
    Monitor,
    Reuse,
    RotatedTopK,
    Sample,
    Schedule,
    SparseBackend,
    compilers,
    plan,
    planner,
    sparse_backend,
)
from sparse_compile.kernels import choice
from sparse_compile.planned_linear import PlannedLinear

pytestmark = pytest.mark.usefixtures("cuda_attention_on_cpu", "as_on_a_gpu")


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_are_those_of_ops_that_are_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Run(SCHEDULES[name], monkeypatch)
    mine = [ours() for _ in range(STEPS)]
    torch._dynamo.reset()
    theirs = Run(SCHEDULES[name], monkeypatch, planned=False)
    others = [theirs() for _ in range(STEPS)]
    # What is reused is remembered a step later: what size it has, is not known before.
    late = "reuse" in name
    for one, other in zip(mine[late:], others, strict=False):
        close(one, other)
    (graph,), (called,) = ours.backend.graphs, theirs.backend.graphs
    assert ".planned(" in graph.after
    assert "prepare_backward" in graph.after
    assert ".planned(" not in called.after
    for one, other in zip(ours.backend.report().sites, theirs.backend.report().sites, strict=True):
        assert (one.name, one.method, one.kernel) == (other.name, other.method, other.kernel)
        assert (one.keep, one.rows) == (other.keep, other.rows)
    if late:
        ours()
    assert ours.counted_in_a_step() == theirs.counted_in_a_step()


@pytest.mark.parametrize("name", ["sample dW", "reuse, every 3rd", "blocks"])
def test_a_replay_does_what_the_run_did_that_was_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides, draws and counts runs at each step; what launches need not."""
    ran, replayed = Run(SCHEDULES[name], monkeypatch), Run(SCHEDULES[name], monkeypatch)
    for _ in range(6):
        ran()
        replayed()
    wanted, counted = [ran.plan_of_a_step() for _ in range(4)], ran.counted_in_a_step()
    with replaying(monkeypatch):
        found, again = [replayed.plan_of_a_step() for _ in range(4)], replayed.counted_in_a_step()
    assert [each.choices for each in found] == [each.choices for each in wanted]
    for site, counters in counted.items():  # what the device counts aside
        for what in ("backwards", "rows", "flops_forward_dense", "flops_backward_dense"):
            assert again[site][what] == counters[what]
    mine, other = (run.backend.state_dict()["sites"] for run in (replayed, ran))
    for site in mine:
        assert mine[site].get("draws") == other[site].get("draws")
        assert mine[site].get("refreshes") == other[site].get("refreshes")
        ages = [[age for _, age, *_ in each.get("bases", {}).values()] for each in (mine[site], other[site])]
        assert ages[0] == ages[1]


@pytest.mark.parametrize("name", ["exact", "reuse, every 3rd"])
def test_steps_that_do_the_same_have_one_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a CUDA graph would be recorded at each of them."""
    run = Run(SCHEDULES[name], monkeypatch)
    for _ in range(6):
        run()
    with replaying(monkeypatch):
        found = [run.plan_of_a_step().number for _ in range(20)]
    # With and without a look for rows that are zero; and a base is renewed, or not.
    assert len(set(found)) <= 2
    assert len(run.plans) <= 6


def test_a_phase_has_a_plan_and_no_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(linear=Reuse([(0.0, 0.0), (0.5, 0.4), (0.8, 0.8)]), total_steps=10)
    run = Run(schedule, monkeypatch)
    kept = []
    for _ in range(10):
        methods = {choice.method for choice in run.plan_of_a_step().choices if choice.recall}
        kept.append({round(method.keep, 3) for method in methods if isinstance(method, Reuse)})
    assert kept == [set()] * 6 + [{0.5}] * 2 + [{0.2}] * 2
    assert len(run.backend.graphs) == 1


def test_zero_rows_are_skipped_once_they_were_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Schedule.exact(skip_unneeded=False), monkeypatch)
    plans = [run.plan_of_a_step() for _ in range(4)]
    skipped = [[choice.skip for choice in each.choices] for each in plans]
    assert skipped[0] == [0] * 3
    assert all(skipped[3])
    counted = run.counted_in_a_step()
    assert {site["rows_zero"] for site in counted.values()} == {SAMPLES * 2}
    assert {site["rows_computed"] for site in counted.values()} == {SAMPLES * 4}


def test_rows_that_nothing_needs_are_left_out_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Schedule.exact(), monkeypatch)
    for _ in range(4):
        run()
    counted = run.counted_in_a_step()
    assert {site["rows_unneeded"] for site in counted.values()} == {SAMPLES * 2}
    # And all of them again, as soon as all are needed.
    for _ in range(3):
        run(batch(alive=TOKENS))
    with torch.no_grad():
        wanted = run.model(*batch(alive=TOKENS))
    torch.testing.assert_close(run.loss(batch(alive=TOKENS)), wanted)


def test_batches_of_several_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base is of sequences of one length; and each length has its place for one."""
    ours, theirs = (Run(LINEARS, monkeypatch, planned=planned) for planned in (True, False))
    sizes = [(3, 6), (2, 6), (3, 5), (3, 6), (3, 6), (2, 6), (3, 5), (3, 5)]
    for _ in range(2):
        for samples, tokens in sizes:
            ours(batch(samples, tokens))
    torch._dynamo.reset()
    for samples, tokens in sizes:
        theirs(batch(samples, tokens))
    # By now either reuses what it remembered of the batch before.
    assert all(site.method == "reuse" for site in ours.backend.report().sites)
    ours(batch(3, 5))
    theirs(batch(3, 5))
    close(ours(batch(3, 5)), theirs(batch(3, 5)))


def test_one_batch_of_another_size_leaves_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the last of an epoch is. If the size stays, there is a base of its own after the second."""
    run = Run(Schedule(linear=Reuse(0.6), attention=Reuse(0.6)), monkeypatch)

    def reused(samples: int) -> set[bool]:
        choices = run.plan_of_a_step(batch(samples)).choices
        return {choice.recall for choice in choices}

    for samples in (8, 2, 8, 4, 8, 8):  # until each size is known
        run(batch(samples))
    sizes = (8, 4, 8, 2, 8, 7, 8)  # of which 7 is new, and too much like 8 to be passed over
    assert [reused(n) for n in sizes] == [{True}, {False}, {True}, {False}, {True}, {False}, {True}]
    assert [reused(n) for n in (4, 4, 4, 4)] == [{False}, {False}, {True}, {True}]


def test_no_base_is_of_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(LINEARS, monkeypatch)
    for _ in range(4):
        run()
    assert all(choice.recall for choice in run.plan_of_a_step().choices)
    run.backend.step += 2
    assert not any(choice.recall for choice in run.plan_of_a_step().choices)
    assert all(choice.recall for choice in run.plan_of_a_step().choices)


def test_no_rows_are_skipped_that_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what is skipped has changed too often to change again, and a batch had no padding: what was made
    of a mask is read by its linears."""
    run = Run(Schedule.exact(), monkeypatch)
    for _ in range(40):  # rows are counted ever more rarely
        run()
    assert any(choice.skip_mask for choice in run.plan_of_a_step().choices)
    monkeypatch.setattr(planner, "_MANY", 0)
    for _ in range(4):
        choices = run.plan_of_a_step(batch(alive=TOKENS)).choices
        assert all(choice.count_mask for choice in choices if choice.skip_mask)


def test_a_resumed_run_leaves_rows_of_the_forward_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Schedule.exact(), monkeypatch)
    for _ in range(4):
        run()
    wanted = run.counted_in_a_step()
    state = run.backend.state_dict()
    torch._dynamo.reset()
    resumed = Run(Schedule.exact(), monkeypatch)
    resumed.backend.load_state_dict(state)
    for _ in range(4):
        resumed()
    found = resumed.counted_in_a_step()
    left_out = {name: site["rows_unneeded"] for name, site in found.items()}
    assert left_out == {name: site["rows_unneeded"] for name, site in wanted.items()}
    assert all(left_out.values())


def test_two_forwards_before_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each remembers its own."""
    ours, theirs = (Run(LINEARS, monkeypatch, planned=planned) for planned in (True, False))
    ours(batch(seed=1), batch(seed=2))
    for _ in range(3):
        mine = ours(batch(seed=1), batch(seed=2))
    torch._dynamo.reset()
    for _ in range(3):
        other = theirs(batch(seed=1), batch(seed=2))
    close(mine, other)


def test_layers_that_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo compiles the code of a layer once for all that are alike; each has plans of its own."""
    found = {}
    for planned in (True, False):
        torch._dynamo.reset()
        if not planned:
            monkeypatch.setattr(SparseBackend, "_planned_calls", lambda *_: None)
        torch.manual_seed(3)
        model = Net(attends=False).to(DEVICE)
        torch.manual_seed(5)
        backend = sparse_backend(SCHEDULES["sample, clip"], compiler="aot_eager", debug=True)
        for layer in model.layers:
            layer.compile(backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0)
        x, labels = batch()
        for _ in range(3):
            optimizer.zero_grad()
            model(x.requires_grad_(), labels).backward()
            optimizer.step()
        assert len(backend.graphs) == 1
        rows = {site.name: site.rows for site in backend.report().sites if site.kind == "linear"}
        assert rows["layers.0.mix"] == rows["layers.1.mix"] == 3 * SAMPLES * TOKENS
        found[planned] = [p.grad for p in model.parameters()]
    close(found[True], found[False])


class Made(TorchDispatchMode):
    """Remembers, but does not hold, the tensors that are made in it."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.tensors += [weakref.ref(each) for each in tree_leaves(result) if isinstance(each, Tensor)]
        return result


@pytest.mark.parametrize("name", ["exact", "sample", "sample dW", "reuse"])
def test_a_launch_lets_go_of_what_it_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a CUDA graph could not be recorded: its memory is used again."""
    made, launch = Made(), PlannedLinear.launch

    def launched(*args: Any, **options: Any) -> Any:
        with made:
            return launch(*args, **options)

    monkeypatch.setattr(PlannedLinear, "launch", launched)
    run = Run(SCHEDULES[name], monkeypatch, mode="reduce-overhead")
    for _ in range(2):
        run()
        run.model.zero_grad()
        gc.collect()
        assert len(made.tensors) > 5
        assert not [each() for each in made.tensors if each() is not None]


def test_where_it_was_found_to_be_slower_a_layer_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(key: Any, candidates: Any) -> str:
        name = "dense" if "dense" in candidates else list(candidates)[-1]
        return choice._chosen.setdefault((True, key), name)  # what is recorded is timed without the host

    monkeypatch.setattr(choice, "fastest", dense)
    run = Run(SCHEDULES["sample"], monkeypatch)
    for _ in range(2):
        run()
    assert all(choice.method is None for choice in run.plan_of_a_step().choices)
    for site in run.backend.report().sites:
        assert (site.method, site.keep) == ("exact", 1.0), site.name
        assert "would cost more than it saves" in site.reason


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(SCHEDULES["reuse"], monkeypatch)
    for _ in range(3):
        run()
    x, labels = batch()
    assert not all(
        bool(gradient.isfinite().all()) for gradient in run((x * torch.inf, labels), overflows=True)
    )
    assert all(bool(gradient.isfinite().all()) for gradient in run())
    for site in run.backend.state_dict()["sites"].values():
        assert all(bool(base.isfinite().all()) for base, *_ in site.get("bases", {}).values())
        for tensors, *_ in site.get("snapshots", {}).values():
            assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_first_base_that_is_not_finite_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(LINEARS, monkeypatch)
    x, labels = batch()
    run()
    for _ in range(2):
        run((x * torch.inf, labels), overflows=True)
    # Two steps later: by now nothing is taken for remembered that is not.
    run()
    assert not any(choice.recall for choice in run.plan_of_a_step().choices)
    for _ in range(2):
        run()
    assert any(choice.recall for choice in run.plan_of_a_step().choices)
    assert all(bool(gradient.isfinite().all()) for gradient in run())


@pytest.mark.parametrize("name", ["sample, clip", "reuse, sample", "blocks"])
def test_a_resumed_run_continues(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(SCHEDULES[name], monkeypatch)
    for _ in range(4):
        run()
    state = run.backend.state_dict()
    wanted = [run() for _ in range(3)]
    torch._dynamo.reset()
    resumed = Run(SCHEDULES[name], monkeypatch)
    resumed.backend.load_state_dict(state)
    for one, other in zip([resumed() for _ in range(3)], wanted, strict=True):
        close(one, other)


def test_a_graph_without_gradients_is_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(SCHEDULES["reuse"], monkeypatch)
    for _ in range(2):
        run()
        with torch.no_grad():
            found = run.loss(batch())
            torch.testing.assert_close(found, run.model(*batch()))


@pytest.mark.parametrize(
    ("schedule", "monitor", "why"),
    [
        (Schedule.vcas(), None, "shares are adapted to what is measured"),
        (Schedule(linear=Reuse("2:4")), None, "single entries are reused"),
        (Schedule(linear=Reuse(0.5, granularity="element")), None, "single entries are reused"),
        (Schedule(weight_gradients=RotatedTopK(0.01)), None, "weight gradients leave the graph"),
        (Schedule.exact(), Monitor(every=5), "gradients are measured"),
        (Schedule.exact(), None, None),
        (Schedule(linear=Reuse(0.5), attention=Sample(0.5), blocks=Sample(0.5)), None, None),
    ],
)
def test_what_cannot_be_recorded(schedule: Schedule, monitor: Monitor | None, why: str | None) -> None:
    assert plan.refusal(schedule, monitor, recorded=True) == why
    # Where every op is called, it can be measured, too.
    measured = why is not None and "measured" in why
    assert plan.refusal(schedule, monitor, recorded=False) == (None if measured else why)


def test_the_report_says_whether_ops_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "records", lambda patches: True)
    for schedule, said in (
        (Schedule.exact(), plan.RECORDED),
        (Schedule.vcas(), "ops run between CUDA graphs, since shares are adapted to what is measured"),
    ):
        torch._dynamo.reset()
        backend = sparse_backend(schedule, compiler="aot_eager")
        torch.compile(Net(attends=False).to(DEVICE), backend=backend)(*batch())
        assert backend.report().cuda_graphs == said
        assert said in str(backend.report()).splitlines()[0]


def test_it_is_called_as_before_where_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Schedule(linear=Reuse("2:4")), monkeypatch)
    run()
    assert ".planned(" not in run.backend.graphs[0].after
    assert "prepare_backward" not in run.backend.graphs[0].after


@pytest.mark.parametrize(
    ("mode", "options", "records"),
    [
        (None, None, False),
        ("default", None, False),
        ("reduce-overhead", None, True),
        ("max-autotune", None, True),
        (None, {"triton.cudagraphs": True}, True),
        ("reduce-overhead", {"triton.cudagraphs": False}, False),
    ],
)
def test_when_cuda_graphs_are_recorded(
    mode: str | None, options: dict[str, Any] | None, records: bool
) -> None:
    assert compilers.records(compilers.patches(mode, options)) == records


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@pytest.mark.parametrize("name", ["sample", "reuse", "blocks"])
def test_replays_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of steps that were recorded and replayed are those of ops that are called."""
    from torch._dynamo.utils import counters

    gradients = {}
    for mode in ("reduce-overhead", "default"):
        torch._dynamo.reset()
        run = Run(SCHEDULES[name], monkeypatch, compiler="inductor", mode=mode)
        counters.clear()
        found = [run() for _ in range(10)]
        gradients[mode] = found
        assert not counters["inductor"]["cudagraph_skips"]
    late = "reuse" in name
    for one, other in zip(gradients["reduce-overhead"][late:], gradients["default"], strict=False):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    one = batch()  # which waits for the host's memory
    with nothing_waits():
        run(one)
