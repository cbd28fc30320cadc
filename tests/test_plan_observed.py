"""Steps that the host looks at (adaptive sampling's measurements, a monitor) where ops are planned: as where
they are called. Without a GPU the kernels are interpreted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_attention import cuda_attention_on_cpu  # noqa: F401
from planned import SCHEDULES, Batch, Run, as_on_a_gpu, batch, close  # noqa: F401

pytest.importorskip("triton")

from sparse_compile import Monitor, Reuse, Sample, Schedule, planner
from sparse_compile.planned_attention import PlannedAttention
from sparse_compile.planned_block import PlannedBlock
from sparse_compile.planned_linear import PlannedLinear
from sparse_compile.settings.adaptive import Adaptive

pytestmark = pytest.mark.usefixtures("cuda_attention_on_cpu", "as_on_a_gpu")

EVERY = 4


def adaptive(tau: float = 0.5, **settings: Any) -> Adaptive:
    return Sample.adaptive(act_tau=tau, weight_tau=tau, cal_var_freq=EVERY, **settings)


ADAPTIVE = {
    "both": Schedule(linear=adaptive(update="solve", clip="auto"), blocks=adaptive(update="solve")),
    "rows": Schedule(linear=adaptive()),
    "blocks, attention": Schedule(blocks=adaptive(update="solve"), attention=Sample(0.5)),
    "blocks, reuse": Schedule(blocks=adaptive(update="solve"), linear=SCHEDULES["reuse"].linear),
}


def batches(count: int) -> list[Batch]:
    """Of several lengths of what is alive; the first of each step of a measurement is short."""
    return [batch(alive=3 + step % 4, seed=step) for step in range(count)]


@pytest.mark.parametrize("name", ["both", "blocks, attention", "blocks, reuse"])
def test_adaptive_sampling_is_that_of_ops_that_are_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (Run(ADAPTIVE[name], monkeypatch, planned=planned) for planned in (True, False))
    steps = batches(2 * EVERY + 2)
    mine = [ours(each) for each in steps]
    torch._dynamo.reset()
    others = [theirs(each) for each in steps]
    assert ".planned(" in ours.backend.graphs[0].after
    # What is reused is remembered a step later, and a step later still in the layer below.
    late = 2 + EVERY if name == "blocks, reuse" else 0
    for one, other in zip(mine[late:], others[late:], strict=True):
        close(one, other)
    history = ours.backend.report().history
    assert len(history) == 3
    shares = [*history[-1]["sample_shares"].values(), *history[-1]["row_shares"].values()]
    assert min(shares) < 0.9, "nothing was sampled"
    for one, other in zip(history, theirs.backend.report().history, strict=True):
        assert one.keys() == other.keys()
        for what in one:
            assert one[what] == pytest.approx(other[what], rel=1e-4), what


def test_a_base_survives_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(ADAPTIVE["blocks, reuse"], monkeypatch)
    for _ in range(EVERY):
        run()
    measured, after = run.plan_of_a_step(), run.plan_of_a_step()
    assert {choice.measured for choice in measured.choices} == {True}
    assert not any(choice.recall for choice in measured.choices)
    assert any(choice.recall for choice in after.choices)


def test_only_measurements_are_asked_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a plan is known; and what they measure is in none of its programs."""
    run, asked = Run(ADAPTIVE["both"], monkeypatch), []
    for site in (PlannedLinear, PlannedAttention, PlannedBlock):
        whole: Callable[..., Any] = site.launch

        def launch(self: Any, plan: Any, number: int, *rest: Any, _whole: Any = whole, **named: Any) -> Any:
            asked.append((run.backend.step, plan.choices[number].measured))
            return _whole(self, plan, number, *rest, **named)

        monkeypatch.setattr(site, "launch", launch)
    steps = 4 * EVERY
    for _ in range(steps):
        run()
    assert not any(each.programs.found for each in run.plans if each.observed)
    sites = len(run.plans[0].sites)
    assert len({step for step, measured in asked if measured}) > 1
    for step in range(0, steps, EVERY):
        if run.backend._runtime.controller.measures(step) and step > 0:
            assert asked.count((step, True)) == sites
    last = [step for step, measured in asked if not measured and step > steps - EVERY]
    # The first and the second step of a plan, and no more.
    assert max(map(last.count, set(last)), default=0) <= sites
    assert steps - 1 not in last


def test_a_resumed_run_goes_on_as_it_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the shares that were measured before."""
    whole, first = (Run(ADAPTIVE["both"], monkeypatch) for _ in range(2))
    for _ in range(EVERY + 1):
        whole()
        first()
    resumed = Run(ADAPTIVE["both"], monkeypatch)
    resumed.backend.load_state_dict(first.backend.state_dict())
    for _ in range(EVERY - 2):
        close(resumed(), whole())


def test_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adaptive share is of the rows that are not zero; as many FLOPs are counted."""
    ours, theirs = (Run(ADAPTIVE["rows"], monkeypatch, planned=planned) for planned in (True, False))
    for run in (ours, theirs):
        for _ in range(EVERY + 2):
            run()
    found, wanted = ours.counted_in_a_step(), theirs.counted_in_a_step()
    for site in wanted:
        for what in ("backwards", "rows", "rows_zero", "flops_backward_dense", "flops_forward_dense"):
            assert found[site][what] == wanted[site][what], (site, what)
        assert found[site]["flops_backward"] < found[site]["flops_backward_dense"]
        assert found[site]["flops_backward"] == wanted[site]["flops_backward"]


def test_a_monitor_sees_what_it_sees_of_ops_that_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """And changes nothing."""
    monitor, schedule = Monitor(every=EVERY), Schedule(linear=Sample(0.3), attention=Reuse(0.6))
    ours, theirs = (Run(schedule, monkeypatch, monitor=monitor, planned=planned) for planned in (True, False))
    without = Run(schedule, monkeypatch)
    for _ in range(EVERY):
        close(ours(), without())
    torch._dynamo.reset()
    for _ in range(EVERY):
        theirs()
    found, wanted = ours.backend.report().measurements, theirs.backend.report().measurements
    assert ".planned(" in ours.backend.graphs[0].after
    assert {each.gradient for each in found} == {"dX", "dW", "dQ", "dK", "dV"}
    seen = [(each.step, each.site, each.gradient, each.method) for each in found]
    assert seen == [(each.step, each.site, each.gradient, each.method) for each in wanted]
    for one, other in zip(found, wanted, strict=True):
        close_to = 0.1 if one.method == "reuse" else 1e-4  # it is remembered a step later
        assert one.cosine == pytest.approx(other.cosine, rel=close_to)
        assert one.relative_error == pytest.approx(other.relative_error, rel=close_to)


def test_what_was_used_longest_ago_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is lost of what was counted."""
    kept, dropped = (Run(SCHEDULES["exact"], monkeypatch) for _ in range(2))
    sizes = [(samples, tokens) for samples in (2, 3) for tokens in (4, 5, 6)]
    for _ in range(4):
        for size in sizes:
            kept(batch(*size))
    monkeypatch.setattr(planner, "_KEPT", 3)
    for _ in range(4):
        for size in sizes:
            dropped(batch(*size))
    # And what each of two graphs began with.
    assert len(dropped.plans) <= 2 * (3 + 1) < len(kept.plans)
    found, wanted = dropped._counters(), kept._counters()
    for site in wanted:  # (Zero rows are counted where they are looked for.)
        for what in ("backwards", "rows", "flops_forward_dense", "flops_backward_dense"):
            assert found[site][what] == wanted[site][what]
