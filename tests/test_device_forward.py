"""Rows of the forward that nothing needs, as a GPU leaves them out: nobody waits for their number. Without a
GPU the kernels are interpreted, and the CPU's graphs rewritten as a GPU's."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from cuda_attention import FORMS, attend, cuda_attention_on_cpu  # noqa: F401
from cuda_linear import nothing_waits, ops_are_called
from padded import CASES
from sparse_compile.passes import forward, linear
from test_unneeded import LENGTH, PRODUCT, ROWS, TOKENS, UNNEEDED, Net, batch, sites
from torch import nn

pytest.importorskip("triton")

from sparse_compile import Reuse, Sample, Schedule, SparseBackend, device_linear, sparse_backend
from sparse_compile.device_forward import DeviceForward, Needed
from sparse_compile.kernels import choice, on_device
from sparse_compile.planned_linear import PlannedLinear
from sparse_compile.runtime import NO_TOKEN

ops = torch.ops.sparse_compile
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
planned_calls = SparseBackend._planned_calls
# (In the form that is called, where nothing is planned: the second.)
SOME = ("first token", "some tokens", "two sequences")


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_CPU", ())
    monkeypatch.setattr(forward, "_GPU", ("cpu", "cuda"))
    monkeypatch.setattr(forward, "_WORTH_ASKING", 0)
    monkeypatch.setattr(SparseBackend, "_carries", lambda *_: False)  # tests/test_device_carried.py has that
    monkeypatch.setattr(on_device, "usable", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr(on_device, "available", lambda device: True)
    monkeypatch.setattr(device_linear, "WORTH_LOOKING", 0)
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: list(candidates)[-1])
    ops_are_called(monkeypatch)


def gradients(model: torch.nn.Module, run: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The loss, and the gradient of every parameter that has one."""
    model.zero_grad()
    torch.manual_seed(2)
    loss = run(**inputs)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def net() -> Net:
    torch.manual_seed(17)
    return Net().to(DEVICE)


def one_step(run: Any, model: Net) -> dict[str, torch.Tensor]:
    """The gradients of one step."""
    model.zero_grad()
    run(*(t.to(DEVICE) for t in batch())).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def train(
    schedule: Schedule, model: Net, compiler: str = "aot_eager"
) -> tuple[dict[str, torch.Tensor], SparseBackend]:
    backend = sparse_backend(schedule, compiler=compiler, debug=True)  # in no cache
    return one_step(torch.compile(model, backend=backend), model), backend


def eager(model: Net) -> dict[str, torch.Tensor]:
    return one_step(model, model)


@pytest.mark.parametrize(("form", "name"), [("default", SOME[1]), *(("planned", name) for name in SOME)])
def test_models(name: str, form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients, with many of the forward's rows left out; in the first step and in later ones."""
    if form == "planned":
        monkeypatch.setattr(SparseBackend, "_planned_calls", planned_calls)
    build, batch = CASES[name]
    model = build().float().to(device)
    inputs = {key: value.to(device) for key, value in batch().items()}
    wanted = gradients(model, model, inputs)
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager", debug=True)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2 if form == "default" else 5):
        for ours, truth in zip(gradients(model, compiled, inputs), wanted, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)
    report = backend.report()
    graph = backend.graphs[0].after
    linears = graph.count(f"sparse_compile.linear_forward_rows.{form}(")
    assert linears >= 4
    assert 1 <= graph.count(f"sparse_compile.needed_slots.{form}(") <= linears // 2, "masks are shared"
    assert "sparse_compile.linear_forward.default(" not in graph
    left_out = [site for site in report.sites if site.rows_unneeded]
    assert len(left_out) >= 4
    assert report.totals["flops_forward"] < 0.9 * report.totals["flops_forward_dense"]
    assert report.totals["flops_backward"] < 0.9 * report.totals["flops_backward_dense"]


class Attending(nn.Module):
    """One attention by an op of CUDA; the loss reads the first tokens, which see no others."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out, self.head = (nn.Linear(16, 16) for _ in range(5))
        self.form = form

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heads = [each(x).unflatten(2, (2, 8)).transpose(1, 2) for each in (self.query, self.key, self.value)]
        causal = self.form == "flash"  # which has no mask
        y = attend(self.form, *heads, mask=None if causal else mask.clone(), is_causal=causal)
        loss: torch.Tensor = self.head(self.out(y.transpose(1, 2).flatten(2)))[:, :4].square().sum()
        return loss


@pytest.mark.usefixtures("cuda_attention_on_cpu")
@pytest.mark.parametrize("form", FORMS)
def test_what_no_query_sees_is_not_computed(form: str) -> None:
    """By what is fused on CUDA, of all whose results are not read, queries, keys and values."""
    if DEVICE.type == "cuda" and form != "efficient":
        pytest.skip("takes no float32")
    torch.manual_seed(3)
    model, x = Attending(form).to(DEVICE), torch.randn(3, 16, 16, device=DEVICE)
    mask = torch.zeros(3, 2, 16, 16, device=DEVICE).masked_fill(
        torch.arange(16, device=DEVICE) > 3, -torch.inf
    )
    wanted = gradients(model, model, {"x": x, "mask": mask})
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager")
    found = gradients(model, torch.compile(model, backend=backend), {"x": x, "mask": mask})
    torch.testing.assert_close(found, wanted)
    unneeded = {site.name: site.rows_unneeded for site in backend.report().sites if site.kind == "linear"}
    assert unneeded == dict.fromkeys(("query", "key", "value", "out", "head"), 3 * 12)


def test_what_no_loop_reads_is_written_out_by_the_op(device: torch.device) -> None:
    """Q, K and V, which attention reads, and what an activation function keeps for its backward; the others
    are gathered by what reads them."""
    build, batch = CASES["some tokens"]
    model = build().float().to(device)
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager", debug=True)
    compiled = torch.compile(model, backend=backend)
    gradients(model, compiled, {key: value.to(device) for key, value in batch().items()})
    calls = re.findall(r"linear_forward_rows\.default\((.*)\)", backend.graphs[0].after)
    names = [site.name for site in backend.report().sites if site.rows_unneeded]
    whole = {name for name, call in zip(names, calls, strict=True) if call.endswith("True")}
    assert {name.rpartition(".")[2] for name in whole} == {"query", "key", "value", "dense", "decoder"}
    assert {name for name in names if "intermediate.dense" in name} <= whole
    assert not {name for name in whole if "output.dense" in name}


def test_so_is_an_input_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under exact(), where a product reads it; where an activation function does, that gathers it."""
    monkeypatch.setattr(linear, "_on_cpu", lambda node: False)
    layers = (nn.Linear(8, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model, x = nn.Sequential(*layers).to(DEVICE), torch.randn(24, 8, device=DEVICE)
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager", debug=True)
    torch.compile(model, backend=backend)(x).square().sum().backward()
    calls = re.findall(r"linear_backward\.default\((.*)\)", backend.graphs[0].after)
    # In the order of the backward: the last layer first. The first one has no dX.
    assert [call.split(", ")[8].startswith("True") for call in calls] == [False, True, True]
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(ours, [p.grad for p in model.parameters()])


def test_each_row_is_counted_once(device: torch.device) -> None:
    model = net()
    found, backend = train(Schedule.exact(), model)
    torch.testing.assert_close(found, eager(model))
    for name in ("up", "down"):
        site = sites(backend)[name]
        assert (site.rows, site.rows_unneeded, site.rows_skipped) == (ROWS, UNNEEDED, UNNEEDED)
        assert site.flops_forward == PRODUCT * LENGTH / TOKENS
    assert sites(backend)["head"].rows_unneeded == 0


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("forwards", [1, 2])
def test_so_it_is_where_layers_run_several_times(forwards: int, calls: int, checkpointed: bool) -> None:
    """In a forward, before a backward, and again in that."""
    torch.manual_seed(17)
    model = Net(checkpointed=checkpointed, calls=calls).to(DEVICE)
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager")
    compiled = torch.compile(model, backend=backend)
    expected = {name: forwards * gradient for name, gradient in eager(model).items()}
    model.zero_grad()
    for loss in [compiled(*(t.to(DEVICE) for t in batch())) for _ in range(forwards)]:
        loss.backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, expected)
    for name in ("up", "down"):
        site = sites(backend)[name]
        assert site.rows == forwards * calls * ROWS
        assert site.rows_unneeded == forwards * calls * UNNEEDED
        assert site.flops_forward == calls * PRODUCT * LENGTH / TOKENS


def test_each_mask_is_decided_by_its_own_last_step(device: torch.device) -> None:
    """Two kinds of texts go through one encoder: questions, padded, and passages."""
    kept = DeviceForward()
    questions, passages = (
        torch.arange(64, device=device) < 16,
        torch.ones(64, dtype=torch.bool, device=device),
    )
    skips = [(int(kept.slots(questions, 0)[4]), int(kept.slots(passages, 1)[4])) for _ in range(3)]
    assert skips == [(3, 0)] * 3


def test_the_backward_takes_the_rows_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """And looks for none of its own."""
    looked: list[int] = []
    look = on_device.live_rows
    monkeypatch.setattr(on_device, "live_rows", lambda dy: looked.append(len(dy)) or look(dy))
    train(Schedule.exact(), net())
    assert looked == [4], "the head's, of which all rows are needed"


@pytest.mark.parametrize("method", [Sample(0.3), Sample(0.3, gradients="weight"), Reuse(0.5)])
def test_methods_go_on_as_before(method: Sample | Reuse) -> None:
    """Rows that are not needed have a gradient of zero, whoever chooses among the others."""
    model = net()
    wanted = eager(model)
    found, backend = train(Schedule(linear=method), model)
    assert sites(backend)["up"].rows_unneeded == UNNEEDED
    if isinstance(method, Reuse):  # in its first backward
        torch.testing.assert_close(found, wanted)
    else:
        assert found["up.weight"].isfinite().all()


def test_a_layer_that_is_excluded_computes_all(device: torch.device) -> None:
    model = net()
    found, backend = train(Schedule.exact(exclude="up"), model)
    torch.testing.assert_close(found, eager(model))
    assert sites(backend)["up"].rows_unneeded == 0
    assert sites(backend)["down"].rows_unneeded == UNNEEDED


def test_a_product_that_costs_nothing_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_WORTH_ASKING", PRODUCT + 1)
    _, backend = train(Schedule.exact(), net())
    assert "linear_forward_rows" not in backend.graphs[0].after
    torch._dynamo.reset()
    monkeypatch.setattr(forward, "_WORTH_ASKING", PRODUCT)
    _, backend = train(Schedule.exact(), net())
    assert backend.graphs[0].after.count("sparse_compile.linear_forward_rows.default(") == 2


def test_a_dtype_without_kernels_is_left_to_aten() -> None:
    """The mask is asked all the same: it is nobody's dtype."""
    x, w = torch.randn(12, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    needed = torch.arange(12) < 5
    slots = DeviceForward().slots(needed.to(DEVICE))
    rows, index = DeviceForward().linear(x, w, None, Needed.given(*slots[:3], slots[4]), slots[3])
    torch.testing.assert_close(rows[index], x @ w.t())


def test_whether_to_skip_is_decided_by_the_step_before(device: torch.device) -> None:
    """Of the first, the host waits for the count. Where all are needed, looks become rare."""
    kept, skips = DeviceForward(), []
    for needed_rows in (16, 16, 64, 64, 64, 64, 16, 16, 16, 16, 16, 16):
        skips.append(int(kept.slots(torch.arange(64, device=device) < needed_rows)[4]))
    # A quarter of the rows is two eighths, and what is passed one more.
    assert skips == [3, 3, 3, 0, 0, 0, 0, 0, 0, 0, 3, 3]


def test_none_needed_at_the_start_of_a_step(device: torch.device) -> None:
    kept = DeviceForward()
    slots = kept.slots(torch.zeros(64, dtype=torch.bool, device=device))
    given = Needed.given(*slots[:3], slots[4])
    assert given is not None
    assert given.share == 0.0


def test_all_or_none_are_needed(device: torch.device) -> None:
    x, w, b = (torch.randn(*size, device=device) for size in ((12, 5), (7, 5), (7,)))
    for count in (0, 1, 12):
        needed = torch.arange(12, device=device) < count
        kept, found, slot, copies = on_device.needed_slots(needed)
        given = Needed.given(kept, found, slot, torch.tensor([3]))
        rows, index = DeviceForward().linear(x, w, b, given, copies)
        y, truth = rows[index], torch.nn.functional.linear(x, w, b)
        torch.testing.assert_close(y[:count], truth[:count])
        wanted = truth[:1].expand(12 - count, -1) if count else torch.zeros(12, 7, device=device)
        torch.testing.assert_close(y[count:], wanted[: 12 - count])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("skip", [0, 4])
def test_opcheck(bias: bool, skip: int, device: torch.device) -> None:
    x, w, b = (torch.randn(*size, device=device) for size in ((12, 5), (7, 5), (7,)))
    needed = torch.arange(12, device=device) < 5
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    token = torch.tensor(NO_TOKEN)
    torch.library.opcheck(ops.needed_slots.default, (token, needed, 0), test_utils=checks)
    slots = (*on_device.needed_slots(needed), torch.tensor([skip]))
    arguments = (token, x, w, b if bias else None, *slots, 0)
    torch.library.opcheck(ops.linear_forward_rows.default, arguments, test_utils=checks)
    dy = torch.randn(12, 7, device=device) * needed.unsqueeze(1)
    backward = (token, dy, x, w, 0, 1, False)
    torch.library.opcheck(
        ops.linear_backward.default, backward, {"needed": [*slots[:3], slots[4]]}, test_utils=checks
    )


def test_through_inductor(device: torch.device) -> None:
    """With dropout-free layers of a size that Inductor compiles quickly."""
    model = net()
    wanted = eager(copy.deepcopy(model))
    found, backend = train(Schedule.exact(), model, compiler="inductor")
    torch.testing.assert_close(found, wanted)
    assert sites(backend)["up"].rows_unneeded == UNNEEDED


def test_planned_and_through_inductor(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """And replayed: in the last of these steps, no layer is asked what to launch."""
    monkeypatch.setattr(SparseBackend, "_planned_calls", planned_calls)
    model = net()
    wanted = eager(copy.deepcopy(model))
    backend = sparse_backend(Schedule.exact(), debug=True)  # in no cache, where others would find it
    compiled = torch.compile(model, backend=backend)
    for _ in range(6):
        torch.testing.assert_close(one_step(compiled, model), wanted)
    asked: list[object] = []
    monkeypatch.setattr(DeviceForward, "linear", lambda *given, **_: asked.append(given))
    monkeypatch.setattr(PlannedLinear, "launch", lambda *given, **_: asked.append(given))
    torch.testing.assert_close(one_step(compiled, model), wanted)
    assert not asked
    assert sites(backend)["up"].rows_unneeded == 5 * UNNEEDED


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: on the CPU there is nothing to wait for"
)
def test_nothing_waits_for_the_gpu() -> None:
    kept, needed = DeviceForward(), torch.arange(64, device=DEVICE) < 16
    x, w = torch.randn(64, 16, device=DEVICE), torch.randn(32, 16, device=DEVICE)

    def step() -> None:
        kept_rows, count, slot, copies, skip = kept.slots(needed)
        kept.linear(x, w, None, Needed.given(kept_rows, count, slot, skip), copies)

    for _ in range(2):  # kernels are built, and there is a count
        step()
    with nothing_waits():
        step()
