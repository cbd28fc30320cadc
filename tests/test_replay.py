"""Programs against the ops that they stand for: launches, calls of ATen, views, what lies where it lay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_attention import cuda_attention_on_cpu  # noqa: F401
from planned import SCHEDULES, Run, as_on_a_gpu, close  # noqa: F401
from torch import Tensor

pytest.importorskip("triton")

from sparse_compile import changes, plan, planner, replay
from sparse_compile.device_forward import DeviceForward
from sparse_compile.kernels import choice, on_device
from sparse_compile.kernels.triton import launcher
from sparse_compile.planned_attention import PlannedAttention
from sparse_compile.planned_block import PlannedBlock
from sparse_compile.planned_linear import PlannedLinear
from sparse_compile.replay import BuiltLaunch, Call, Launch, Program, Programs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Op = Callable[..., Any]


def recorded(op: Op, *inputs: Tensor) -> Program:
    """The program of an op that was run twice."""
    programs = Programs()
    for _ in range(2):
        programs.run("op", inputs, lambda: op(*inputs))
    return programs.found["op"]


def check(op: Op, *inputs: Tensor, again: list[Tensor] | None = None) -> Program:
    """Its program gives what it gives, for inputs like those that it was made for."""
    program = recorded(op, *inputs)
    given = again or [torch.randn_like(each) for each in inputs]
    found, wanted = program.run(given), op(*given)
    torch.testing.assert_close(found, wanted if isinstance(wanted, Tensor) else list(wanted))
    return program


def two(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(6, 4, generator=generator).to(DEVICE) for _ in range(2))  # type: ignore[return-value]


def test_calls_of_aten_and_views() -> None:
    def op(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        upper, lower = x.t().split(2)
        product = torch.mm(y[:, 2:], upper)
        both = torch.cat([product[:, :4], y])
        return both, (lower + 1).t()[1:], product.view(-1)[3:]

    program = check(op, *two())
    called = [str(step.function) for step in program._steps if isinstance(step, Call)]
    # And no view of anything.
    assert called == ["aten.mm.default", "aten.cat.default", "aten.add.Tensor"]


def test_what_is_written_in_place() -> None:
    def op(x: Tensor, y: Tensor) -> Tensor:
        both = x.new_empty(12, 4)
        both[:6] = x
        both[6:].zero_()[:, 1].add_(y[:, 0])
        return both

    check(op, *two())


def test_what_was_there_before_lies_where_it_lies() -> None:
    sums = torch.zeros(3, 4, device=DEVICE)

    def op(x: Tensor, y: Tensor) -> Tensor:
        sums[1] += x.sum(0)
        return sums.select(0, 1) * y

    program = recorded(op, *two())
    sums.zero_()
    x, y = two(1)
    found = program.run([x, y])
    torch.testing.assert_close(sums[1], x.sum(0))
    torch.testing.assert_close(found, x.sum(0) * y)


def test_results_of_several_kinds() -> None:
    def op(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, indices = x.topk(2)
        return values.contiguous(), indices.to(torch.int32).view(torch.int16), (y > 0).view(torch.int8)

    check(op, *two())


def test_kernels_and_buffers_of_theirs() -> None:
    """What kernels alone read and write lies in one buffer, each in a place of its own."""

    def op(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = on_device.live_rows(x)
        assert rows.count is not None
        assert rows.slot is not None
        dw = on_device.weight_gradient_of_rows(x, y, rows, transposed=False)
        return dw, rows.slot

    x, y = two()
    x[1] = 0
    other = x.clone()
    other[3:5] = 0
    program = check(op, x, y, again=[other, y])
    assert program._workspace == 2 * 512  # which rows are live; their numbers, and how many they are
    made = [shape for _, shape, *_ in program._made]
    assert made == [torch.Size([6]), torch.Size([4, 4])]


@pytest.mark.parametrize("what", ["shape", "stride", "alignment"])
def test_for_other_inputs_it_is_asked_again(what: str) -> None:
    programs, ran = Programs(), []

    def run(x: Tensor) -> Any:
        def op() -> Tensor:
            ran.append(x)
            return x * 2

        return programs.run("op", [x], op)

    x, _ = two()
    for _ in range(4):
        run(x)
    assert len(ran) == 2
    padded = torch.randn(25, device=DEVICE)
    other = {"shape": x[:5], "stride": x.t().contiguous().t(), "alignment": padded[1:].view(6, 4)}[what]
    torch.testing.assert_close(run(other), other * 2)
    assert len(ran) == 3


def test_what_builds_or_times_is_watched_again() -> None:
    programs, ran = Programs(), 0

    def op() -> Tensor:
        nonlocal ran
        ran += 1
        if ran < 4:
            launcher.spoil()
        return x * 2

    x, _ = two()
    for _ in range(6):
        programs.run("op", [x], op)
    assert ran == 4
    assert programs.found


def test_what_always_builds_is_not_watched_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    programs, watched = Programs(), 0
    recorder = replay.Recorder

    def watch(inputs: list[Tensor]) -> replay.Recorder:
        nonlocal watched
        watched += 1
        return recorder(inputs)

    monkeypatch.setattr(replay, "Recorder", watch)
    x, _ = two()
    for _ in range(20):
        programs.run("op", [x], lambda: (launcher.spoil(), x * 2)[1])
    assert 1 < watched < 10
    assert not programs.found


def test_to_time_kernels_spoils_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(choice, "_time", lambda candidates: dict.fromkeys(candidates, 1.0))
    with replay.Recorder([]) as recorder:
        assert choice.fastest("key", {"one": int, "other": int}) == "one"
    assert not recorder.complete
    with replay.Recorder([]) as recorder:
        choice.fastest("key", {"one": int, "other": int})
    assert recorder.complete


def test_a_tensor_that_is_given_twice_is_not_told_apart() -> None:
    programs = Programs()
    x, _ = two()
    for _ in range(3):
        programs.run("op", [x, x], lambda: x * x)
    assert not programs.found


def test_nobody_is_watched_afterwards() -> None:
    x, _ = two()
    with pytest.raises(ZeroDivisionError), replay.Recorder([x]) as recorder:
        raise ZeroDivisionError
    x.mul(2)
    launcher.spoil()
    assert recorder.complete
    assert not recorder.steps


@pytest.mark.parametrize("name", ["exact", "sample", "reuse, sample", "blocks"])
@pytest.mark.usefixtures("as_on_a_gpu", "cuda_attention_on_cpu")
def test_from_the_third_step_of_a_plan_on_no_site_is_asked(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its gradients stay the same: those of a run in which none is replayed."""
    run = Run(SCHEDULES[name], monkeypatch)
    for _ in range(8):
        run()

    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError

    with monkeypatch.context() as patch:
        for planned in (PlannedLinear, PlannedAttention, PlannedBlock):
            patch.setattr(planned, "launch", asked)
        patch.setattr(DeviceForward, "linear", asked)
        patch.setattr(on_device, "needed_slots", asked)
        mine = [run() for _ in range(2)]
    ops = {step for each in run.plans[-1].programs.found.values() for step in map(type, each._steps)}
    assert ops & {Launch, BuiltLaunch}  # interpreted, or built for a GPU
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(Programs, "run", lambda self, key, inputs, launch: launch())
        other = Run(SCHEDULES[name], monkeypatch)
        for _ in range(8):
            other()
        theirs = [other() for _ in range(2)]
    for one, another in zip(mine, theirs, strict=True):
        close(one, another)


@pytest.mark.usefixtures("as_on_a_gpu", "cuda_attention_on_cpu")
@pytest.mark.parametrize("recorded", [False, True])
def test_where_the_host_is_slower_nothing_is_launched(
    recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a CUDA graph, which the host does not launch."""
    run = Run(SCHEDULES["sample"], monkeypatch, mode="reduce-overhead" if recorded else None)
    for _ in range(3):
        run()
    monkeypatch.setattr(planner, "worth_launching", lambda flops: flops > 4 * 18 * 16 * 16)
    changes.changed()
    step = run.plan_of_a_step()
    reasons = {row.name: row.reason for row in run.backend.report().sites}
    for site, chosen in zip(step.sites, step.choices, strict=True):
        large = recorded or site.name == "layers.1.qkv"
        assert (chosen.method is not None) == large, site.name
        assert (plan.TOO_SMALL in reasons[site.name]) == (not large)


def test_the_host_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the shortest run of some programs of several kernels; of a GPU alone."""
    monkeypatch.setattr(replay, "_seconds", [2e-4] * (replay._PROGRAMS - 1))
    assert replay.worth_launching(1)

    def op(x: Tensor, y: Tensor) -> Tensor:
        return x.mul(y).add(y).mul(x).sub(y)

    program = recorded(op, *two())
    for seconds in (3e-4, 1e-4, *[2e-4] * (replay._TIMED - 2)):
        program._time(seconds)
    assert len(replay._seconds) == replay._PROGRAMS - (DEVICE.type != "cuda")
    replay._seconds[:] = [2e-4] * (replay._PROGRAMS - 1) + [1e-4]
    assert replay.worth_launching(1.01e-4 * replay._RATE)
    assert not replay.worth_launching(0.99e-4 * replay._RATE)
